"""What a step of training needs: inputs, labels, the loss with its class weights, and the order of the images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from visgraft.backbones.heads import head_outputs
from visgraft.core.attached import get_attached
from visgraft.data.augment import View, augmentation
from visgraft.data.images import Images
from visgraft.data.tasks import LabelTask
from visgraft.errors import VisgraftError, warn_user
from visgraft.executors.distributed import in_shares
from visgraft.measure.precision import Compute
from visgraft.options import TrainConfig
from visgraft.training.prefix import Prefix, run_prefix
from visgraft.training.task_loss import TaskLoss
from visgraft.training.weighting import class_weights

Loss = Callable[[Tensor, Tensor], Tensor]
Features = dict[str, Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """The network that trains, its inputs (images, or what a frozen part makes of them once), its labels and its loss.

    With several tasks, `tasks` are what the labels answer.

    `inputs` takes (indices [B], epoch), `val_inputs` indices [B]; `loss` takes logits [B, classes] and labels.
    `kept_bytes` is the memory that inputs computed once take. `mix` mixes a batch's images with each other and their
    labels, which become shares of the classes [B, classes]; each image is mixed with the one before it. `weights` are
    the factors per class by which the loss of a batch is a weighted mean.
    """

    network: nn.Module
    inputs: Callable[[Tensor, int], Tensor]
    labels: Tensor
    loss: Loss
    val_inputs: Callable[[Tensor], Tensor] | None
    val_labels: Tensor | None
    kept_bytes: int = 0
    mix: Mix | None = None
    weights: Tensor | None = None
    tasks: tuple[LabelTask, ...] = ()

    def share_of_loss(self, target: Tensor, labels: Tensor) -> Tensor | float:
        """Return by what the loss of some images (`target`) counts in that of their batch (`labels`)."""
        if isinstance(self.loss, TaskLoss):
            return self.loss.known_labels(target) / self.loss.known_labels(labels).clamp_min(1)
        if self.weights is None or target.ndim == 2:  # with shares of classes, torch divides by the images
            return len(target) / len(labels)
        return self.weights[target].sum() / self.weights[labels].sum()


def make_objective(
    model: nn.Module,
    network: nn.Module,
    images: Images,
    val: Images | None,
    config: TrainConfig,
    compute: Compute,
    features: Features | None = None,
    on_warning: Callable[[str], None] = warn_user,
) -> Objective:
    """Train the whole model, or what lies behind its frozen part on what that makes of images once.

    Where the whole trains, it runs as `network`, a wrapper around it or itself. The other is the head, on features, or
    the blocks from the first trained one on. `features` keeps features between calls with the same augmentation:
    "train" and "val" [N, width] are put in, or taken from there; with K cached views "train" holds them one after the
    other [K N, width]. `on_warning` is told where only the last blocks are to be adapted, or views are to be cached,
    but the frozen blocks run in every step all the same.

    Raises:
        VisgraftError: an option does not go with these labels, or has no effect.
    """
    device, turns = compute.device, config.cached_views
    augment = augmentation(images, config)
    views: tuple[Images, ...] = (images,)
    if augment and turns:
        facts = (tuple(images.pixels.shape), images.distinct)
        views = tuple(replace(images, pixels=View(augment, *facts, epoch)) for epoch in range(1, turns + 1))
    labels, val_labels = images.labels.to(device), None if val is None else val.labels.to(device)
    loss, weights = _loss_of(images, head_outputs(model) or 0, config, device)
    if sees_features(model, config):
        kept = {} if features is None else features
        for name, parts in (("train", views), ("val", () if val is None else (val,))):
            if parts and name not in kept:
                kept[name] = torch.cat([features_of(model, part, compute) for part in parts])
        train = kept["train"].split(len(images))
        head: Any = model.get_classifier()  # type: ignore[operator]
        task = _on_kept(head, train, kept.get("val"), labels, val_labels, loss, device)
        return replace(task, weights=weights, tasks=images.tasks)
    asked = views if val is None else (*views, val)
    prefix = _prefix(model, asked, compute, config, on_warning)
    if prefix is not None:
        train, rest = prefix.entering[: len(views)], prefix.entering[len(views) :]
        task = _on_kept(prefix.tail, train, rest[0] if rest else None, labels, val_labels, loss, device)
        return replace(task, weights=weights, tasks=images.tasks)

    def inputs(indices: Tensor, epoch: int) -> Tensor:
        pixels = augment(indices, _turn(epoch, turns)) if augment else images.pixels[indices]
        return images.normalised(pixels, device)

    def val_inputs(indices: Tensor) -> Tensor:
        assert val is not None
        return val.normalised(val.pixels[indices], device)

    mix = mixing(config, images.labels, head_outputs(model) or 0)
    seen = None if val is None else val_inputs
    return Objective(network, inputs, labels, loss, seen, val_labels, 0, mix, weights, images.tasks)


def mixing(config: TrainConfig, labels: Tensor, classes: int) -> Mix | None:
    """Return what mixes a batch of images with each other, by torchvision; None where nothing does.

    Both kinds take turns at random where both are wanted. It draws from torch's generator in the calling thread.

    Raises:
        VisgraftError: the images may have several classes, whose presence cannot be shared out.
    """
    kinds = [kind(alpha=a) for kind, a in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if a]
    if not kinds:
        return None
    if labels.ndim == 2:
        raise VisgraftError("mixup and cutmix need one class per image; leave them out")
    chosen = v2.RandomChoice(kinds)
    return lambda x, y: chosen(x, F.one_hot(y, classes).float())


def _turn(epoch: int, turns: int | None) -> int:
    """Return whose epoch's view an epoch sees, from 1."""
    return (epoch - 1) % turns + 1 if turns else epoch


def _on_kept(
    network: nn.Module,
    views: tuple[Tensor, ...],
    val: Tensor | None,
    labels: Tensor,
    val_labels: Tensor | None,
    loss: Loss,
    device: torch.device,
) -> Objective:
    """Train a network on inputs that are computed already: views [N, ...] for training, and perhaps for validation."""

    def inputs(indices: Tensor, epoch: int) -> Tensor:
        view = views[_turn(epoch, len(views)) - 1]
        return view[indices.to(view.device)].to(device)

    def val_inputs(indices: Tensor) -> Tensor:
        assert val is not None
        return val[indices.to(val.device)].to(device)

    kept_bytes = sum(part.nbytes for part in (*views, *(() if val is None else (val,))))
    return Objective(network, inputs, labels, loss, None if val is None else val_inputs, val_labels, kept_bytes)


def _prefix(
    model: nn.Module,
    parts: tuple[Images, ...],
    compute: Compute,
    config: TrainConfig,
    on_warning: Callable[[str], None],
) -> Prefix | None:
    """Run what is frozen before the first trained block once, or say why it runs in every step.

    Raises:
        VisgraftError: views are to be cached, but no block is frozen before the first trained one.
    """
    mixed = "images are mixed with each other"
    reason = mixed if config.mixed else "images are augmented (cached_views makes a fixed number of views)"
    passes = "each task has a pass of its own" if get_attached(model).config.passes else ""
    found = reason if config.anew else passes or run_prefix(model, parts, compute)
    if isinstance(found, Prefix):
        return found
    if not found and config.cached_views:
        raise VisgraftError(
            "cached_views keeps what frozen blocks make of augmented images, but none is known to be frozen before the "
            "first one that trains; adapt the last_blocks only, or leave cached_views out"
        )
    if found and (config.cached_views or get_attached(model).config.last_blocks):
        on_warning(f"the frozen blocks run in every step rather than once per image: {found}")
    return None


def sees_features(model: nn.Module, config: TrainConfig) -> bool:
    """Whether a head trains alone, on features that never change, so that they are computed once.

    Raises:
        VisgraftError: nothing is attached.
    """
    attached = get_attached(model)
    changing = attached.where or attached.unfrozen or config.anew or config.drop_path
    return not changing and len(attached.head) == 1  # a distilled model's head has two parts, which see two tokens


def features_of(model: Any, images: Images, compute: Compute, batch_size: int = 64) -> Tensor:
    """Return what enters the head, [N, width] in float32 on the device that computes; the model must be there."""
    model.eval()

    def entering(batch: slice) -> Tensor:
        x = images.normalised(images.pixels[batch]).to(compute.device)
        found: Tensor = model.forward_head(model.forward_features(x), pre_logits=True).float()
        return found

    with torch.no_grad(), compute.autocast():
        return in_shares(len(images), batch_size, entering)


@contextmanager
def checkpointing(model: nn.Module, whole: bool, wanted: bool) -> Iterator[None]:
    """Let timm compute each block anew in the backward pass inside the context, if `wanted`.

    Raises:
        VisgraftError: not the `whole` model trains, but a part of it, or timm cannot do it for this one.
    """
    if not wanted:
        yield
        return
    if not whole:
        raise VisgraftError(
            "grad_checkpointing saves memory of blocks that run in every step, but here the frozen ones run once per "
            "image; leave it out"
        )
    timms: Any = model
    try:
        timms.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        name = type(model).__name__
        raise VisgraftError(f"timm's {name} has no gradient checkpointing; leave out grad_checkpointing") from error
    try:
        yield
    finally:
        timms.set_grad_checkpointing(False)


def _loss_of(images: Images, outputs: int, config: TrainConfig, device: torch.device) -> tuple[Loss, Tensor | None]:
    """Return the loss, and, of images with one class each, the factors per class.

    Raises:
        VisgraftError: an option needs one label per image, or several.
    """
    if not images.tasks:
        if config.task_weights:
            raise VisgraftError("task_weights is for images with several labels, and these have one; leave it out")
        weights = class_weights(images.labels, outputs, config.class_weights)
        weights = None if weights is None else weights.to(device)
        return make_loss(images.labels, outputs, config, device), weights
    if config.sampler == "balanced":
        raise VisgraftError("sampler 'balanced' needs one label per image; use class_weights='balanced' instead")
    if config.mixed:
        raise VisgraftError("mixup and cutmix need one class per image; leave them out")
    return TaskLoss(images.tasks, images.labels, config), None


def make_loss(labels: Tensor, classes: int, config: TrainConfig, device: torch.device) -> Loss:
    """Return cross-entropy, or binary cross-entropy where an image may have several classes, as the config says."""
    weights = class_weights(labels, classes, config.class_weights)
    weights = None if weights is None else weights.to(device)
    smoothing = config.label_smoothing
    if labels.ndim == 1:
        return lambda logits, y: F.cross_entropy(logits, y, weights, label_smoothing=smoothing)
    if config.sampler == "balanced":
        raise VisgraftError(
            "sampler 'balanced' needs one class per image; with several, use --class-weights balanced instead"
        )
    return lambda logits, y: F.binary_cross_entropy_with_logits(
        logits, y * (1 - smoothing) + smoothing / 2, pos_weight=weights
    )


def draw_order(labels: Tensor, config: TrainConfig, epoch: int) -> Tensor:
    """Return which images an epoch sees in which order, int64 [N], from (seed, epoch) alone.

    The sampler `shuffle` takes each image once; `balanced` draws N with replacement, every class equally often.
    """
    generator = np.random.default_rng((config.seed, epoch))
    if config.sampler == "shuffle":
        return torch.from_numpy(generator.permutation(len(labels)))
    counts = torch.bincount(labels.cpu())
    chance = (1 / counts[labels.cpu()]).double().numpy()
    return torch.from_numpy(generator.choice(len(labels), len(labels), p=chance / chance.sum()))
