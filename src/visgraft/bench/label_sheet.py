"""The figures of each label, where a task asks for several of an image, as a table of its own."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from visgraft.bench.measures import R2, SHOWN, label_measure
from visgraft.bench.sheet import NONE, Column, Sheet, cell
from visgraft.bench.statistics import TEST, Table

ERROR = "mae"


def label_sheet(table: Table, title: str) -> Iterator[Sheet]:
    """Yield the figures of each label on the test images; nothing where no task has labels of its own.

    A number has its mean absolute error beside R², in its unit.
    """
    several = len(table.tasks) > 1
    columns = [column for task in table.tasks for column in _columns(table, task, f"{task}, " if several else "")]
    if columns:
        text = (
            "Conditions as in the table above. Each label on the test images that have it, means over the seeds; "
            "shares are in percent, and errors of numbers in their unit, beside those of a constant answer, the "
            "training images' mean."
        )
        methods = Column("method", tuple(row.label for row in table.rows))
        yield Sheet(f"{title}: label by label", text, (methods, *columns))


def _columns(table: Table, task: str, prefix: str) -> Iterator[Column]:
    found = [{r.trial.seed: r.measured[TEST].by_label for r in row.on([task]).results} for row in table.rows]
    first = next((labels for seeds in found for labels in seeds.values()), {})
    for name, figures in first.items():
        measure = label_measure(figures)
        shares = [{seed: _value(labels[name], measure) for seed, labels in seeds.items()} for seeds in found]
        texts = tuple(cell(one).replace("-", "−") for one in shares)
        means = tuple(fmean(one.values()) if one else None for one in shares)
        yield Column(f"{prefix}{name}: {SHOWN[measure]} (%)", texts, means)
        if measure == R2:
            errors = [[labels[name][ERROR] for labels in seeds.values()] for seeds in found]
            constant = f"{figures[f'constant_{ERROR}']:.3g} {figures.get('unit', '')}".strip()
            head = f"{prefix}{name}: mean absolute error (constant answer: {constant})"
            yield Column(head, tuple(f"{fmean(one):.3g}" if one else NONE for one in errors))


def _value(figures: Mapping[str, Any], measure: str) -> float:
    """Return a label's figure; R² has no meaning, and counts as 0, where all true numbers are alike."""
    return float(figures[measure] or 0.0)
