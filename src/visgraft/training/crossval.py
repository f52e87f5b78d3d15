"""Repeated stratified k-fold cross-validation for small data: every image is predicted by models that never saw it."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import RepeatedStratifiedKFold, StratifiedGroupKFold
from torch import Tensor, nn

from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.core.attach import count_parameters, detach
from visgraft.core.attached import find_attached, get_attached
from visgraft.data.dataset import Dataset, Example, listed, stratum
from visgraft.data.examples import joined
from visgraft.data.images import Images, load_images
from visgraft.errors import DataError
from visgraft.measure.evaluation import Evaluation, probabilities_of, score
from visgraft.measure.intervals import bootstrap, clusters, rate_interval, spread
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
    """

    probabilities: Tensor
    labels: Tensor
    training: Training | None
    parameters: int
    head_only: bool
    attach_seconds: float
    seconds: float

    @cached_property
    def evaluation(self) -> Evaluation:
        """The figures of the answers."""
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
        answers = probabilities_of(fitted.answers["val"].logits, val.multi_label)
        seconds = time.perf_counter() - begin
        return Fit(answers, val.labels, fitted.training, parameters, head_only, fitted.attach_seconds, seconds)


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
    are divided at random. The result is in the order of repeats, and depends on the seed and the order of the images.

    Raises:
        DataError: fewer than 2 folds, or a class with fewer images, or fewer groups, than that takes.
    """
    if folds < 2 or repeats < 1:
        raise DataError(f"{folds} folds and {repeats} repeats are no cross-validation; take at least 2 folds, 1 repeat")
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


def check_folds(dataset: Dataset, number: int, repeats: int, seed: int) -> None:
    """Raise a DataError where a data set's training and validation images cannot be divided into folds."""
    folds(joined(dataset.train, dataset.val), number, repeats, seed)


def possible_folds(examples: Sequence[Example], most: int = 5) -> int:
    """Return into how many folds the images can be divided: as many as the rarest class has images or groups."""
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
    several classes; `groups` per image, empty where there are none. All figures are means over the repeats.
    """

    probabilities: Tensor
    labels: Tensor
    groups: tuple[str | None, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.labels.ndim == 2

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
        return tuple(score(probabilities, self.labels) for probabilities in self.probabilities)

    @property
    def figure(self) -> float:
        """Top-1, or mean average precision where images have several classes."""
        return float(np.mean([evaluation.figure for evaluation in self.evaluations]))

    @property
    def macro_f1(self) -> float:
        """The mean over the classes of F1."""
        return float(np.mean([evaluation.macro_f1 for evaluation in self.evaluations]))

    def precision(self, chosen: np.ndarray, of: np.ndarray | None = None) -> float:
        """Return the mean average precision on some images [any], or of the answers to others `of`; nan: no class."""
        labels = self.labels[torch.from_numpy(chosen)]
        present = labels.any(0)
        if not bool(present.any()):
            return float("nan")
        answers = self.probabilities[:, torch.from_numpy(chosen if of is None else of)][..., present].numpy()
        truth = labels[:, present].numpy()
        return float(np.mean([average_precision_score(truth, answer, average="macro") for answer in answers]))

    @cached_property
    def resampled(self) -> np.ndarray:
        """Mean average precision of resampled images [resamples], the same draws for every method."""
        return bootstrap(self.precision, self.members)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The figure's 95 % interval over the images, or over the groups where there are any."""
        if not self.multi_label:
            return rate_interval(self.right, self.members)
        half = spread(self.resampled)
        return max(0.0, self.figure - half), min(1.0, self.figure + half)


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
