"""How long a comparison may take: reading a budget, what trainings cost, and how many epochs fit."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from visgraft.errors import VisgraftError
from visgraft.training.pace import duration

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
MIN_EPOCHS = 5
"""Fewer epochs say little about a setting."""
PLANNED_TRIALS = 4
"""Trials per method that the plan makes room for, the default recipe included; pruning makes room for more."""
MIN_TRIALS = 2
PRUNED_SHARE = 0.4
"""What a trial after the first costs on average: most are stopped early."""
SLACK = 1.15
"""What plans allow for an estimate that is too low."""
REPEATS = 2
DIVISIONS = ((5, REPEATS), (5, 1), (3, 1))
"""Folds and repeats of cross-validation to plan for, in order of preference."""


class OutOfTime(Exception):
    """The budget is spent; raised inside a training to end it."""


def parse_budget(text: str) -> float:
    """Return the seconds that e.g. `30m`, `2h`, `90s` or `1h30m` stands for.

    Raises:
        VisgraftError: it is written in another way, or is 0.
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    numbers = found.groups() if found else (None, None, None)
    seconds = sum(float(number) * unit for number, unit in zip(numbers, _UNITS.values(), strict=True) if number)
    if not seconds:
        raise VisgraftError(f"budget {text!r} is no length of time; write it like 30m, 2h, 90s or 1h30m")
    return seconds


class Clock:
    """Time left of a budget in seconds; without a budget there is always time."""

    def __init__(self, budget: float | None, spent: float = 0.0) -> None:
        self.start, self.budget = time.monotonic() - spent, math.inf if budget is None else budget

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds until the budget is spent; infinite without a budget."""
        return self.budget - self.spent


@dataclass(frozen=True)
class Cost:
    """Seconds per image of one method: attaching, a step of training, and a pass forward through the backbone.

    `head_only`: it trains on features that are computed once, so that an epoch needs no pass.
    """

    attach: float
    step: float
    forward: float
    head_only: bool

    def once(self, train: int, val: int) -> float:
        """What is paid before the first training only."""
        return self.forward * (train + val) if self.head_only else 0.0

    def training(self, epochs: int, train: int, val: int, *, validated: bool = True) -> float:
        """One training on `train` images, measured on `val` ones at its end, and after every epoch if `validated`."""
        measured = 1 if self.head_only or not validated else 1 + epochs
        return self.attach * train + self.step * train * epochs + self.forward * val * measured

    def scaled(self, factor: float) -> "Cost":
        """The costs where everything takes `factor` times as long."""
        return replace(self, attach=self.attach * factor, step=self.step * factor, forward=self.forward * factor)


class Size(NamedTuple):
    """Numbers of training and validation images, and of folds that can be made of both; 0: no cross-validation."""

    train: int
    val: int
    folds: int


class Plan(NamedTuple):
    """Epochs of each method's trainings, and the folds and repeats at the end; 0 folds: no cross-validation."""

    epochs: Mapping[str, int]
    folds: int
    repeats: int


def crossval_seconds(cost: Cost, epochs: int, size: Size, folds: int, repeats: int) -> float:
    """Seconds of a method's repeated k-fold cross-validation; 0 without folds."""
    if not folds:
        return 0.0
    everything = size.train + size.val
    held_out = everything // folds
    return repeats * folds * cost.training(epochs, everything - held_out, held_out, validated=False)


def make_plan(costs: Mapping[str, Cost], recipes: Mapping[str, int], size: Size, seconds: float, budget: float) -> Plan:
    """Return the longest trainings with which a few trials of every method, and the cross-validation, fit in `seconds`.

    All methods keep the same share of their recipe's epochs; those that train a head on computed features keep all.
    Rather than halving the epochs, cross-validation gets fewer repeats, then fewer folds.

    Args:
        costs: of each method.
        recipes: epochs of each method's recipe.
        size: of the data.
        seconds: the time left.
        budget: all of the time, to say how much would be needed.

    Raises:
        VisgraftError: not even the shortest plan fits; the message says what budget would do.
    """
    longest = max(recipes.values())
    divisions = [(min(folds, size.folds), repeats) for folds, repeats in DIVISIONS] if size.folds else [(0, 0)]

    def shortened(epochs: int) -> dict[str, int]:
        share = epochs / longest
        return {
            name: full if costs[name].head_only else min(full, max(MIN_EPOCHS, round(full * share)))
            for name, full in recipes.items()
        }

    def needed(epochs: Mapping[str, int], trials: int, folds: int, repeats: int) -> float:
        return SLACK * sum(
            cost.once(size.train, size.val)
            + (1 + PRUNED_SHARE * (trials - 1)) * cost.training(epochs[name], size.train, size.val)
            + crossval_seconds(cost, epochs[name], size, folds, repeats)
            for name, cost in costs.items()
        )

    for folds, repeats in divisions:
        for epochs in range(longest, (longest + 1) // 2, -1):
            if needed(shortened(epochs), PLANNED_TRIALS, folds, repeats) <= seconds:
                return Plan(shortened(epochs), folds, repeats)
    folds, repeats = divisions[-1]
    for trials in range(PLANNED_TRIALS, MIN_TRIALS - 1, -1):
        for epochs in range(longest, 0, -1):
            if needed(shortened(epochs), trials, folds, repeats) <= seconds:
                return Plan(shortened(epochs), folds, repeats)
    least = needed(shortened(1), MIN_TRIALS, folds, repeats) + budget - seconds
    raise VisgraftError(
        f"a budget of {duration(budget)} is too short: {MIN_TRIALS} trainings of {MIN_EPOCHS} epochs per method "
        f"{f'and {folds}-fold cross-validation ' if folds else ''}take about {duration(least)} here; pass --budget "
        f"{duration(1.1 * least)}, a smaller --image-size, or fewer --methods"
    )


def full_plan(recipes: Mapping[str, int], folds: int, epochs: int | None, head_only: Sequence[str]) -> Plan:
    """Return the plan without a budget: the recipes' epochs, or `epochs` where more than a head trains."""
    chosen = {name: full if epochs is None or name in head_only else epochs for name, full in recipes.items()}
    return Plan(chosen, *((min(DIVISIONS[0][0], folds), DIVISIONS[0][1]) if folds else (0, 0)))
