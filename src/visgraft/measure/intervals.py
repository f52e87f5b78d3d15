"""95 % intervals over images for rates, paired differences and average precision; images of a group count together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm, t

RESAMPLES = 200


class Difference(NamedTuple):
    """A mean difference between two methods on the same images, and half the width of its 95 % interval."""

    mean: float
    half_width: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half_width


def clusters(groups: Sequence[str | None], count: int) -> np.ndarray:
    """Return a number per image, int64 [count], alike for images of one group; others stand alone."""
    names = [f"g{group}" if group is not None else f"i{i}" for i, group in enumerate(groups or [None] * count)]
    return np.asarray(np.unique(names, return_inverse=True)[1])


def wilson(rate: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate seen in `count` independent trials, which need not be a whole number."""
    z = float(norm.ppf(0.975))
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return float(centre - half) if rate > 0 else 0.0, float(centre + half) if rate < 1 else 1.0


def rate_interval(right: np.ndarray, members: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `right` [N], each between 0 and 1, with `members` from `clusters`.

    It is Wilson's, with as many trials as there are images, or fewer where images of a group are alike: as many
    independent ones as would scatter like the groups do. Where nothing scatters, every group counts as one.
    """
    rate, count, groups = float(right.mean()), len(right), int(members.max()) + 1
    if groups == count:
        return wilson(rate, count)
    variance = _cluster_variance(right - rate, members)
    independent = rate * (1 - rate) / variance if variance > 0 else groups
    return wilson(rate, min(max(independent, 1.0), count))


def paired_difference(first: np.ndarray, second: np.ndarray, members: np.ndarray) -> Difference:
    """Return the mean of `first` - `second` [N], each between 0 and 1, with its 95 % half-width over the clusters.

    Two further pairs, one won by each method, are counted in the width, so that few images on which the methods agree
    do not pass for certainty: Agresti and Min, Statistics in Medicine 24 (2005) 729-740.
    """
    difference = first - second
    mean = float(difference.mean())
    sums = np.append(np.bincount(members, difference - mean), [0.5**0.5, -(0.5**0.5)])
    error = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / (len(difference) + 2)
    return Difference(mean, float(t.ppf(0.975, len(sums) - 1) * error))


def _cluster_variance(residuals: np.ndarray, members: np.ndarray) -> float:
    """Variance of a mean [N] whose residuals go together within clusters."""
    sums = np.bincount(members, residuals)
    groups = len(sums)
    return float(groups / max(groups - 1, 1) * (sums**2).sum() / len(residuals) ** 2)


def bootstrap(
    figure: Callable[[np.ndarray], float | np.ndarray], members: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Return `figure` of resampled images [resamples]; whole clusters are drawn, with replacement.

    Where it returns several figures in an array, so many columns.
    """
    order = np.argsort(members, kind="stable")
    groups: list[Any] = np.split(order, np.cumsum(np.bincount(members))[:-1])
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(groups), size=len(groups)) for _ in range(resamples))
    return np.array([figure(np.concatenate([groups[i] for i in draw])) for draw in draws])


def spread(values: np.ndarray) -> float:
    """Return half the width of the 95 % interval of a figure, from its bootstrapped values."""
    return float(norm.ppf(0.975) * np.nanstd(values, ddof=1))
