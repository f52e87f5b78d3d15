"""What the rows of a benchmark's table take: parameters, bytes, seconds, memory."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from visgraft.bench.statistics import RecipeRow


class Costs(NamedTuple):
    """What a row takes; None where it lacks a task of the table, so that no mean is over other tasks than the next.

    `parameters` are trained ones without the head, and `adapter_bytes` those stored, head included: medians over the
    trainings. `seconds` of a final training and `search_seconds` of all trainings that chose its setting are means over
    the tasks. `peak_memory_bytes` is the largest; `diverged` counts the trainings. `learned_top1`, top-1 on the images
    learned from in the last epoch, is a mean over the tasks of those trainings that kept it.
    """

    parameters: float
    adapter_bytes: float
    seconds: float | None
    search_seconds: float | None
    peak_memory_bytes: int | None
    diverged: int
    learned_top1: float | None


def costs(row: RecipeRow, tasks: Sequence[str]) -> Costs:
    """Return what a row takes on the table's tasks."""
    complete = not row.missing(tasks)
    seconds: dict[str, list[float]] = {}
    searched: dict[str, float] = {}
    learned: dict[str, list[float]] = {}
    for result in row.results:
        seconds.setdefault(result.trial.task, []).append(result.seconds)
        searched[result.trial.task] = float(result.selection.get("seconds", 0.0))
        if result.learned_top1 is not None:
            learned.setdefault(result.trial.task, []).append(result.learned_top1)
    return Costs(
        parameters=row.median("parameters"),
        adapter_bytes=row.median("adapter_bytes"),
        seconds=float(np.mean([np.mean(one) for one in seconds.values()])) if complete else None,
        search_seconds=float(np.mean(list(searched.values()))) if complete else None,
        peak_memory_bytes=max(result.peak_memory_bytes for result in row.results) if complete else None,
        diverged=sum(result.outcome == "diverged" for result in row.results),
        learned_top1=float(np.mean([np.mean(one) for one in learned.values()])) if set(learned) >= set(tasks) else None,
    )
