"""Attach, train, measure: the one way from a plain model to a trained one, for a verb as for a fold or a trial."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.core.attach import attach, strip
from visgraft.core.configure import configure
from visgraft.data.images import Images
from visgraft.data.tasks import LabelTask
from visgraft.errors import TrainingDiverged, VisgraftError
from visgraft.measure.evaluation import logits_of
from visgraft.measure.precision import make_compute
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training.loop import Training, train


class Answers(NamedTuple):
    """What a model answers on labelled images: logits float32 [N, outputs] and labels, and the seconds that it took.

    `groups` and `tasks` are those of the images.
    """

    logits: Tensor
    labels: Tensor
    seconds: float
    groups: tuple[str | None, ...] = ()
    tasks: tuple[LabelTask, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """One training. `training` is None where it diverged and the model holds its last good state.

    `seconds` are those of attaching and training, `attach_seconds` those of attaching alone; `answers` are those on the
    sets of images to be measured, by name.
    """

    training: Training | None
    attach_seconds: float
    seconds: float
    answers: dict[str, Answers]


def fit(
    model: nn.Module,
    method: MethodConfig,
    config: TrainConfig,
    images: Images,
    val: Images | None = None,
    *,
    start: Callable[[], Any] | None = None,
    measured: Mapping[str, Callable[[], Images]] | None = None,
    keep_last_good: bool = False,
    **told: Any,
) -> Fitted:
    """Attach a method to a plain model, train it, and answer sets of images.

    Args:
        model: the plain model, in place.
        method: the method's options.
        config: how to train; chance in attaching depends on its seed alone.
        images: the training images.
        val: validation images, measured after every epoch.
        start: attaches in place of `attach`, e.g. from an earlier adapter.
        measured: the sets to answer, each loaded when its turn comes.
        keep_last_good: go on with the last good state of a training that diverges.
        told: further arguments of `train`.

    Raises:
        TrainingDiverged: the loss stopped being finite, and `keep_last_good` is not set.
    """
    begin, training = time.perf_counter(), None
    method = method.for_tasks(tuple(task.outputs for task in images.tasks))
    if config.head_first and not told.get("resume"):
        train_head(model, images, method, config)
    torch.manual_seed(config.seed)  # afterwards, so that the method starts as without
    if start is None:
        attach(model, method, images.batches())
    else:
        start()
    attaching = time.perf_counter() - begin
    try:
        training = train(model, images, config, val, **told)
    except TrainingDiverged:
        if not keep_last_good:
            raise
    seconds = time.perf_counter() - begin
    answers = {name: answer(model, load(), config.precision) for name, load in (measured or {}).items()}
    return Fitted(training, attaching, seconds, answers)


def train_head(model: nn.Module, images: Images, method: MethodConfig, config: TrainConfig) -> None:
    """Train the head of a plain model in place for `head_first` epochs, on features, by linear probing's recipe.

    Source: arXiv:2202.10054, by which features are distorted less where the head does not start at random.

    Raises:
        TrainingDiverged: the loss stopped being finite; the model is plain again.
        VisgraftError: the method trains nothing but the head.
    """
    if method.head_only:
        raise VisgraftError(f"head_first has no effect: {method.method} trains the head alone anyway; leave it out")
    kept = ("seed", "precision", "batch_size", "class_weights", "sampler", "label_smoothing")
    given = {"epochs": config.head_first, **{name: getattr(config, name) for name in kept}}
    probing, recipe = configure("linear", given)
    attach(model, probing)
    try:
        train(model, images, recipe)
    except TrainingDiverged as error:  # none of these epochs is one of the method's
        raise TrainingDiverged(
            "the loss of the head, which trains first, is not finite; leave out head_first", 0
        ) from error
    finally:
        strip(model)


def answer(model: nn.Module, images: Images, precision: str) -> Answers:
    """Return what a model answers on labelled images, in eval mode."""
    begin = time.perf_counter()
    logits = logits_of(model, images, make_compute(precision))
    return Answers(logits, images.labels, time.perf_counter() - begin, images.groups, images.tasks)
