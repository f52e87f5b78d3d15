"""The tasks of several runs side by side: a row for each task and run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visgraft.data.tasks import LabelTask
from visgraft.report.compare import Lead, RunRow

MEASURES = {"r2": "R²", "mean_average_precision": "mean AP", "top1": "top-1"}


@dataclass(frozen=True)
class TaskRow:
    """What one run reaches in one task: the figure with its 95 % interval, and by how much the best run is ahead.

    `figure` is a rate between 0 and 1, of a number R², which may be below 0. `mae` and `constant_mae`, that of the
    training images' mean as the answer to all, are in the number's unit, None where classes are asked for.
    """

    task: LabelTask
    run: str
    anchor: str
    measure: str
    figure: float | None
    interval: tuple[float, float] | None
    images: int
    mae: float | None
    constant_mae: float | None
    lead: Lead | None


def task_rows(rows: Sequence[RunRow], leads: Sequence[Mapping[str, Lead]], tasks: Sequence[LabelTask]) -> list[TaskRow]:
    """Return the rows of all tasks and runs, task by task, the runs in their order."""
    return [
        _row(task, row, row.tasks[task.name], ahead.get(task.name))
        for task in tasks
        for row, ahead in zip(rows, leads, strict=True)
        if task.name in row.tasks
    ]


def _row(task: LabelTask, row: RunRow, found: Mapping[str, Any], lead: Lead | None) -> TaskRow:
    name = next(name for name in MEASURES if name in found)
    limits = found.get(f"{name}_ci95")
    return TaskRow(
        task, row.name, row.anchor, MEASURES[name], found[name], (limits[0], limits[1]) if limits else None,
        found["images"], found.get("mae"), found.get("constant_mae"), lead,
    )  # fmt: skip
