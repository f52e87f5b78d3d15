"""How well a linear head tells images apart by given features: cross-validated on few labelled images.

The head is what an adapter gets when it is trained for new classes, so its accuracy is the question itself; it is
logistic regression with an L2 penalty on standardised features, whose settings are not searched, because a search on
few images would choose by luck. The folds, drawn several times, are the same for all features, so scores are paired.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from visgraft.data.images import Images
from visgraft.errors import DataError
from visgraft.measure.intervals import clusters

FOLDS = 5
REPEATS = 3
PENALTY = 0.1
"""scikit-learn's C, the inverse of the penalty's weight; below its default, as features outnumber few images."""

LEAST = 1e-6
"""A probability below counts as this in the logarithm."""


class ProbedFeatures(NamedTuple):
    """The answers of heads that did not learn the image: `right` [N] is the share of the repeats, `log_loss` a mean."""

    right: np.ndarray
    log_loss: float


def fold_count(images: Images, classes: Sequence[str]) -> int:
    """Return how many folds the images make: 5, or as many as the rarest class has images, or groups.

    Raises:
        DataError: a class has one only, of which nothing could be learned and measured.
    """
    members, labels = clusters(images.groups, len(images)), images.labels.numpy()
    counts = {name: len(np.unique(members[labels == number])) for number, name in enumerate(classes)}
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] == 1:
        what = "image" if len(np.unique(members)) == len(members) else "group of images"
        raise DataError(f"class {rarest} has one {what}, but two are needed, to learn and to measure; add another")
    return min(FOLDS, counts[rarest])


def probe_features(features: Tensor, images: Images, folds: int) -> ProbedFeatures:
    """Return what linear heads answer that were fitted on the other folds, for features [N, F] of labelled images."""
    x, y = features.double().numpy(), images.labels.numpy()
    members = clusters(images.groups, len(images))
    groups = members if len(np.unique(members)) < len(members) else None
    right, losses = np.zeros(len(y)), np.zeros(len(y))
    for seed in range(REPEATS):
        kind = StratifiedKFold if groups is None else StratifiedGroupKFold
        for learn, ask in kind(folds, shuffle=True, random_state=seed).split(x, y, groups):
            probabilities = _answers(x[learn], y[learn], x[ask], int(y.max()) + 1)
            right[ask] += probabilities.argmax(1) == y[ask]
            losses[ask] -= np.log(np.maximum(probabilities[np.arange(len(ask)), y[ask]], LEAST))
    return ProbedFeatures(right / REPEATS, float(losses.mean() / REPEATS))


def _answers(x: np.ndarray, y: np.ndarray, asked: np.ndarray, classes: int) -> np.ndarray:
    """Return probabilities [M, classes] for features [M, F] of a head that learned others; 0 of a class it lacks."""
    found = np.zeros((len(asked), classes))
    there = np.unique(y)
    if len(there) == 1:  # groups may leave no other class
        found[:, there] = 1.0
        return found
    head = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=500))
    found[:, there] = head.fit(x, y).predict_proba(asked)
    return found
