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


def check_measured(measure: str, figure: Any, by_label: Any) -> None:
    """Raise a TypeError unless this is what a line holds: a figure of a known measure, and such of each label."""
    if measure not in SHOWN:
        raise TypeError(f"its measure is {measure!r}, and not one of {', '.join(SHOWN)}")
    if not isinstance(figure, int | float):
        raise TypeError(f"its figure is {figure!r}, and no number")
    if not isinstance(by_label, Mapping) or not all(map(_is_labels, by_label.values())):
        raise TypeError("by_label does not hold figures of each label")


def _is_labels(one: Any) -> bool:
    if not isinstance(one, Mapping):
        return False
    return TOP1 in one or PRECISION in one or {R2, "mae", "constant_mae"} <= {*one}


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
