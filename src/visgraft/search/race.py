"""All methods at once: their searches share the time, and their best settings the folds of a cross-validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from visgraft.data.dataset import Example
from visgraft.data.images import Images
from visgraft.errors import VisgraftError
from visgraft.search.budget import REPEATS, SLACK, Clock, OutOfTime, Plan, Size, crossval_seconds
from visgraft.search.result import Progress
from visgraft.search.settings import Search, Setting, TuningTask
from visgraft.training.crossval import Fold, Predictions, fit_fold, folds, join, select
from visgraft.training.resume import Epoch

TellProgress = Callable[[Progress], None]


@dataclass
class Race:
    """The searches of all methods, which share the time."""

    task: TuningTask
    searches: list[Search]
    plan: Plan
    clock: Clock
    tell: TellProgress

    kept: tuple[str, ...] | None = None
    """The methods that go on after the searches; None: all that have a best setting."""

    def keep(self, count: int) -> None:
        """Let only the `count` methods go on that are best on the validation images."""
        self.kept = None
        ranked = sorted(self.found, key=lambda search: search.best[0] if search.best else 0.0, reverse=True)
        self.kept = tuple(search.method for search in ranked[:count])

    @property
    def reserve(self) -> float:
        """Seconds to keep for the cross-validation."""
        return SLACK * self.crossval_seconds(self.plan.repeats)

    def crossval_seconds(self, repeats: int) -> float:
        """Seconds of so many repeats of all methods' cross-validation."""
        size = Size(len(self.task.images), len(self.task.val), self.plan.folds)
        going = [s for s in self.searches if self.kept is None or s.method in self.kept]
        return sum(crossval_seconds(s.cost, s.epochs, size, self.plan.folds, repeats) for s in going)

    @property
    def found(self) -> list[Search]:
        """The searches that have a best setting, and go on."""
        going = [search for search in self.searches if self.kept is None or search.method in self.kept]
        return [search for search in going if search.best is not None]

    def search(self, trials: int | None) -> None:
        """Try the settings of all methods.

        Raises:
            VisgraftError: no training ran to its end.
        """
        self.try_all(trials)
        if not self.found:
            diverged = sum(search.diverged for search in self.searches)
            raise VisgraftError(
                f"no training ran to its end ({diverged} of {sum(s.trials for s in self.searches)} diverged); "
                "pass a longer --budget, or look at the images and the weights"
            )

    def try_all(self, trials: int | None) -> None:
        """Let the method that has had least time try its next setting, until the settings or the time run out."""
        while True:
            left = self.clock.left - self.reserve
            ready = [
                search
                for search in self.searches
                if search.untried
                and (trials is None or search.trials < trials)
                and (search.seconds < left if search.trials else self.clock.left > 0)
            ]
            if not ready:
                break
            self._try(min(ready, key=lambda search: search.spent))

    def _try(self, search: Search) -> None:
        first = not search.trials

        def on_epoch(epoch: Epoch, setting: Setting) -> None:
            if self.clock.left - (0 if first else self.reserve) <= 0:
                raise OutOfTime
            self.tell(self.progress("search", search, search.trials, setting, epoch))

        outcome, setting, figure = search.run(on_epoch)
        end = self.progress("search", search, search.trials, setting, None)
        self.tell(replace(end, figure=figure, outcome=outcome))

    def progress(self, stage: str, search: Search, number: int, setting: Setting, epoch: Epoch | None) -> Progress:
        """Say where a method's training is."""
        return Progress(
            stage, search.method, number, setting, 0 if epoch is None else epoch.epoch, search.epochs,
            None if epoch is None else epoch.val_figure, None if search.best is None else search.best[0],
            self.clock.left,
        )  # fmt: skip

    def cross_validate(self, examples: Sequence[Example]) -> dict[str, Predictions]:
        """Return each method's held-out answers at its best setting, fold by fold while there is time.

        A second repeat is made where it fits, planned or not. One that is not done in time is left out; where that is
        the first, the images held out so far are taken, if they are more than the validation images. {}: none.
        """
        if not self.plan.folds:
            return {}
        images = join(self.task.images, self.task.val)
        parts, done = folds(examples, self.plan.folds, REPEATS, self.task.seed), list[int]()
        answers = {s.method: torch.zeros(REPEATS, len(images), self.task.bench.classes) for s in self.found}
        for repeat in range(REPEATS):
            if repeat and self.crossval_seconds(1) > self.clock.left:
                break
            numbers = range(repeat * self.plan.folds, (repeat + 1) * self.plan.folds)
            for number, found in self.hold_out(images, parts, numbers).items():
                for method, probabilities in found.items():
                    answers[method][repeat, torch.from_numpy(parts[number][1])] = probabilities
                done.append(number)
            if len(done) < numbers.stop:
                break
        repeats = len(done) // self.plan.folds
        seen = np.sort(np.concatenate([parts[number][1] for number in done])) if done and not repeats else None
        if not repeats and (seen is None or len(seen) <= len(self.task.val)):
            return {}
        chosen = images if seen is None else select(images, seen)
        rows = slice(None) if seen is None else torch.from_numpy(seen)
        return {
            method: Predictions(given[: max(repeats, 1), rows], chosen.labels, chosen.groups, chosen.tasks)
            for method, given in answers.items()
        }

    def hold_out(self, images: Images, parts: Sequence[Fold], numbers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Return every method's answers to the images that some folds hold out, of the folds done in time."""
        known, answered = self.task.features, dict[int, dict[str, Tensor]]()
        features = torch.cat([known["train"], known["val"]]) if known else None
        for number in numbers:
            try:
                answered[number] = {
                    search.method: self._held_out(search, images, parts[number], number + 1, features)
                    for search in self.found
                }
            except OutOfTime:
                break
        return answered

    def _held_out(self, search: Search, images: Images, fold: Fold, number: int, features: Tensor | None) -> Tensor:
        """Return a method's answers to a fold's held-out images [held out, classes]."""
        assert search.best is not None
        setting = search.best[1]

        def on_epoch(epoch: Epoch) -> None:
            if self.clock.left <= 0:
                raise OutOfTime
            self.tell(self.progress("cross-validation", search, number, setting, epoch))

        known = features if search.cost.head_only else None
        return fit_fold(self.task.bench, *search.configured(setting), images, fold, on_epoch, known).probabilities
