"""Whether a model's probabilities can be taken at their word."""

from dataclasses import dataclass

import numpy as np

from visgraft.measure.evaluation import Evaluation, is_multi_label
from visgraft.measure.intervals import wilson

BINS = 10


@dataclass(frozen=True)
class Bin:
    """The answers given with a probability between `low` and `high`: how many, how sure, and how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """Whether probabilities can be taken at their word; `error` is the expected calibration error."""

    bins: tuple[Bin, ...]
    error: float
    confidence: float
    accuracy: float


def calibration(evaluation: Evaluation) -> Calibration:
    """Compare probability with success in ten bins of equal width (Guo et al. 2017, arXiv:1706.04599).

    Of a classifier, the probability is that of its answer; of a multi-label model, that of every class.
    """
    if is_multi_label(evaluation):
        sure, right = evaluation.probabilities.flatten().numpy(), evaluation.labels.flatten().numpy() > 0.5
    else:
        best = evaluation.probabilities.max(-1)
        sure, right = best.values.numpy(), (best.indices == evaluation.labels).numpy()
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        own = place == i
        count, hits = int(own.sum()), int(right[own].sum())
        if count:
            bins.append(
                Bin(i / BINS, (i + 1) / BINS, count, float(sure[own].mean()), hits / count, wilson(hits / count, count))
            )
    error = sum(b.count / len(sure) * abs(b.confidence - b.accuracy) for b in bins)
    return Calibration(tuple(bins), error, float(sure.mean()), float(right.mean()))
