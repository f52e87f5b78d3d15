"""How far numbers that a model says are from the true ones, beside a constant answer."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from torch import Tensor

from visgraft.measure.intervals import RESAMPLES, bootstrap

NAMES = ("mae", "rmse", "r2", "spearman")
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class NumberFigures:
    """What a model reaches on the numbers of a set of images.

    `mae` and `rmse` are in the number's unit; `r2` is the coefficient of determination, and `spearman` the rank
    correlation, None where all answers or all true numbers are alike. `constant_mae` and `constant_rmse` are those of
    the training images' mean as the answer to every image. `intervals` are 95 % intervals by the bootstrap over images,
    by name, where they were asked for. `answers` float32 [N], or [repeats, N], and `truth` float32 [N].
    """

    mae: float
    rmse: float
    r2: float | None
    spearman: float | None
    constant_mae: float
    constant_rmse: float
    intervals: dict[str, Interval]
    images: int
    answers: Tensor
    truth: Tensor

    @property
    def figure(self) -> float:
        """What settings are chosen by: R², or 0 where a constant answer would be as good."""
        return max(0.0, self.r2 or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        kept = {name: getattr(self, name) for name in (*NAMES, "constant_mae", "constant_rmse", "images")}
        return kept | {
            f"{name}_ci95": None if limits is None else list(limits) for name, limits in self.intervals.items()
        }


def number_figures(
    answers: Tensor, truth: Tensor, constant: float, members: np.ndarray, resamples: int = RESAMPLES
) -> NumberFigures:
    """Return the figures of answers [N], or [repeats, N], against the true numbers [N]: their means over the repeats.

    Args:
        answers: in the number's unit.
        truth: likewise.
        constant: the answer that does not look at the image.
        members: the images' clusters, from `clusters`.
        resamples: how often images are drawn anew for the intervals; 0: no intervals.
    """
    said, true = answers.double().numpy(), truth.double().numpy()

    def figures(rows: np.ndarray) -> dict[str, float]:
        each = [_figures(one[rows], true[rows]) for one in np.atleast_2d(said)]
        return {name: float(np.mean([one[name] for one in each])) for name in NAMES}

    every = figures(np.arange(len(true)))
    found = {name: None if np.isnan(value) else value for name, value in every.items()}
    always = np.full(len(true), constant)
    intervals: dict[str, Interval] = {}
    if resamples and members.max() > 0:
        drawn = bootstrap(lambda rows: np.array(list(figures(rows).values())), members, resamples=resamples)
        for name, values in zip(NAMES, drawn.T, strict=True):
            there = values[~np.isnan(values)]
            low, high = np.quantile(there, (0.025, 0.975)) if len(there) else (np.nan, np.nan)
            intervals[name] = None if np.isnan(low) else (float(low), float(high))
    mae, rmse = float(every["mae"]), float(every["rmse"])
    return NumberFigures(
        mae, rmse, found["r2"], found["spearman"], float(mean_absolute_error(true, always)),
        float(root_mean_squared_error(true, always)), intervals, len(true), answers, truth,
    )  # fmt: skip


def _figures(said: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Return the figures by name, NaN for those that have no meaning."""
    varies = len(true) > 1 and bool((true != true[0]).any())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        ranks = float(spearmanr(said, true).statistic) if varies else np.nan
    return {
        "mae": float(mean_absolute_error(true, said)),
        "rmse": float(root_mean_squared_error(true, said)),
        "r2": float(r2_score(true, said)) if varies else np.nan,
        "spearman": ranks,
    }
