"""Start a training run from an earlier adapter: new images of its classes, or classes that came or went."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from visgraft.adapters.directory import adapter_tensors, check_backbone, read_record, read_tensors
from visgraft.adapters.hub import TENSORS, settled
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.heads import output_layers
from visgraft.core.attach import assemble, detach
from visgraft.data.dataset import listed
from visgraft.data.table_lines import folded
from visgraft.data.tasks import LabelTask
from visgraft.errors import AdapterError
from visgraft.options import MethodConfig


class TakenRow(NamedTuple):
    """A row of the new head, the old one it begins as, and what is done to it: output * `scale` + `shift`."""

    new: int
    old: int
    scale: float = 1.0
    shift: float = 0.0


@settled()
def start_from(
    model: nn.Module, adapter: Path, config: MethodConfig, classes: Sequence[str], tasks: Sequence[LabelTask] = ()
) -> list[str]:
    """Attach an adapter's method with its weights to a plain model whose head may have other classes.

    The rows of the head are taken over class by class, by name; those of new classes start as in the model. Nothing is
    chosen or scored anew: SCT keeps its channels.

    With several tasks, outputs are matched by task and class. Where only one of both has tasks, the one label of the
    other is that task which has all of its classes. A number's row is scaled so that it says the same number.

    Args:
        model: the plain backbone with a head for `classes`, in place.
        adapter: the folder of the earlier adapter, or `hf:USER/NAME`.
        config: the method's options, which must be those of the adapter.
        classes: names of the head's outputs.
        tasks: what they answer, where that is not one label.

    Returns:
        Lines that name the classes that came and went.

    Raises:
        AdapterError: the adapter is damaged, of another method, options or backbone, or shares no class.
    """
    stored = read_record(adapter)
    if stored.method.passes and config.passes:
        _check_parts(adapter, stored, config.passes, tasks)
    if stored.method != config:
        raise AdapterError(
            f"{adapter} is {stored.method.method} with {stored.method.to_dict()}; leave the method's options out to go "
            "on with these"
        )
    rows = _matched(stored, classes, tasks)
    if not rows:
        raise AdapterError(f"{adapter} knows none of the classes {', '.join(classes[:5])}; train without --init-from")
    assemble(model, config)
    try:
        _take_over(model, adapter, stored, rows)
    except AdapterError:
        detach(model)
        raise
    new, old = {row.new for row in rows}, {row.old for row in rows}
    added = [name for number, name in enumerate(classes) if number not in new]
    gone = [name for number, name in enumerate(stored.classes) if number not in old]
    told = [f"new classes, whose part of the head starts at random: {listed(added)}"] if added else []
    return told + ([f"classes of {adapter} that are gone: {listed(gone)}"] if gone else [])


def _check_parts(adapter: str | Path, stored: AdapterRecord, passes: Sequence[int], tasks: Sequence[LabelTask]) -> None:
    """Raise an AdapterError unless each task has the part of its own at the place at which the adapter has it."""
    names = [[task.name for task in known] for known in (stored.tasks, tasks)]
    before, now = (", ".join(map(str, outputs)) for outputs in (stored.method.passes, passes))
    if before != now:
        differ = f"each task, of {before} outputs, but the tasks of these images have {now}"
    elif all(names) and [folded(name) for name in names[0]] != [folded(name) for name in names[1]]:
        differ = f"the tasks {', '.join(names[0])}, but those of these images are {', '.join(names[1])}"
    else:
        return
    raise AdapterError(
        f"{adapter} has parts of its own for {differ}; name the same labels in the same order, or train without "
        "--init-from"
    )


def _matched(stored: AdapterRecord, classes: Sequence[str], tasks: Sequence[LabelTask]) -> list[TakenRow]:
    """Return which rows of the new head begin as which of the old one."""
    before, now = stored.classes, tuple(classes)
    if bool(tasks) != bool(stored.tasks):
        before, now = _called(before, tasks), _called(now, stored.tasks)
    numbers = {task.name: task for task in tasks if task.kind == "number"}
    old_numbers = {task.name: task for task in stored.tasks if task.kind == "number"}
    places, rows = {name: row for row, name in enumerate(before)}, []
    for row, name in enumerate(now):
        new, old = numbers.get(name), old_numbers.get(name)
        if new is not None and old is not None and (new.unit == old.unit or "" in (new.unit, old.unit)):
            rows.append(TakenRow(row, places[name], old.std / new.std, (old.mean - new.mean) / new.std))
        elif new is None and old is None and name in places:
            rows.append(TakenRow(row, places[name]))
    return rows


def _called(classes: tuple[str, ...], tasks: Sequence[LabelTask]) -> tuple[str, ...]:
    """Return what the classes of one label are called as outputs of the first task that has them all, if one does."""
    task = next((task for task in tasks if classes and set(classes) <= set(task.classes)), None)
    return classes if task is None else tuple(f"{task.name}={name}" for name in classes)


def _take_over(model: nn.Module, adapter: Path, stored: AdapterRecord, rows: Sequence[TakenRow]) -> None:
    """Copy an adapter's tensors into a model with the method attached; of the outputs' layer only `rows`.

    Raises:
        AdapterError: the backbone is another, or the tensors are damaged or do not fit.
    """
    check_backbone(model, stored, adapter)
    tensors, own = read_tensors(adapter), adapter_tensors(model)
    last = tuple(f"{path}." for path in output_layers(model))

    def fits(name: str) -> bool:
        start = 1 if name.startswith(last) else 0  # of the outputs' layer the number of rows may differ
        return own[name].shape[start:] == tensors[name].shape[start:] and bool(tensors[name].isfinite().all())

    wrong = sorted(tensors.keys() ^ own.keys()) + [name for name in own if name in tensors and not fits(name)]
    if wrong:
        raise AdapterError(
            f"{adapter / TENSORS} does not fit its config: {', '.join(wrong[:3])}; restore it or train again"
        )
    state = model.state_dict()
    new_rows, old_rows, scales, shifts = (list(column) for column in zip(*rows, strict=True))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith(last):
                taken = tensor[old_rows].to(state[name])
                by_row = (-1, *[1] * (taken.ndim - 1))
                taken = taken * taken.new_tensor(scales).view(by_row)
                if name.endswith(".bias"):
                    taken = taken + taken.new_tensor(shifts).view(by_row)
                state[name][new_rows] = taken
            else:
                state[name].copy_(tensor)
