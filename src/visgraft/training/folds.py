"""What a setting reaches in cross-validation, each of whose trainings is a job that may run anywhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visgraft.backbones.creation import Backbone
from visgraft.data.dataset import Dataset
from visgraft.data.examples import joined
from visgraft.data.images import Loading
from visgraft.data.read import AnySource, read_data
from visgraft.data.tasks import LabelTask
from visgraft.executors.gather import gather
from visgraft.executors.here import Here
from visgraft.executors.job import Event, Executor, Job, Note
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training import crossval
from visgraft.training.crossval import Predictions, fit_fold, kept_examples
from visgraft.training.opened import Ingredients, opened, seldom
from visgraft.training.resume import Epoch


@dataclass(frozen=True)
class CrossValidation:
    """What a setting reaches in repeated k-fold cross-validation; rates lie between 0 and 1.

    `figure` is top-1, mean average precision where images have several classes, or the mean of several tasks' figures
    (then without `macro_f1`), its mean over the repeats;
    `interval` its 95 % interval over the images (over the groups where there are any), `fold_figures` [repeats, folds]
    what each fold reached and `fold_spread` their standard deviation. `predictions` holds what it was computed from.
    """

    figure: float
    interval: tuple[float, float]
    macro_f1: float | None
    images: int
    folds: int
    repeats: int
    fold_figures: tuple[tuple[float, ...], ...]
    fold_spread: float
    seconds: float
    predictions: Predictions

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the predictions."""
        values = {name: value for name, value in vars(self).items() if name != "predictions"}
        named = {True: "mean_average_precision", False: "top1"}[self.predictions.multi_label]
        told: dict[str, Any] = {
            "measure": named,
            "interval": list(self.interval),
            "fold_figures": list(self.fold_figures),
        }
        if self.predictions.tasks:
            told |= {"measure": "mean", "tasks": self.predictions.task_figures()}
        return values | told


class _HeldOut(NamedTuple):
    """What a fold's training answered: images [held out], probabilities [held out, classes] and its figure.

    `labels`, `groups` and `tasks` are those of all images that decode.
    """

    images: np.ndarray
    probabilities: Tensor
    figure: float
    labels: Tensor
    groups: tuple[str | None, ...]
    tasks: tuple[LabelTask, ...]


@dataclass(frozen=True)
class _Folds:
    """Which folds are trained, and how."""

    what: Ingredients
    method: MethodConfig
    config: TrainConfig
    folds: int
    repeats: int
    seed: int

    def train(self, number: int, note: Note) -> _HeldOut:
        """Train without a fold's images and answer them."""
        bench, (images,) = opened(self.what)
        examples = kept_examples(self.what.parts[0], images)
        fold = crossval.folds(examples, self.folds, self.repeats, self.seed)[number]
        fit = fit_fold(bench, self.method, self.config, images, fold, seldom(note, lambda epoch: epoch.complete))
        figure = fit.evaluation.figure if fit.labels.ndim == 1 or bool(fit.labels.any()) else float("nan")
        return _HeldOut(fold[1], fit.probabilities, figure, images.labels, images.groups, images.tasks)


def cross_validate(
    data: AnySource | Dataset,
    *,
    backbone: Backbone,
    method_config: MethodConfig,
    train_config: TrainConfig,
    folds: int = 5,
    repeats: int = 2,
    seed: int = 0,
    loading: Loading = Loading(),  # noqa: B008
    executor: Executor | None = None,
    on_progress: Callable[[Epoch], None] | None = None,
    on_fold: Callable[[int, int], None] | None = None,
) -> CrossValidation:
    """Measure a setting on all training and validation images, each predicted by models that did not see it.

    Test images are never read. A process creates the backbone once. The setting should not have been chosen on these
    images.

    Args:
        data: a folder, a table, a data set, or what `read_data` made of one.
        backbone: what is adapted.
        method_config: the method's options.
        train_config: how to train.
        folds: parts, each of which is held out once per repeat.
        repeats: times that the parts are drawn anew.
        seed: of the draw.
        loading: how images are read.
        executor: where the trainings run; None: one after another in this process.
        on_progress: called with the steps and epochs of the trainings.
        on_fold: called with (trainings done, trainings in all).

    Raises:
        DataError: the data cannot be used, or a class has fewer images than there are folds.
        VisgraftError: the backbone or an option cannot be used.
    """
    start = time.perf_counter()
    dataset = data if isinstance(data, Dataset) else read_data(data)
    examples = joined(dataset.train, dataset.val)
    crossval.folds(examples, folds, repeats, seed)  # raises before anything is read
    what = Ingredients.of(dataset, "cross-validation", backbone, (examples,), loading)
    plan, total, done = _Folds(what, method_config, train_config, folds, repeats, seed), folds * repeats, 0

    def tell(event: Event) -> None:
        nonlocal done
        if event.kind == "note" and on_progress:
            on_progress(event.value)
        done += event.kind == "done"
        if event.kind == "done" and on_fold:
            on_fold(done, total)

    jobs = [Job(str(n), f"fold {n + 1} of {total}", partial(plan.train, n)) for n in range(total)]
    try:
        held_out: list[_HeldOut] = gather(executor or Here(raises=True), jobs, tell)
    finally:
        opened.cache_clear()
    return _concluded(plan, held_out, len(dataset.classes), time.perf_counter() - start)


def _concluded(plan: _Folds, held_out: list[_HeldOut], classes: int, seconds: float) -> CrossValidation:
    """Put the folds' answers together."""
    labels, groups, tasks = held_out[0].labels, held_out[0].groups, held_out[0].tasks
    answers = torch.zeros(plan.repeats, len(labels), classes)
    for number, one in enumerate(held_out):
        answers[number // plan.folds, torch.from_numpy(one.images)] = one.probabilities
    found, figures = Predictions(answers, labels, groups, tasks), [one.figure for one in held_out]
    reached = tuple(tuple(figures[start : start + plan.folds]) for start in range(0, len(figures), plan.folds))
    spread = float(np.nanstd(reached, ddof=1))
    return CrossValidation(
        found.figure, found.interval, found.macro_f1, len(labels), plan.folds, plan.repeats, reached, spread, seconds,
        found,
    )  # fmt: skip
