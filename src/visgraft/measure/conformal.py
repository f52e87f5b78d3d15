"""Answers that hold the truth as often as is asked: split conformal prediction (Vovk; Lei et al. 2018).

A score says how far the truth is from an answer. Of n validation images and one more that was drawn like them, the new
one's score is as likely to be of any rank, so with the probability `coverage` it is not above that of rank
ceil((n + 1) * coverage). All classes, or numbers, whose score would not be above that are the answer.

Scores of one class are -log p of the true class, which orders images as 1 - p does and can be told apart also near 0;
of several classes the highest of the true ones', 0 where there is none; of numbers the distance |y - prediction|.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visgraft.adapters.calibrated import ONE_LABEL, Calibrated
from visgraft.errors import VisgraftError
from visgraft.measure.evaluation import Evaluation, is_multi_label
from visgraft.measure.numbers import NumberFigures
from visgraft.measure.temperature import fit_temperature, recalibrated

MOST_KEPT = 1000
"""Scores that are kept of any number of images: half of them are the highest, the others spread evenly."""
DIGITS = 7


class CoverageError(VisgraftError):
    """The coverage that is asked for cannot be promised."""


def rank_of(coverage: float, images: int) -> int:
    """Return the rank, from 1, of the score that bounds the answers; beyond `images` it cannot be promised.

    The number is taken as it is written: 0.95 of 20 is 19, whatever its binary form.
    """
    return math.ceil((images + 1) * Fraction(str(coverage)))


def images_needed(coverage: float) -> int:
    """Return how few validation images can promise a coverage."""
    share = Fraction(str(coverage))
    return math.ceil(share / (1 - share))


def check_coverage(coverage: float) -> None:
    """Raise a CoverageError unless it lies between 0 and 1."""
    if not 0 < coverage < 1:
        raise CoverageError(f"coverage is {coverage}, but must be above 0 and below 1, such as 0.95")


def bound(calibrated: Calibrated, coverage: float) -> float:
    """Return the highest score that belongs to an answer with this coverage.

    Raises:
        CoverageError: it does not lie between 0 and 1, or there were too few validation images to promise it.
    """
    check_coverage(coverage)
    rank = rank_of(coverage, calibrated.images)
    if rank > calibrated.images:
        raise CoverageError(
            f"a coverage of {coverage} takes {images_needed(coverage):,} validation images, and there were "
            f"{calibrated.images:,}; ask for less, or train with a larger validation part"
        )
    return calibrated.scores[int(np.searchsorted(calibrated.ranks, rank))]


def condense(scores: Sequence[float] | NDArray[np.float64], temperature: float = 1.0) -> Calibrated:
    """Return what is kept of the scores of validation images, from which any coverage can be asked.

    Of over `MOST_KEPT` images the next higher score stands for those left out, and numbers are rounded upwards, so that
    answers only hold the truth more often.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    images, half = len(ordered), MOST_KEPT // 2
    if images <= MOST_KEPT:
        ranks = np.arange(1, images + 1)
    else:
        spread = np.ceil(np.arange(1, half + 1) * (images - half) / half).astype(int)
        ranks = np.concatenate([spread, np.arange(images - half + 1, images + 1)])
    kept = tuple(_upwards(float(score)) for score in ordered[ranks - 1])
    return Calibrated(images, tuple(map(int, ranks)), kept, temperature)


def _upwards(score: float) -> float:
    """Return the next number of few digits that is not below."""
    if score == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(abs(score))) + 1 - DIGITS)
    found = float(f"{math.ceil(score / step) * step:.{DIGITS - 1}e}")
    return found if found >= score else float(f"{(math.ceil(score / step) + 1) * step:.{DIGITS - 1}e}")


def calibrate(evaluation: Evaluation) -> Calibrated:
    """Return what the answers to validation images say of how sure later ones are."""
    temperature = fit_temperature(evaluation.probabilities, evaluation.labels)
    logs = recalibrated(evaluation.probabilities, temperature, is_multi_label(evaluation))
    return condense(class_scores(logs, evaluation.labels), temperature)


def calibrate_tasks(evaluation: Evaluation) -> dict[str, Calibrated]:
    """Return it for every task that has labels; of one label per image as `ONE_LABEL`."""
    if not evaluation.by_task:
        return {ONE_LABEL: calibrate(evaluation)}
    found = {}
    for name, one in evaluation.by_task.items():
        if isinstance(one, NumberFigures):
            found[name] = condense(number_scores(one.truth.double().numpy(), one.answers.double().numpy()))
        else:
            found[name] = calibrate(one)
    return found


def class_scores(logs: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Return the scores [N] of log-probabilities [N, classes]; labels are int64 [N], or [N, classes] of 0 and 1."""
    if labels.ndim == 1:
        found = -logs.gather(1, labels[:, None])[:, 0]
    else:
        found = torch.where(labels > 0.5, -logs, torch.zeros_like(logs)).amax(1)
    return np.asarray(found.numpy())


def number_scores(numbers: NDArray[np.float64], predictions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores [N] of predicted numbers [N]."""
    return np.asarray(np.abs(numbers - predictions))


def class_sets(logs: Tensor, highest: float, multi_label: bool) -> Tensor:
    """Return which classes belong to the answers, bool [N, classes], of log-probabilities [N, classes].

    Where an image has one class, the most probable one always does.
    """
    inside = -logs <= highest
    if not multi_label:
        inside.scatter_(1, logs.argmax(1, keepdim=True), True)
    return inside


def interval(prediction: float, highest: float) -> tuple[float, float]:
    """Return the lowest and the highest number of an answer."""
    return prediction - highest, prediction + highest
