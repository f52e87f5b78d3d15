"""What the figure of a trial is: by the labels of its images, and how tables and pictures call it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from visgraft.data.tasks import FIGURES, LabelTask

TOP1 = "top1"
PRECISION, R2, MEAN = "mean_average_precision", "r2", "mean"
SHOWN = {
    TOP1: FIGURES["one_class"],
    PRECISION: FIGURES["several_classes"],
    R2: FIGURES["number"],
    MEAN: "mean of the labels",
}
"""What each measure is called. R² counts as 0 where a constant answer would be as good, so that all lie in 0 to 1."""
MIXED = "different measures"


def measure_of(tasks: Sequence[LabelTask]) -> str:
    """Return the measure of images that have several classes each, or, with `tasks`, several labels or a number."""
    if len(tasks) > 1:
        return MEAN
    return R2 if tasks else PRECISION


def label_measure(figures: Mapping[str, Any]) -> str:
    """Return the measure of one label of several, of its figures in a line."""
    return next(name for name in (TOP1, PRECISION, R2) if name in figures)


def shown(measures: Iterable[str]) -> str:
    """Return what figures of these measures are called together."""
    found = set(measures)
    return SHOWN[found.pop()] if len(found) == 1 else MIXED


def only_top1(measures: Iterable[str]) -> bool:
    """Return whether all figures are top-1, which tables need not repeat column by column."""
    return set(measures) == {TOP1}
