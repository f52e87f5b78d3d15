"""What a comparison found, and what it tells while it runs."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visgraft.core.configure import configure
from visgraft.data.images import Skipped
from visgraft.measure.intervals import Difference
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training.crossval import Predictions


@dataclass(frozen=True)
class Progress:
    """Where a comparison is: the `number`-th trial of a method, or fold of its cross-validation, and its epoch.

    `figure` is the validation figure so far, `best` the method's best one. `outcome` is None while it runs, then
    `finished`, `pruned`, `diverged` or `out of time`.
    """

    stage: str
    method: str
    number: int
    setting: Mapping[str, Any]
    epoch: int
    epochs: int
    figure: float | None
    best: float | None
    seconds_left: float
    outcome: str | None = None


@dataclass(frozen=True)
class MethodResult:
    """A method at its best setting; rates lie between 0 and 1.

    `figure` is top-1, mean average precision where images have several classes, or the mean of several tasks' figures
    (then `tasks` holds those of each, `task_gains` its differences from the reference, and `macro_f1` is None), on the
    images compared on;
    `interval` its 95 % interval; `search_figure` what chose the setting, on the validation images. `gain` is the
    difference from the reference on the same images, None for the reference itself. `parameters` are those trained
    beside the head; `trials` counts those that were pruned or diverged too.
    """

    method: str
    setting: Mapping[str, Any]
    epochs: int
    figure: float
    interval: tuple[float, float]
    macro_f1: float | None
    search_figure: float
    gain: Difference | None
    parameters: int
    mergeable: bool
    epoch_seconds: float
    trials: int
    pruned: int
    diverged: int
    tasks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    task_gains: Mapping[str, Difference] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        gain = None if self.gain is None else self.gain._asdict()
        values = {name: value for name, value in vars(self).items() if name not in ("tasks", "task_gains")}
        values |= {"setting": dict(self.setting), "interval": list(self.interval), "gain": gain}
        gains = {name: one._asdict() for name, one in self.task_gains.items()}
        return values | ({"tasks": dict(self.tasks), "task_gains": gains} if self.tasks else {})


@dataclass(frozen=True)
class Comparison:
    """Methods at their best settings on the same images, the one to use, and why in one sentence.

    `measured_on` is "cross-validation" or "validation"; `images` says of how many images, `folds` and `repeats` how.
    All gains are measured against the method `reference`. `guessing`: no method is shown to do better than guessing, so
    none is worth training. `warnings` name classes that no method tells apart, `notes` what the figures do not say.
    `precision` is what all was computed in. `predictions` of each method are what they were computed from.
    """

    results: tuple[MethodResult, ...]
    measure: str
    measured_on: str
    images: int
    folds: int
    repeats: int
    classes: tuple[str, ...]
    reference: str
    recommended: str
    sentence: str
    guessing: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    backbone: Mapping[str, Any]
    seed: int
    precision: str
    budget_seconds: float | None
    seconds: float
    skipped: tuple[Skipped, ...]
    predictions: Mapping[str, Predictions]

    @property
    def best(self) -> MethodResult:
        """The recommended method's row."""
        return next(result for result in self.results if result.method == self.recommended)

    def best_config(self) -> tuple[MethodConfig, TrainConfig]:
        """Return the recommended setting, with all epochs of its recipe, as `train` takes it."""
        return configure(self.recommended, {"seed": self.seed, "precision": self.precision, **self.best.setting})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the predictions."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "predictions"}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return values | lists | {
            "results": [result.to_dict() for result in self.results],
            "backbone": dict(self.backbone),
            "skipped": [{"path": str(path), "reason": reason} for path, reason in self.skipped],
        }  # fmt: skip
