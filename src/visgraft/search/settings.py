"""The search for one method's best setting on the validation images: successive halving, from the default recipe on."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from visgraft.core.configure import configure, default_setting, search_space
from visgraft.data.images import Images
from visgraft.errors import TrainingDiverged
from visgraft.options import MethodConfig, TrainConfig
from visgraft.search.budget import Cost, OutOfTime
from visgraft.training.crossval import Bench, Fit
from visgraft.training.objective import Features
from visgraft.training.resume import Epoch

if TYPE_CHECKING:  # imported where a search begins, because what else this package has needs no optuna
    import optuna

REDUCTION = 3
"""Of the trainings that get as far as a rung, one in so many goes on."""
RANDOM_TRIALS = 4
"""Trials drawn at random before the sampler learns from them."""

Setting = Mapping[str, Any]


@dataclass(frozen=True)
class TuningTask:
    """What all methods are tried on: the backbone and the images, and the features that heads alone train on."""

    bench: Bench
    images: Images
    val: Images
    seed: int
    precision: str
    features: Features = field(default_factory=dict)


class Searched(NamedTuple):
    """What a search has come to; see `Search`."""

    spent: float
    trials: int
    pruned: int
    diverged: int
    best: tuple[float, Setting, Fit] | None
    cost: Cost


@dataclass
class Search:
    """The trials of one method so far; `spent` is their time in seconds, `best` the best that ran to its end."""

    method: str
    task: TuningTask
    cost: Cost
    epochs: int
    spent: float = 0.0
    trials: int = 0
    pruned: int = 0
    diverged: int = 0
    best: tuple[float, Setting, Fit] | None = None

    def __post_init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = search_space(self.method)
        self.untried = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        self.study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=self.task.seed, n_startup_trials=RANDOM_TRIALS),
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=max(1, self.epochs // 4), reduction_factor=REDUCTION
            ),
        )
        self.generator = np.random.default_rng(self.task.seed)
        self.study.enqueue_trial(default_setting(self.method))

    @property
    def found(self) -> Searched:
        """What it has come to."""
        return Searched(self.spent, self.trials, self.pruned, self.diverged, self.best, self.cost)

    def take(self, found: Searched) -> None:
        """Be as a search that was done elsewhere."""
        self.spent, self.trials, self.pruned, self.diverged, self.best, self.cost = found

    @property
    def seconds(self) -> float:
        """What a further trial takes if nothing ends it early."""
        return self.cost.training(self.epochs, len(self.task.images), len(self.task.val))

    @property
    def epoch_seconds(self) -> float:
        """What an epoch takes, with the measuring after it."""
        size = len(self.task.images), len(self.task.val)
        return self.cost.training(2, *size) - self.cost.training(1, *size)

    def _ask(self) -> "optuna.Trial":
        """Return a trial with a setting that was not tried yet: training is reproducible, so a second says nothing."""
        from optuna.trial import TrialState

        space = search_space(self.method)
        while True:
            trial = self.study.ask()
            setting = {name: trial.suggest_categorical(name, values) for name, values in space.items()}
            if setting in self.untried:
                self.untried.remove(setting)
                return trial
            self.study.tell(trial, state=TrialState.FAIL)
            self.study.enqueue_trial(self.untried[self.generator.integers(len(self.untried))])

    def configured(self, setting: Setting) -> tuple[MethodConfig, TrainConfig]:
        """Return a setting as options, with this search's epochs, seed and precision."""
        fixed = {"seed": self.task.seed, "precision": self.task.precision}
        return configure(self.method, {"epochs": self.epochs, **fixed, **setting})

    def run(self, on_epoch: Callable[[Epoch, Setting], None]) -> tuple[str, Setting, float | None]:
        """Train one more setting and return how it ended, the setting, and its figure where it ran to its end.

        `on_epoch` gets every step; it may raise OutOfTime.
        """
        from optuna import TrialPruned
        from optuna.trial import TrialState

        trial, begin = self._ask(), time.monotonic()
        setting, last = dict(trial.params), None
        self.trials += 1

        def report(epoch: Epoch) -> None:
            nonlocal last
            on_epoch(epoch, setting)
            if epoch.complete:
                last = epoch.val_figure
                trial.report(last, epoch.epoch)
                if epoch.epoch < self.epochs and trial.should_prune():
                    raise TrialPruned

        try:
            fit = self.task.bench.fit(
                *self.configured(setting), self.task.images, self.task.val,
                on_progress=report, features=self.task.features if self.cost.head_only else None,
            )  # fmt: skip
        except (TrialPruned, TrainingDiverged, OutOfTime) as error:
            outcome = {TrialPruned: "pruned", TrainingDiverged: "diverged"}.get(type(error), "out of time")
            self.pruned += outcome == "pruned"
            self.diverged += outcome == "diverged"
            self.study.tell(trial, state=TrialState.PRUNED if outcome == "pruned" else TrialState.FAIL)
        else:
            outcome, last = "finished", fit.evaluation.figure
            self._keep(trial, fit)
        self.spent += time.monotonic() - begin
        return outcome, setting, last

    def _keep(self, trial: "optuna.Trial", fit: Fit) -> None:
        figure = fit.evaluation.figure
        self.study.tell(trial, figure)
        if self.best is None or figure > self.best[0]:
            self.best = (figure, dict(trial.params), fit)
        if self.trials > 1 or not self.cost.head_only:  # the first training of a head computes the features too
            self.cost = self.cost.scaled(fit.seconds / self.seconds)
