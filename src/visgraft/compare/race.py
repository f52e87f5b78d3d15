"""All methods at once: their searches share the time, and their best settings the folds of a cross-validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visgraft.compare.budget import SLACK, Clock, OutOfTime, Plan, Size, crossval_seconds
from visgraft.compare.result import Progress
from visgraft.compare.search import Search, Setting, Task
from visgraft.crossval import Fold, Predictions, folds, join, out_of_fold
from visgraft.data.dataset import Example
from visgraft.data.images import Images
from visgraft.errors import VisgraftError
from visgraft.resume import Epoch

Tell = Callable[[Progress], None]


@dataclass
class Race:
    """The searches of all methods, which share the time."""

    task: Task
    searches: list[Search]
    plan: Plan
    clock: Clock
    tell: Tell

    @property
    def reserve(self) -> float:
        """Seconds to keep for the cross-validation."""
        return SLACK * self.crossval_seconds(self.plan.repeats)

    def crossval_seconds(self, repeats: int) -> float:
        """Seconds of so many repeats of all methods' cross-validation."""
        size = Size(len(self.task.images), len(self.task.val), self.plan.folds)
        return sum(crossval_seconds(s.cost, s.epochs, size, self.plan.folds, repeats) for s in self.searches)

    @property
    def found(self) -> list[Search]:
        """The searches that have a best setting."""
        return [search for search in self.searches if search.best is not None]

    def search(self, trials: int | None) -> None:
        """Let the method that has had least time try its next setting, until the settings or the time run out.

        Raises:
            VisgraftError: no training ran to its end.
        """
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
        if not self.found:
            diverged = sum(search.diverged for search in self.searches)
            raise VisgraftError(
                f"no training ran to its end ({diverged} of {sum(s.trials for s in self.searches)} diverged); "
                "pass a longer --budget, or look at the images and the weights"
            )

    def _try(self, search: Search) -> None:
        first = not search.trials

        def on_epoch(epoch: Epoch, setting: Setting) -> None:
            if self.clock.left - (0 if first else self.reserve) <= 0:
                raise OutOfTime
            self.tell(self._progress("search", search, search.trials, setting, epoch))

        outcome, setting, figure = search.run(on_epoch)
        end = self._progress("search", search, search.trials, setting, None)
        self.tell(replace(end, figure=figure, outcome=outcome))

    def _progress(self, stage: str, search: Search, number: int, setting: Setting, epoch: Epoch | None) -> Progress:
        return Progress(
            stage, search.method, number, setting, 0 if epoch is None else epoch.epoch, search.epochs,
            None if epoch is None else epoch.val_figure, None if search.best is None else search.best[0],
            self.clock.left,
        )  # fmt: skip

    def cross_validate(self, examples: Sequence[Example]) -> dict[str, Predictions]:
        """Return each method's held-out answers at its best setting, repeat by repeat while there is time; {}: none."""
        if not self.plan.folds:
            return {}
        images, known = join(self.task.images, self.task.val), self.task.features
        features = torch.cat([known["train"], known["val"]]) if known else None
        parts = folds(examples, self.plan.folds, self.plan.repeats, self.task.seed)
        rows = list[dict[str, Tensor]]()
        for repeat in range(self.plan.repeats):
            if repeat and self.crossval_seconds(1) > self.clock.left:
                break
            chosen = parts[repeat * self.plan.folds : (repeat + 1) * self.plan.folds]
            try:
                rows.append({s.method: self._held_out(s, images, chosen, features) for s in self.found})
            except OutOfTime:
                break
        return {
            search.method: Predictions(torch.stack([row[search.method] for row in rows]), images.labels, images.groups)
            for search in (self.found if rows else [])
        }

    def _held_out(self, search: Search, images: Images, parts: Sequence[Fold], features: Tensor | None) -> Tensor:
        """Return the held-out answers of one repeat [N, classes]."""
        assert search.best is not None
        setting = search.best[1]
        method, config = search.configured(setting)
        number = 0

        def on_epoch(epoch: Epoch) -> None:
            nonlocal number
            if self.clock.left <= 0:
                raise OutOfTime
            self.tell(self._progress("cross-validation", search, number + 1, setting, epoch))
            number += epoch.complete and epoch.epoch == search.epochs

        known = features if search.cost.head_only else None
        return out_of_fold(self.task.bench, method, config, images, parts, on_epoch, known)[0]
