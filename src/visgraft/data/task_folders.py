"""Several data sets with labels of their own as one, each image labelled for its own task only."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visgraft.data.binding import check_outputs
from visgraft.data.dataset import PARTS, Dataset, fingerprint
from visgraft.data.examples import Coded, Columns, Example, Examples, Texts, groups_of, labels_of, names_of
from visgraft.data.shared_images import in_same_parts
from visgraft.data.tasks import LabelTask, TaskLabels, outputs_of
from visgraft.errors import DataError


def joined_tasks(found: Mapping[str, Dataset], known: Sequence[LabelTask] = ()) -> Dataset:
    """Return data sets, by the names of their tasks, as one; `known` are the tasks of a model that is measured on it.

    Raises:
        DataError: a data set has several tasks itself, outputs of two tasks have one name, or an image would be in
            different parts (see `in_same_parts`).
    """
    nested = next((name for name, dataset in found.items() if dataset.tasks), None)
    if nested is not None:
        raise DataError(f"--task {nested}={found[nested].root} has several labels itself; name a folder of classes")
    found = in_same_parts(found, bool(known))
    tasks = tuple(known) or tuple(
        LabelTask(name, "several_classes" if one.multi_label else "one_class", one.classes)
        for name, one in found.items()
    )
    check_outputs(tasks, "--task")
    place = {task.name: number for number, task in enumerate(tasks)}
    parts: dict[str, Any] = {
        part: _together([(getattr(one, part), place[name]) for name, one in found.items()], tasks) for part in PARTS
    }
    first = next(iter(found.values()))
    flat = any(one.layout == "flat" for one in found.values())
    mark = fingerprint([(f"{name}\0{one.fingerprint}", 0) for name, one in found.items()])
    notes = tuple(f"{name}: {note}" for name, one in found.items() for note in one.notes)
    return replace(
        first, root=_root([one.root for one in found.values()]), classes=outputs_of(tasks), **parts,
        layout="flat" if flat else "split", fingerprint=mark, multi_label=False, notes=notes, tasks=tasks,
        split=next((one.split for one in found.values() if one.split is not None), None),
        unlabelled=tuple(folder for one in found.values() for folder in one.unlabelled),
        absent={task.name: f"no --task {task.name}=FOLDER is given" for task in tasks if task.name not in found},
    )  # fmt: skip


def _root(roots: Sequence[Path]) -> Path:
    try:
        return Path(os.path.commonpath([os.path.abspath(root) for root in roots]))
    except ValueError:  # on several drives of Windows
        return roots[0]


def _together(parts: Sequence[tuple[Sequence[Example], int]], tasks: tuple[LabelTask, ...]) -> Examples | tuple[()]:
    """Return examples of several data sets one after the other, each with its place among the tasks."""
    if not any(len(part) for part, _ in parts):
        return ()
    names = Texts(name for part, _ in parts for name in names_of(part))
    labels, groups = list[TaskLabels](), list[str | None]()
    for part, place in parts:
        coded, grouped = labels_of(part), groups_of(part)
        values = [
            TaskLabels(tuple(value if number == place else None for number in range(len(tasks))), tasks)
            for value in coded.values
        ]
        labels += [values[code] for code in coded.codes.tolist()]
        # Two data sets may use the same name for groups that have nothing in common.
        groups += [
            None if grouped is None or (name := grouped.values[code]) is None else f"{tasks[place].name}/{name}"
            for code in (coded.codes if grouped is None else grouped.codes).tolist()
        ]
    contents = [example.content for part, _ in parts for example in part]
    if all(content is None for content in contents):
        return Examples(Columns(names, Coded.of(labels), None if set(groups) == {None} else Coded.of(groups)))
    raise DataError("--task takes folders and tables of image files; unpack the data set into files first")
