"""The figures of a page as rows: classes, groups, confused pairs, calibration, costs and the configuration."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from visgraft.adapters.record import AdapterRecord
from visgraft.measure.evaluation import Evaluation, is_multi_label
from visgraft.measure.intervals import wilson

MOST_PAIRS = 12
MOST_GROUPS = 200


def right_answers(evaluation: Evaluation) -> NDArray[np.float64]:
    """Return 1 per image whose answer is right, else 0: [N]; with several classes, all must be right at 50 %."""
    if is_multi_label(evaluation):
        right = ((evaluation.probabilities >= 0.5) == (evaluation.labels > 0.5)).all(-1)
    else:
        right = evaluation.probabilities.argmax(-1) == evaluation.labels
    return right.double().numpy()


@dataclass(frozen=True)
class ClassRow:
    """One class: its images, how well it is told, and the wrong answer given most often in its place.

    Rates lie between 0 and 1; they are None where no image has the class.
    """

    name: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None
    wrong: str = ""
    wrong_count: int = 0
    average_precision: float | None = None


def class_rows(evaluation: Evaluation, counts: NDArray[np.int64], classes: Sequence[str]) -> list[ClassRow]:
    """Return one row per class, the lowest F1 first and classes without images last."""
    labels, predicted = evaluation.labels.numpy(), evaluation.probabilities.argmax(-1).numpy()
    rates = precision_recall_fscore_support(labels, predicted, labels=range(len(classes)), zero_division=0)
    rows = []
    for i, (precision, recall, f1, images) in enumerate(zip(*rates, strict=True)):
        others = counts[i].copy()
        others[i] = 0
        answer, often = int(others.argmax()), int(others.max())
        wrong = classes[answer] if often else ""
        known = [float(rate) if images else None for rate in (precision, recall, f1)]
        rows.append(ClassRow(classes[i], int(images), known[0], known[1], known[2], wrong, often))
    return sorted(rows, key=lambda row: (row.f1 is None, row.f1, -row.images))


def label_rows(evaluation: Evaluation, classes: Sequence[str]) -> list[ClassRow]:
    """Return one row per class of a multi-label run, the lowest average precision first."""
    labels, probabilities = evaluation.labels.numpy() > 0.5, evaluation.probabilities.numpy()
    rates = precision_recall_fscore_support(labels, probabilities >= 0.5, average=None, zero_division=0)
    rows = []
    for i, (precision, recall, f1, images) in enumerate(zip(*rates, strict=True)):
        if not images:
            rows.append(ClassRow(classes[i], 0, None, None, None))
            continue
        found = float(average_precision_score(labels[:, i], probabilities[:, i]))
        rates_here = (float(precision), float(recall), float(f1))
        rows.append(ClassRow(classes[i], int(images), *rates_here, average_precision=found))
    return sorted(rows, key=lambda row: (row.average_precision is None, row.average_precision))


@dataclass(frozen=True)
class Pair:
    """How often one class was answered in the place of another, and as a share of the true class."""

    true: str
    answered: str
    count: int
    share: float


def confused_pairs(counts: NDArray[np.int64], classes: Sequence[str]) -> list[Pair]:
    """Return the pairs confused most often, most frequent first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    found = [(int(i) // len(classes), int(i) % len(classes)) for i in order if wrong.flat[i]]
    return [Pair(classes[t], classes[a], int(wrong[t, a]), wrong[t, a] / counts[t].sum()) for t, a in found]


@dataclass(frozen=True)
class GroupRow:
    """One group's images and the share answered right, with Wilson's 95 % interval."""

    name: str
    images: int
    right: int
    share: float
    low: float
    high: float


def group_rows(evaluation: Evaluation, groups: Sequence[str | None]) -> list[GroupRow]:
    """Return one row per group, the lowest share first; empty where the data has no groups.

    An image of a multi-label run counts as right where every class is on the right side of 50 %.
    """
    if not any(group is not None for group in groups):
        return []
    hits = right_answers(evaluation)
    names = np.array(["no group" if group is None else group for group in groups])
    rows = []
    for name in np.unique(names):
        own = hits[names == name]
        share = float(own.mean())
        rows.append(GroupRow(str(name), len(own), int(own.sum()), share, *wilson(share, len(own))))
    return sorted(rows, key=lambda row: (row.share, -row.images))[:MOST_GROUPS]


def configuration_rows(record: AdapterRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return an adapter's whole configuration but its learning curve, as headings with (name, value) rows."""
    config, facts = record.to_json(), record.facts
    parts = {
        "Method": {"method": config["method"], **config["method_config"]},
        "Training": facts.get("train", {}),
        "Backbone": config["backbone"],
        "Data": {"classes": len(config["classes"]), **facts.get("data", {}), **_tasks(record)},
        "Preprocessing": config["data_config"],
        "Recorded figures": {k: v for k, v in facts.items() if k not in ("train", "data", "history")},
        "Versions": config.get("versions", {}),
    }
    return [(heading, list(_flat(values))) for heading, values in parts.items() if values]


def _tasks(record: AdapterRecord) -> dict[str, Any]:
    return (
        {"tasks": {task.name: str(task).removeprefix(f"{task.name}: ") for task in record.tasks}}
        if record.tasks
        else {}
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, Mapping):
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
