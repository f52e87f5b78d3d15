"""Open the images of a protocol's task, and check them before anything is trained."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visgraft.data.dataset import Example, listed
from visgraft.data.examples import classes_of, tasks_of
from visgraft.data.tasks import TaskLabels
from visgraft.errors import DataError
from visgraft.protocols.row import Parts, Protocol, Task


@dataclass(frozen=True)
class TaskCheck:
    """What is wrong with a task's images, or that nothing is."""

    task: str
    ok: bool
    text: str


def open_task(protocol: Protocol, task: Task, root: Path, seed: int = 0, *, any_size: bool = False) -> Parts:
    """Find the images of a task below `root` and check them; nothing is decoded.

    Args:
        protocol: whose task it is.
        task: one of its rows.
        root: the folder of the protocol's images.
        seed: of what is drawn, for a task with `shots`.
        any_size: accept other numbers of images than the task's.

    Raises:
        DataError: the folder is missing or laid out otherwise, a part is empty, there are other numbers of images
            than the task's, a label is no class, a class has no shots, or an image is in two parts or twice in one.
    """
    parts = task.open(root / task.folder, task, seed)
    wrong = problems(parts, task, any_size=any_size)
    if wrong:
        raise DataError(f"{protocol.name}, {task.name}, in {root / task.folder}: {wrong[0]}")
    return parts


def problems(parts: Parts, task: Task, *, any_size: bool = False) -> list[str]:
    """Return what is wrong with a task's images, in a line each with the remedy."""
    by_name = _by_name(parts)
    wanted = {name: by_name.get(name, ()) for name in (*task.images, *by_name)}
    found = [f"there are no {name} images; the layout expected is {task.layout}" for name, e in wanted.items() if not e]
    if len(parts.classes) != task.classes:
        found.append(f"there are {len(parts.classes)} classes instead of {task.classes}; complete or remove some")
    if not any_size:
        found += [
            f"there are {len(wanted[name]):,} {name} images instead of {count:,}; complete them, or run with "
            "--any-size, and the results will say so"
            for name, count in task.images.items()
            if wanted[name] and len(wanted[name]) != count
        ]
    for name, examples in by_name.items():
        known = range(len(parts.classes))
        outside = next((e for e in examples if any(n not in known for n in classes_of(e.label))), None)
        if outside is not None:
            text = f"{outside.path} in {name} has the label {outside.label}"
            found.append(f"{text}, but labels are 0 to {len(parts.classes) - 1}; repair it")
    # Only draws promise some images of each class: a published list may have none (VTAB-1k's 800 of sun397's 397).
    absent = _untrained(parts) if task.shots else []
    if absent:
        found.append(f"classes without a training image: {listed(absent)}; add some")
    return [*found, *without_labels(parts), *leaks(by_name)]


def _by_name(parts: Parts) -> dict[str, Sequence[Example]]:
    return {"train": parts.train, "val": parts.val, **parts.tests}


def _untrained(parts: Parts) -> list[str]:
    """Return the classes without a training image."""
    known = {number for example in parts.train for number in classes_of(example.label)}
    numbers = {task.name for task in tasks_of(parts.train) if not task.classes}
    return [name for label, name in enumerate(parts.classes) if label not in known and name not in numbers]


def without_labels(parts: Parts) -> list[str]:
    """Name the parts in which no image has one of several labels: figures would be of other labels there."""
    found = []
    for name, examples in _by_name(parts).items():
        values = [example.label.values for example in examples if isinstance(example.label, TaskLabels)]
        there = zip(tasks_of(examples), zip(*values, strict=True), strict=False)
        absent = [task.name for task, own in there if all(value is None for value in own)]
        found += [f"no {name} image has a label {one}; fill in some, or leave the column out" for one in absent]
    return found


def leaks(by_name: Mapping[str, Sequence[Example]]) -> list[str]:
    """Name the first image that is in two parts: what is chosen or learned on it would be measured on it again.

    Also name the first that is twice in one part, where it would count twice. Paths are compared, not contents.
    """
    seen: dict[str, str] = {}
    for name, examples in by_name.items():
        for example in examples:
            path = os.path.abspath(example.path)
            if path in seen:
                other = seen[path]
                if other == name:
                    return [f"{example.path} is twice in {name}; remove one"]
                return [f"{example.path} is in {other} and in {name}, so the split leaks; leave it in one of them"]
            seen[path] = name
    return []


def check_root(protocol: Protocol, root: Path) -> list[TaskCheck]:
    """Look at every task's images, and say all that is wrong; a problem of the data raises nothing."""
    return [_finding(task, root) for task in protocol.tasks]


def _finding(task: Task, root: Path) -> TaskCheck:
    try:
        parts = task.open(root / task.folder, task, 0)
    except (DataError, OSError) as error:
        return TaskCheck(task.name, False, str(error))
    wrong = problems(parts, task) + _missing(parts)
    if wrong:
        return TaskCheck(task.name, False, "; ".join(wrong))
    counts = ", ".join(f"{len(examples):,} {name}" for name, examples in _by_name(parts).items())
    absent = _untrained(parts)
    note = f"; {len(absent)} classes have no training image, as published" if absent else ""
    asked = "; ".join(map(str, tasks_of(parts.train))) or f"{task.classes} classes"
    return TaskCheck(task.name, True, f"{asked}, {counts}{note}")


def _missing(parts: Parts) -> list[str]:
    """Name the first image files that a list names and that are not there."""
    absent = [
        str(example.path)
        for examples in _by_name(parts).values()
        for example in examples
        if example.content is None and not os.path.isfile(example.path)
    ]
    if not absent:
        return []
    files = "1 image file is" if len(absent) == 1 else f"{len(absent):,} image files are"
    return [f"{files} missing: {listed(absent, 3)}; complete them"]
