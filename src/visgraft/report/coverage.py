"""How often the sets of `predict --coverage` hold the truth: over all measured images, and class by class and group."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from visgraft.adapters.calibrated import Calibrated
from visgraft.measure.calibration import Calibration, calibration
from visgraft.measure.conformal import CoverageError, bound, class_sets, number_scores
from visgraft.measure.evaluation import Evaluation, is_multi_label
from visgraft.measure.intervals import rate_interval, wilson
from visgraft.measure.numbers import NumberFigures
from visgraft.measure.temperature import recalibrated
from visgraft.pictures import Picture
from visgraft.report import figures

LEVELS = (0.8, 0.9, 0.95)
DETAILED = 0.9
MOST_ROWS = 200


@dataclass(frozen=True)
class LevelRow:
    """What was reached at a level: the share of images whose set holds the truth with its 95 % interval, and sizes.

    `wanting` says why a level cannot be promised; then all else is None.
    """

    level: float
    share: float | None = None
    low: float | None = None
    high: float | None = None
    size: float | None = None
    single: float | None = None
    wanting: str = ""


@dataclass(frozen=True)
class CoveredRow:
    """The images of a class or group: how many, how many sets hold the truth, with a 95 % interval, and mean size."""

    name: str
    images: int
    share: float
    low: float
    high: float
    size: float


@dataclass(frozen=True)
class Coverage:
    """What the page says of a calibrated run; `detailed` is the level of the rows of `classes` and `groups`."""

    images: int
    temperature: float
    after: Calibration
    reliability: Picture
    levels: tuple[LevelRow, ...]
    detailed: float
    classes: tuple[CoveredRow, ...]
    groups: tuple[CoveredRow, ...]


def measure_coverage(
    calibrated: Calibrated | None,
    evaluation: Evaluation,
    names: Sequence[str],
    groups: Sequence[str | None],
    members: NDArray[np.int64],
) -> Coverage | None:
    """Return how often sets hold the truth on measured images; None: the run is not calibrated.

    Args:
        calibrated: of the run.
        evaluation: its answers.
        names: of the classes.
        groups: of the images; empty where there are none.
        members: which images belong together (see `clusters`).
    """
    if calibrated is None:
        return None
    multi_label = is_multi_label(evaluation)
    logs = recalibrated(evaluation.probabilities, calibrated.temperature, multi_label)
    rows, details = list[LevelRow](), None
    for level, highest, wanting in _bounds(calibrated):
        if wanting:
            rows.append(LevelRow(level, wanting=wanting))
            continue
        inside = class_sets(logs, highest, multi_label).numpy()
        hits, sizes = _held(inside, evaluation), inside.sum(1)
        low, high = rate_interval(hits.astype(float), members)
        rows.append(LevelRow(level, float(hits.mean()), low, high, float(sizes.mean()), float((sizes == 1).mean())))
        if level <= DETAILED:
            details = level, inside, hits
    after = calibration(replace(evaluation, probabilities=logs.exp().float()))
    level, inside, hits = details or (DETAILED, np.zeros((0, 0), bool), np.zeros(0, bool))
    picture = figures.reliability(after, "there" if multi_label else "right")
    return Coverage(
        calibrated.images, calibrated.temperature, after, picture, tuple(rows), level,
        _class_rows(inside, evaluation, names) if details else (), _group_rows(inside, hits, groups) if details else (),
    )  # fmt: skip


@dataclass(frozen=True)
class NumberCoverage:
    """What the page says of the intervals of a number; a row's size is how far they reach to either side, in its unit.

    `detailed` is the level of the rows of `groups`.
    """

    images: int
    levels: tuple[LevelRow, ...]
    detailed: float
    groups: tuple[CoveredRow, ...]


def number_coverage(
    calibrated: Calibrated | None,
    found: NumberFigures,
    groups: Sequence[str | None],
    members: NDArray[np.int64],
) -> NumberCoverage | None:
    """Return how often intervals hold the true number; None: the run is not calibrated. Arguments as above."""
    if calibrated is None:
        return None
    scores = number_scores(found.truth.double().numpy(), found.answers.double().numpy())
    rows, details = list[LevelRow](), None
    for level, highest, wanting in _bounds(calibrated):
        if wanting:
            rows.append(LevelRow(level, wanting=wanting))
            continue
        hits = scores <= highest
        rows.append(LevelRow(level, float(hits.mean()), *rate_interval(hits.astype(float), members), highest))
        if level <= DETAILED:
            details = level, hits, highest
    level, hits, highest = details or (DETAILED, np.zeros(0, bool), 0.0)
    named = sorted({group for group in groups if group is not None}) if details else []
    own = [(name, hits[np.array([group == name for group in groups])]) for name in named]
    shares = [(name, len(one), float(one.mean())) for name, one in own]
    worst = _worst([CoveredRow(name, n, share, *wilson(share, n), highest) for name, n, share in shares])
    return NumberCoverage(calibrated.images, tuple(rows), level, worst)


def _bounds(calibrated: Calibrated) -> Iterator[tuple[float, float, str]]:
    """Yield each level with the highest score of its answers, or with why it cannot be promised."""
    for level in LEVELS:
        try:
            yield level, bound(calibrated, level), ""
        except CoverageError as error:
            yield level, math.nan, str(error)


def _held(inside: NDArray[np.bool_], evaluation: Evaluation) -> NDArray[np.bool_]:
    """Return whether the set of each image [N] holds all its true classes."""
    labels = evaluation.labels.numpy()
    if labels.ndim == 1:
        return np.asarray(inside[np.arange(len(labels)), labels])
    return np.asarray((inside | (labels < 0.5)).all(1))


def _class_rows(inside: NDArray[np.bool_], evaluation: Evaluation, names: Sequence[str]) -> tuple[CoveredRow, ...]:
    """Return how often sets hold a class where it is true, the lowest share first."""
    labels = evaluation.labels.numpy()
    rows = []
    for number, name in enumerate(names):
        own = labels == number if labels.ndim == 1 else labels[:, number] > 0.5
        if own.any():
            rows.append(_row(name, inside[own, number], inside[own]))
    return _worst(rows)


def _group_rows(
    inside: NDArray[np.bool_], hits: NDArray[np.bool_], groups: Sequence[str | None]
) -> tuple[CoveredRow, ...]:
    """Return how often sets hold the truth in each group, the lowest share first."""
    if not any(group is not None for group in groups):
        return ()
    named = np.array(["no group" if group is None else group for group in groups])
    return _worst([_row(str(name), hits[named == name], inside[named == name]) for name in np.unique(named)])


def _row(name: str, hits: NDArray[np.bool_], inside: NDArray[np.bool_]) -> CoveredRow:
    share = float(hits.mean())
    return CoveredRow(name, len(hits), share, *wilson(share, len(hits)), float(inside.sum(1).mean()))


def _worst(rows: list[CoveredRow]) -> tuple[CoveredRow, ...]:
    return tuple(sorted(rows, key=lambda row: (row.share, -row.images))[:MOST_ROWS])
