"""A comparison whose trainings run elsewhere: each method's search is a job, and so is each fold of each method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from visgraft.data.images import Images
from visgraft.executors.gather import gather
from visgraft.executors.job import Event, Executor, Job, Note
from visgraft.options import MethodConfig, TrainConfig
from visgraft.search.budget import Clock, Cost, OutOfTime, Plan
from visgraft.search.pilot import measure_cost
from visgraft.search.race import Race
from visgraft.search.settings import Search, Searched, TuningTask
from visgraft.training.crossval import Fold, fit_fold, join
from visgraft.training.objective import Features
from visgraft.training.opened import Ingredients, opened, seldom
from visgraft.training.resume import Epoch


@dataclass(frozen=True)
class Elsewhere:
    """What every job of a comparison needs: the ingredients with training and validation images, seed and precision."""

    what: Ingredients
    seed: int
    precision: str

    def task(self) -> TuningTask:
        """Return what methods are tried on, opened in this process."""
        bench, (images, val) = opened(self.what)
        return TuningTask(bench, images, val, self.seed, self.precision)

    def cost(self, method: str, note: Note) -> Cost:
        """Measure what a method's training costs."""
        return measure_cost(self.task(), method)


class _Given(NamedTuple):
    """A search to be done: of which method, with which costs and epochs, and at most how many trials and seconds."""

    method: str
    cost: Cost
    epochs: int
    trials: int | None
    seconds: float
    keep_features: bool


def _clock(seconds: float) -> Clock:
    return Clock(None if math.isinf(seconds) else seconds)


def _search(where: Elsewhere, given: _Given, note: Note) -> tuple[Searched, Features]:
    """Search a method's best setting; also return the features, where a head trains on them and they are wanted."""
    task, tell = where.task(), seldom(note, lambda progress: progress.outcome is not None)
    search = Search(given.method, task, given.cost, given.epochs)
    Race(task, [search], Plan({}, 0, 0), _clock(given.seconds), tell).try_all(given.trials)
    return search.found, task.features if given.keep_features else {}


def _hold_out(
    where: Elsewhere,
    method: MethodConfig,
    config: TrainConfig,
    fold: Fold,
    features: Tensor | None,
    seconds: float,
    note: Note,
) -> Tensor | None:
    """Return the answers to the images that a fold holds out; None where the time does not suffice."""
    task, clock, tell = where.task(), _clock(seconds), seldom(note, lambda epoch: epoch.complete)

    def on_epoch(epoch: Epoch) -> None:
        if clock.left <= 0:
            raise OutOfTime
        tell(epoch)

    try:
        return fit_fold(task.bench, method, config, join(task.images, task.val), fold, on_epoch, features).probabilities
    except OutOfTime:
        return None


def measure_costs(where: Elsewhere, methods: Sequence[str], executor: Executor) -> dict[str, Cost]:
    """Return what a training of each method costs where trainings run.

    Raises:
        VisgraftError: one cannot be trained.
    """
    jobs = [Job(method, method, partial(where.cost, method)) for method in methods]
    return dict(zip(methods, gather(executor, jobs), strict=True))


@dataclass
class SpreadRace(Race):
    """The searches of all methods side by side, wherever there is room.

    Each method has the time that is left, divided by how many have to wait for their turn; a fold that is lost with its
    machine, or not done in time, is none.
    """

    where: Elsewhere = field(kw_only=True)
    executor: Executor = field(kw_only=True)

    def crossval_seconds(self, repeats: int) -> float:
        """Seconds of so many repeats of all methods' cross-validation."""
        jobs = self.plan.folds * len(self.searches)
        return super().crossval_seconds(repeats) / max(min(self.executor.places, jobs), 1)

    def try_all(self, trials: int | None) -> None:
        """Search every method's settings, each in one job."""
        rounds = math.ceil(len(self.searches) / self.executor.places)
        share = (self.clock.left - self.reserve) / rounds

        def job(search: Search) -> Job:
            given = _Given(search.method, search.cost, search.epochs, trials, share, bool(self.plan.folds))
            return Job(search.method, search.method, partial(_search, self.where, given))

        def tell(event: Event) -> None:
            if event.kind == "note":
                self.tell(replace(event.value, seconds_left=self.clock.left))

        done = gather(self.executor, [*map(job, self.searches)], tell)
        for search, (found, features) in zip(self.searches, done, strict=True):
            search.take(found)
            self.task.features.update(features)

    def hold_out(self, images: Images, parts: Sequence[Fold], numbers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Return every method's answers to the images that some folds hold out, of the folds done in time."""
        wanted = {f"{number} {search.method}": (number, search) for number in numbers for search in self.found}
        rounds = math.ceil(len(wanted) / self.executor.places)
        share, kept = self.clock.left / rounds, self.task.features
        features = torch.cat([kept["train"], kept["val"]]) if kept else None

        def job(key: str) -> Job:
            number, search = wanted[key]
            assert search.best is not None
            known = features if search.cost.head_only else None
            setting = search.configured(search.best[1])
            work = partial(_hold_out, self.where, *setting, parts[number], known, share)
            return Job(key, f"{search.method}, fold {number + 1}", work)

        def tell(event: Event) -> None:
            number, search = wanted[event.key]
            if event.kind == "note" and search.best:
                self.tell(self.progress("cross-validation", search, number + 1, search.best[1], event.value))

        answers = dict(zip(wanted, gather(self.executor, [*map(job, wanted)], tell), strict=True))
        by_fold = {number: {s.method: answers[f"{number} {s.method}"] for s in self.found} for number in numbers}
        return {number: found for number, found in by_fold.items() if all(one is not None for one in found.values())}
