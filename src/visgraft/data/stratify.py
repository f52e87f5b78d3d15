"""Parts that keep the shares of several labels at once."""

from collections.abc import Sequence

import numpy as np
from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit, RepeatedMultilabelStratifiedKFold

from visgraft.data.examples import Coded
from visgraft.data.tasks import BINS, TaskLabels


def label_marks(labels: Coded) -> np.ndarray:
    """Return what images have by their labels, bool [N, marks]: each class, each fifth of a number, unknown labels."""
    values: list[TaskLabels] = list(labels.values)
    columns: list[np.ndarray] = []
    for place in range(len(values[0].values)):
        columns += _marks([value.values[place] for value in values])
    return np.stack(columns, 1)[labels.codes]


def _marks(values: Sequence[int | tuple[int, ...] | float | None]) -> list[np.ndarray]:
    """Return the marks of one task's labels, each bool [N]."""
    unknown = np.array([value is None for value in values])
    found = [unknown] if unknown.any() else []
    numbers = np.array([value if isinstance(value, float) else np.nan for value in values])
    if not np.isnan(numbers).all():
        edges = np.nanquantile(numbers, np.arange(1, BINS) / BINS)
        bins = np.where(np.isnan(numbers), -1, np.searchsorted(edges, numbers, side="right"))
        return found + [bins == number for number in range(BINS) if (bins == number).any()]
    several = [value if isinstance(value, tuple) else () if value is None else (value,) for value in values]
    return found + [
        np.array([index in own for own in several]) for index in sorted({i for own in several for i in own})
    ]


def joint_strata(labels: Coded) -> np.ndarray:
    """Return a number per image, int64 [N], alike for images with the same marks."""
    return np.unique(label_marks(labels), axis=0, return_inverse=True)[1].reshape(-1)


def draw_marked(labels: Coded, val: float, test: float, seed: int) -> dict[str, np.ndarray]:
    """Divide images into {"train", "val", "test"}, int64 numbers each, so that every part has each mark's share.

    Source: iterative stratification (Sechidis et al. 2011), by the library of that name.
    """
    marks, left = label_marks(labels).astype(np.int64), np.arange(len(labels.codes))
    parts = {"val": np.zeros(0, np.int64), "test": np.zeros(0, np.int64)}
    for part, fraction in (("test", test), ("val", val)):
        if fraction > 0:
            count = max(1, round(fraction * len(labels.codes)))
            cutter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=count / len(left), random_state=seed)
            rest, taken = next(cutter.split(left, marks[left]))
            parts[part], left = np.sort(left[taken]), np.sort(left[rest])
    return {"train": left, **parts}


def marked_folds(
    marks: np.ndarray, members: np.ndarray, folds: int, repeats: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide images into folds that have each mark's share, and return which to train on and which to hold out.

    Source: as `draw_marked`. Images of one cluster stay together: a cluster has the marks of all its images.

    Args:
        marks: bool [N, marks], from `label_marks`.
        members: the images' clusters, int64 [N], from `clusters`.
        folds: how many parts, each of which is held out once per repeat.
        repeats: how often they are drawn anew.
        seed: of the draws.
    """
    clustered = np.zeros((int(members.max()) + 1, marks.shape[1]), np.int64)
    np.maximum.at(clustered, members, marks.astype(np.int64))
    cutter = RepeatedMultilabelStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed)
    found = []
    for _, held_out in cutter.split(clustered, clustered):
        inside = np.isin(members, held_out)
        found.append((np.flatnonzero(~inside), np.flatnonzero(inside)))
    return found
