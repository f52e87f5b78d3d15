"""Repeated stratified k-fold cross-validation for small data: every image is predicted by models that never saw it."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedGroupKFold
from torch import Tensor, nn

from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.core.attach import count_parameters, detach
from visgraft.core.attached import find_attached, get_attached
from visgraft.data.dataset import Dataset, Example, listed, stratum
from visgraft.data.examples import Coded, joined, labels_of, names_of, tasks_of
from visgraft.data.images import Images, load_images
from visgraft.data.shared_images import with_shared
from visgraft.data.stratify import label_marks, marked_folds
from visgraft.data.task_tensors import known
from visgraft.data.tasks import LabelTask, column_slices, output_slices
from visgraft.errors import DataError
from visgraft.measure.by_task import figures_on, mean_known, mean_precision
from visgraft.measure.evaluation import Evaluation, answers_of, score, score_tasks
from visgraft.measure.intervals import bootstrap, clusters, rate_interval, spread
from visgraft.measure.measuring import task_figures
from visgraft.measure.numbers import number_figures
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training.fit import fit
from visgraft.training.loop import Training
from visgraft.training.objective import Features
from visgraft.training.resume import Epoch

Fold = tuple[np.ndarray, np.ndarray]
"""Indices of the images to train on and of those held out, both int64 [count]."""


@dataclass(frozen=True)
class Fit:
    """One training: what it answered on its validation images, and what it cost.

    `probabilities` float32 [N, classes]; `training` is None where it diverged and its last good state was measured.
    With several tasks, labels and answers are as `Evaluation` has them.
    """

    probabilities: Tensor
    labels: Tensor
    training: Training | None
    parameters: int
    head_only: bool
    attach_seconds: float
    seconds: float
    tasks: tuple[LabelTask, ...] = ()

    @cached_property
    def evaluation(self) -> Evaluation:
        """The figures of the answers, those of numbers without intervals."""
        if self.tasks:
            return score_tasks(self.probabilities, self.labels, self.tasks, resamples=0)
        return score(self.probabilities, self.labels)


@dataclass
class Bench:
    """A backbone, created once, on which methods are trained one after another; each is taken off again.

    `detach` gives the head's start back too, so that no training sees another's.
    """

    backbone: Backbone
    classes: int
    _models: dict[float, nn.Module] = field(default_factory=dict)

    def model(self, drop_path: float = 0.0) -> nn.Module:
        """Return the backbone; where a recipe wants stochastic depth, a second one that was created with it."""
        if drop_path not in self._models:
            self._models[drop_path] = create_backbone(self.backbone, self.classes, drop_path)
        return self._models[drop_path]

    def load(self, examples: Sequence[Example], **options: Any) -> Images:
        """Decode images as this backbone wants them; `options` are further ones of `load_images`."""
        return load_images(examples, model_data_config(self.model()), outputs=self.classes, **options)

    def fit(
        self,
        method: MethodConfig,
        config: TrainConfig,
        images: Images,
        val: Images,
        *,
        on_progress: Callable[[Epoch], None] | None = None,
        features: Features | None = None,
        keep_last_good: bool = False,
        validate: bool = True,
    ) -> Fit:
        """Attach, train, measure on `val`, and take the method off, whatever happens.

        With `keep_last_good`, a training that diverges is measured in its last good state; `validate=False` spares the
        measuring after every epoch.

        Raises:
            TrainingDiverged: the loss stopped being finite, and `keep_last_good` is not set.
        """
        begin, model = time.perf_counter(), self.model(config.drop_path)
        try:
            fitted = fit(
                model, method, config, images, val if validate else None, measured={"val": lambda: val},
                keep_last_good=keep_last_good, on_progress=on_progress, features=features,
            )  # fmt: skip
            attached = get_attached(model)
            head_only = not (attached.where or attached.unfrozen)
            parameters = count_parameters(model).adapter
        finally:
            if find_attached(model):
                detach(model)
        answers = answers_of(fitted.answers["val"].logits, val.tasks, val.multi_label)
        seconds = time.perf_counter() - begin
        costs = (fitted.training, parameters, head_only, fitted.attach_seconds, seconds)
        return Fit(answers, val.labels, *costs, val.tasks)


def select(images: Images, indices: np.ndarray) -> Images:
    """Return some of the images, in the order of `indices` [count], in memory."""
    chosen = torch.from_numpy(np.asarray(indices))
    groups = images.groups or (None,) * len(images)
    return replace(
        images,
        pixels=images.pixels[chosen],
        labels=images.labels[chosen],
        paths=tuple(images.paths[i] for i in indices) if images.paths else (),
        groups=tuple(groups[i] for i in indices),
        skipped=(),
    )


def join(first: Images, second: Images) -> Images:
    """Return the images of both, in memory."""
    return replace(
        first,
        pixels=torch.cat([first.pixels[:], second.pixels[:]]),
        labels=torch.cat([first.labels, second.labels]),
        paths=(*first.paths, *second.paths),
        groups=first.groups + second.groups,
        skipped=first.skipped + second.skipped,
    )


def kept_examples(examples: Sequence[Example], images: Images) -> list[Example]:
    """Return the examples whose images were not skipped."""
    broken = {skipped.path for skipped in images.skipped}
    return [example for example in examples if example.path not in broken]


def folds(examples: Sequence[Example], folds: int = 5, repeats: int = 2, seed: int = 0) -> list[Fold]:
    """Divide the images into `folds` parts, `repeats` times; each part is held out once per repeat.

    Classes keep their shares in every part, and images of one group stay together. Images with any number of classes
    are divided at random; with several tasks, each class and each fifth of a number keeps its share (iterative
    stratification). The result is in the order of repeats, and depends on the seed and the order of the images.

    Raises:
        DataError: fewer than 2 folds, or a class with fewer images, or fewer groups, than that takes.
    """
    if folds < 2 or repeats < 1:
        raise DataError(f"{folds} folds and {repeats} repeats are no cross-validation; take at least 2 folds, 1 repeat")
    if tasks_of(examples):
        return _task_folds(examples, folds, repeats, seed)
    strata = [stratum(example.label) for example in examples]
    small = {label: count for label, count in Counter(strata).items() if count < folds}
    if small:
        names = listed(f"{_class_name(examples, label)} ({count})" for label, count in small.items())
        raise DataError(
            f"{folds} folds need {folds} images of each class, but some have fewer: {names}; take fewer folds"
        )
    labels, everything = np.array(strata), np.zeros(len(strata))
    if all(example.group is None for example in examples):
        cutter = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed)
        return list(cutter.split(everything, labels))
    if possible_folds(examples, folds) < folds:
        raise DataError(f"{folds} folds need {folds} groups of each class; take fewer folds, or add groups")
    members = clusters([example.group for example in examples], len(examples))
    return [
        fold
        for repeat in range(repeats)
        for fold in StratifiedGroupKFold(folds, shuffle=True, random_state=seed + repeat).split(
            everything, labels, members
        )
    ]


def _task_folds(examples: Sequence[Example], folds: int, repeats: int, seed: int) -> list[Fold]:
    """Divide images with labels for several tasks, which `folds` explains."""
    tasks, members = tasks_of(examples), _task_members(examples)
    small = [
        f"{name} ({count})" for name, count in _holders(labels_of(examples), tasks, members).items() if count < folds
    ]
    if small:
        what = "images" if len(examples) == members.max() + 1 else "groups"
        raise DataError(
            f"{folds} folds need {folds} {what} with a label of each task, and of each class of those with one class, "
            f"but some have fewer: {listed(small)}; take fewer folds"
        )
    return marked_folds(label_marks(labels_of(examples)), members, folds, repeats, seed)


def _task_members(examples: Sequence[Example]) -> np.ndarray:
    """Return the cluster of each image, int64 [N]; an image that two tasks have from places of their own is one."""
    return with_shared(clusters([example.group for example in examples], len(examples)), names_of(examples))


def _holders(labels: Coded, tasks: Sequence[LabelTask], members: np.ndarray) -> dict[str, int]:
    """Return in how many clusters each task has a label, and each class of the tasks that ask for one."""
    inside: dict[str, set[int]] = {}
    for place, task in enumerate(tasks):
        names = task.output_names if task.kind == "one_class" else (task.name,)
        inside |= {name: set() for name in names}
        for code, member in zip(labels.codes.tolist(), members.tolist(), strict=True):
            value = labels.values[code].values[place]
            if value is not None:
                inside[names[value] if task.kind == "one_class" else task.name].add(member)
    return {name: len(found) for name, found in inside.items()}


def check_folds(dataset: Dataset, number: int, repeats: int, seed: int) -> None:
    """Raise a DataError where a data set's training and validation images cannot be divided into folds."""
    folds(joined(dataset.train, dataset.val), number, repeats, seed)


def possible_folds(examples: Sequence[Example], most: int = 5) -> int:
    """Return into how many folds the images can be divided: as many as the rarest class has images or groups."""
    if tasks_of(examples):
        return min(most, *_holders(labels_of(examples), tasks_of(examples), _task_members(examples)).values())
    members = clusters([example.group for example in examples], len(examples))
    found: dict[int, set[int]] = defaultdict(set)
    for example, member in zip(examples, members.tolist(), strict=True):
        found[stratum(example.label)].add(member)
    return min(most, *(len(inside) for inside in found.values()))


def _class_name(examples: Sequence[Example], label: int) -> str:
    """Name a class by the folder of its images, the only name that examples know."""
    first = next(example for example in examples if stratum(example.label) == label)
    return first.path.parent.name or f"class {label}"


@dataclass(frozen=True)
class Predictions:
    """What models said of images that they had not seen, once per repeat.

    `probabilities` float32 [repeats, N, classes]; `labels` int64 [N], or float32 [N, classes] where an image may have
    several classes; `groups` per image, empty where there are none. With several `tasks`, answers
    [repeats, N, outputs] and labels [N, columns] are as `Evaluation` has them. All figures are means over the repeats.
    """

    probabilities: Tensor
    labels: Tensor
    groups: tuple[str | None, ...] = ()
    tasks: tuple[LabelTask, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.labels.ndim == 2 and not self.tasks

    @cached_property
    def members(self) -> np.ndarray:
        """The cluster of each image, int64 [N]."""
        return clusters(self.groups, len(self.labels))

    @cached_property
    def right(self) -> np.ndarray:
        """The share of the repeats in which each image was answered right, float64 [N]."""
        return np.asarray((self.probabilities.argmax(-1) == self.labels).double().mean(0).numpy())

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The figures of each repeat."""
        if self.tasks:
            return tuple(score_tasks(one, self.labels, self.tasks, resamples=0) for one in self.probabilities)
        return tuple(score(probabilities, self.labels) for probabilities in self.probabilities)

    @cached_property
    def by_task(self) -> "dict[str, Predictions]":
        """The answers of each task alone, on the images that have its label; a number's keep that task."""
        found = {}
        for task, outputs, columns in zip(
            self.tasks, output_slices(self.tasks), column_slices(self.tasks), strict=True
        ):
            if task.name in self.evaluations[0].by_task:
                there, own = known(self.labels, task, columns)
                groups = tuple(self.groups[i] for i in torch.nonzero(there).flatten()) if self.groups else ()
                number = task.kind == "number"
                answers, only = self.probabilities[:, there][..., outputs], (task,) if number else ()
                found[task.name] = Predictions(answers, own[:, None] if number else own, groups, only)
        return found

    @property
    def figure(self) -> float:
        """Top-1, mean average precision where images have several classes, or the mean of several tasks' figures."""
        return float(np.mean([evaluation.figure for evaluation in self.evaluations]))

    @property
    def macro_f1(self) -> float | None:
        """The mean over the classes of F1; None with several tasks."""
        found = [evaluation.macro_f1 for evaluation in self.evaluations if evaluation.macro_f1 is not None]
        return float(np.mean(found)) if found else None

    def precision(self, chosen: np.ndarray, of: np.ndarray | None = None) -> float:
        """Return the mean average precision on some images [any], or of the answers to others `of`; nan: no class."""
        answers = self.probabilities[:, torch.from_numpy(chosen if of is None else of)]
        return mean_precision(answers.numpy(), self.labels[torch.from_numpy(chosen)].numpy())

    @cached_property
    def resampled(self) -> np.ndarray:
        """The figure, where it is no top-1, of resampled images [resamples], the same draws for every method."""
        if not self.tasks:
            return bootstrap(self.precision, self.members)
        return mean_known(bootstrap(figures_on(self.probabilities, self.labels, self.tasks), self.members))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The figure's 95 % interval over the images, or over the groups where there are any."""
        if self.labels.ndim == 1:
            return rate_interval(self.right, self.members)
        half = spread(self.resampled)
        return max(0.0, self.figure - half), min(1.0, self.figure + half)

    def task_figures(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each task, with 95 % intervals, as plain JSON values."""
        return {name: one._figures() for name, one in self.by_task.items()}

    def _figures(self) -> dict[str, Any]:
        """Return the figures of a single task."""
        if self.tasks:
            answers, truth = self.probabilities[..., 0], self.labels[:, 0]
            return task_figures(number_figures(answers, truth, self.tasks[0].mean, self.members))
        name = "mean_average_precision" if self.multi_label else "top1"
        return {
            name: self.figure,
            f"{name}_ci95": list(self.interval),
            "macro_f1": self.macro_f1,
            "images": len(self.labels),
        }


def fit_fold(
    bench: Bench,
    method: MethodConfig,
    config: TrainConfig,
    images: Images,
    fold: Fold,
    on_progress: Callable[[Epoch], None] | None = None,
    features: Tensor | None = None,
) -> Fit:
    """Train without a fold's held-out images, and answer those; a training that diverges does in its last good state.

    `features` [N, width] are the frozen backbone's of all images, where they are known and only a head trains.
    """
    learned, held_out = (torch.from_numpy(indices) for indices in fold)
    return bench.fit(
        method, config, select(images, fold[0]), select(images, fold[1]),
        features=None if features is None else {"train": features[learned], "val": features[held_out]},
        on_progress=on_progress, keep_last_good=True, validate=False,
    )  # fmt: skip
