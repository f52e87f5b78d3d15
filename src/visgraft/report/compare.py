"""Several runs side by side: one row each, and whether the best is certainly the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from visgraft.adapters.record import AdapterRecord
from visgraft.data.task_tensors import known
from visgraft.data.tasks import LabelTask, column_slices
from visgraft.measure import intervals
from visgraft.measure.by_task import figures_on, mean_known
from visgraft.measure.evaluation import Evaluation, is_multi_label
from visgraft.measure.intervals import bootstrap, rate_interval, spread
from visgraft.measure.measuring import adapter_bytes, task_figures
from visgraft.report.tables import right_answers

TIE = 0.0005  # a lead below this rounds to 0.0 points


@dataclass(frozen=True)
class RunRow:
    """One run in the table: its figures on the measured images, or those recorded in training, and its costs.

    `figure` is top-1, mean average precision where images may have several classes, or the mean of several tasks'
    figures, which `tasks` holds as `task_figures` has them; rates lie between 0 and 1. Whatever is not known is None.
    """

    name: str
    anchor: str
    method: str
    multi_label: bool
    figure: float | None
    interval: tuple[float, float] | None
    macro_f1: float | None
    balanced_accuracy: float | None
    images: int
    params_adapter: int | None
    params_head: int | None
    adapter_bytes: int
    seconds: float | None
    images_per_second: float | None
    peak_memory_bytes: int | None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Lead:
    """By how much the best run is ahead of another on the same images, with its 95 % interval; `certain`: above 0."""

    points: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low > 0


def make_row(
    name: str, anchor: str, path: Path, record: AdapterRecord, evaluation: Evaluation | None, members: np.ndarray
) -> RunRow:
    """Put together a run's row; without an evaluation, the figures are those that training recorded."""
    facts, counts, stored = record.facts, record.parameters, record.figures
    figures: dict[str, Any]
    if stored.get("val_tasks") if evaluation is None else evaluation.by_task:
        multi_label, figures = False, _figures_of_tasks(record, evaluation, members)
    elif evaluation is None:
        multi_label = stored.get("val_mean_average_precision") is not None
        limits = stored.get("val_top1_ci95")
        figures = {
            "figure": stored.get("val_mean_average_precision" if multi_label else "val_top1"),
            "interval": (limits[0], limits[1]) if limits else None,
            "macro_f1": stored.get("val_macro_f1"),
            "balanced_accuracy": stored.get("val_balanced_accuracy"),
            "images": stored.get("val_images") or 0,
        }
    else:
        multi_label = is_multi_label(evaluation)
        figures = {
            "figure": evaluation.figure,
            "interval": figure_interval(evaluation, members),
            "macro_f1": evaluation.macro_f1,
            "balanced_accuracy": evaluation.balanced_accuracy,
            "images": evaluation.images,
        }
    return RunRow(
        name=name,
        anchor=anchor,
        method=record.method.method,
        multi_label=multi_label,
        **figures,
        params_adapter=counts.get("adapter"),
        params_head=counts.get("head"),
        adapter_bytes=adapter_bytes(path),
        seconds=facts.get("seconds"),
        images_per_second=facts.get("images_per_second"),
        peak_memory_bytes=facts.get("peak_memory_bytes"),
    )


def _figures_of_tasks(record: AdapterRecord, evaluation: Evaluation | None, members: np.ndarray) -> dict[str, Any]:
    """Return what a row says of a run with several tasks."""
    nothing: dict[str, Any] = {"interval": None, "macro_f1": None, "balanced_accuracy": None}
    if evaluation is None:
        stored = record.figures
        kept = {"figure": stored.get("val_mean"), "images": stored.get("val_images") or 0}
        return nothing | kept | {"tasks": stored.get("val_tasks") or {}}
    drawn = mean_known(_drawn(evaluation, record.tasks, members))
    half = spread(drawn)
    interval = (max(0.0, evaluation.figure - half), min(1.0, evaluation.figure + half))
    tasks = {name: task_figures(one) for name, one in evaluation.by_task.items()}
    return nothing | {
        "figure": evaluation.figure, "interval": interval, "images": evaluation.images, "tasks": tasks
    }  # fmt: skip


def _drawn(evaluation: Evaluation, tasks: Sequence[LabelTask], members: np.ndarray) -> np.ndarray:
    """Return the figures of each task on images drawn anew [resamples, tasks], the same draws for every run."""
    return bootstrap(figures_on(evaluation.probabilities[None], evaluation.labels, tasks), members)


def task_leads(
    best: Evaluation, other: Evaluation, tasks: Sequence[LabelTask], members: np.ndarray
) -> tuple[Lead, dict[str, Lead]]:
    """Return how far `best` is ahead of `other` in the mean of the tasks, and in each task, on the same images."""
    drawn = [_drawn(one, tasks, members) for one in (best, other)]
    whole = _lead(best.figure - other.figure, mean_known(drawn[0]) - mean_known(drawn[1]))
    each = dict[str, Lead]()
    for number, (task, columns) in enumerate(zip(tasks, column_slices(tasks), strict=True)):
        pair = [evaluation.by_task.get(task.name) for evaluation in (best, other)]
        if task.kind == "one_class" and isinstance(pair[0], Evaluation) and isinstance(pair[1], Evaluation):
            there = known(best.labels, task, columns)[0].numpy()
            each[task.name] = paired_difference(pair[0], pair[1], np.unique(members[there], return_inverse=True)[1])
        elif pair[0] is not None and pair[1] is not None:
            each[task.name] = _lead(pair[0].figure - pair[1].figure, (drawn[0] - drawn[1])[:, number])
    return whole, each


def _lead(points: float, drawn: np.ndarray) -> Lead:
    half_width = spread(drawn)
    return Lead(points, points - half_width, points + half_width)


def figure_interval(evaluation: Evaluation, members: np.ndarray) -> tuple[float, float] | None:
    """Return top-1's 95 % interval, in which images of one group (`members`, see `clusters`) count together."""
    if is_multi_label(evaluation):
        return None
    return rate_interval(right_answers(evaluation), members)


def paired_difference(best: Evaluation, other: Evaluation, members: np.ndarray) -> Lead:
    """Return how far `best` is ahead of `other` on the same images; images of one group count together.

    Mean average precision, which is no mean over images, is resampled.
    """
    if not is_multi_label(best):
        found = intervals.paired_difference(right_answers(best), right_answers(other), members)
        return Lead(found.mean, found.mean - found.half_width, found.mean + found.half_width)
    labels = best.labels.numpy() > 0.5
    both = [best.probabilities.numpy(), other.probabilities.numpy()]

    def difference(rows: np.ndarray) -> float:
        present = labels[rows].any(axis=0)  # classes that a resample lacks are left out of both means
        if not present.any():
            return float("nan")
        means = [average_precision_score(labels[rows][:, present], p[rows][:, present]) for p in both]
        return float(means[0] - means[1])

    return _lead(best.figure - other.figure, bootstrap(difference, members))


def percent(value: float | None) -> str:
    """A rate between 0 and 1 as a percentage with one decimal."""
    return "–" if value is None else f"{100 * value:.1f}"


def verdict(rows: Sequence[RunRow], figure: str, differences: Sequence[Lead | None], part: str) -> str:
    """Say in a sentence or two which run is best and whether that is certain; rows and differences are best first."""
    best = rows[0]
    if best.figure is None:
        return "No run has a figure to compare by; pass --data to measure them."
    reached = f"{'an' if figure == 'R²' else 'a'} {figure} of {percent(best.figure)} %"
    told = f"{best.name} reaches {reached} on {best.images:,} {part} images"
    within = f" (95 % interval {percent(best.interval[0])} to {percent(best.interval[1])})" if best.interval else ""
    if len(rows) == 1 or rows[1].figure is None:
        return f"{told}{within}."
    second, difference = rows[1], differences[1]
    if difference is None:
        return (
            f"{told}{within}, the highest recorded figure; {second.name} follows with {percent(second.figure)} %. "
            "Whether that difference is more than chance takes a comparison on the same images."
        )
    lead = f"{100 * difference.points:.1f} points ahead of" if difference.points >= TIE else "level with"
    ahead = (
        f"{lead} {second.name} "
        f"(95 % interval of the difference on the same images: {signed(difference.low)} to {signed(difference.high)})"
    )
    if difference.certain:
        return f"{told}, {ahead}. The interval lies above zero, so on images like these the lead is more than chance."
    return f"{told}, {ahead}. The interval includes zero, so these images do not tell which of the two is better."


def signed(value: float) -> str:
    """A difference of rates in points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")
