"""What a step of training needs: inputs, labels, the loss with its class weights, and the order of the images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.attach import get_attached
from visgraft.config import TrainConfig
from visgraft.data.augment import augmentation
from visgraft.data.images import Images
from visgraft.errors import VisgraftError
from visgraft.prefix import Prefix, run_prefix

Loss = Callable[[Tensor, Tensor], Tensor]
Features = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The network that trains, its inputs (images, or what a frozen part makes of them once), its labels and its loss.

    `inputs` takes (indices [B], epoch), `val_inputs` indices [B]; `loss` takes logits [B, classes] and labels.
    `kept_bytes` is the memory that inputs computed once take.
    """

    network: nn.Module
    inputs: Callable[[Tensor, int], Tensor]
    labels: Tensor
    loss: Loss
    val_inputs: Callable[[Tensor], Tensor] | None
    val_labels: Tensor | None
    kept_bytes: int = 0


def make_objective(
    model: nn.Module,
    images: Images,
    val: Images | None,
    config: TrainConfig,
    accelerator: Any,
    features: Features | None = None,
    on_warning: Callable[[str], None] = warn,
) -> Objective:
    """Train the whole model on images, or only what lies behind its frozen part on what that makes of them once.

    That is the head, on features, or the blocks from the first trained one on. `features` keeps features between
    calls: "train" and "val" [N, width] are put in, or taken from there. `on_warning` is told where only the last
    blocks are to be adapted, but those before run in every step all the same.

    Raises:
        VisgraftError: an option does not go with these labels.
    """
    device = accelerator.device
    augment = augmentation(images, config.flip, config.rand_augment, config.seed)
    labels, val_labels = images.labels.to(device), None if val is None else val.labels.to(device)
    loss = make_loss(images.labels, int(getattr(model, "num_classes", 0)), config, device)
    if sees_features(model, config):
        kept = {} if features is None else features
        for name, part in (("train", images), ("val", val)):
            if part is not None and name not in kept:
                kept[name] = features_of(model, part, accelerator)
        parts = (kept["train"],) if val is None else (kept["train"], kept["val"])
        return _on_kept(model.get_classifier(), parts, labels, val_labels, loss, device)  # type: ignore[operator]
    prefix = _prefix(model, (images,) if val is None else (images, val), accelerator, augment is not None, on_warning)
    if prefix is not None:
        return _on_kept(prefix.tail, prefix.entering, labels, val_labels, loss, device)

    def inputs(indices: Tensor, epoch: int) -> Tensor:
        pixels = augment(indices, epoch) if augment else images.pixels[indices]
        return images.normalised(pixels, device)

    def val_inputs(indices: Tensor) -> Tensor:
        assert val is not None
        return val.normalised(val.pixels[indices], device)

    return Objective(model, inputs, labels, loss, None if val is None else val_inputs, val_labels)


def _on_kept(
    network: nn.Module,
    parts: tuple[Tensor, ...],
    labels: Tensor,
    val_labels: Tensor | None,
    loss: Loss,
    device: torch.device,
) -> Objective:
    """Train a network on inputs that are computed already: [N, ...] for training, and perhaps for validation."""

    def inputs(indices: Tensor, epoch: int) -> Tensor:
        return parts[0][indices.to(parts[0].device)].to(device)

    def val_inputs(indices: Tensor) -> Tensor:
        return parts[1][indices.to(parts[1].device)].to(device)

    kept_bytes = sum(part.nbytes for part in parts)
    return Objective(network, inputs, labels, loss, val_inputs if len(parts) > 1 else None, val_labels, kept_bytes)


def _prefix(
    model: nn.Module,
    parts: tuple[Images, ...],
    accelerator: Any,
    augmented: bool,
    on_warning: Callable[[str], None],
) -> Prefix | None:
    """Run what is frozen before the first trained block once, or say why it runs in every step."""
    asked = get_attached(model).config.last_blocks
    found = "images are augmented" if augmented else run_prefix(model, parts, accelerator)
    if isinstance(found, Prefix):
        return found
    if found and asked:
        on_warning(f"the frozen blocks run in every step rather than once per image: {found}")
    return None


def sees_features(model: nn.Module, config: TrainConfig) -> bool:
    """Whether a head trains alone, on features that never change, so that they are computed once.

    Raises:
        VisgraftError: nothing is attached.
    """
    attached = get_attached(model)
    changing = attached.where or attached.unfrozen or config.flip or config.rand_augment or config.drop_path
    return not changing and len(attached.head) == 1  # a distilled model's head has two parts, which see two tokens


def features_of(model: Any, images: Images, accelerator: Any, batch_size: int = 64) -> Tensor:
    """Return what enters the head, [N, width] in float32 on the accelerator's device; the model must be there."""
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        parts = [
            model.forward_head(model.forward_features(x.to(accelerator.device)), pre_logits=True).float()
            for x, _ in images.batches(batch_size)
        ]
    return torch.cat(parts)


def class_weights(labels: Tensor, classes: int, kind: str) -> Tensor | None:
    """Return a factor per class [classes] for the loss; None for `none`.

    `balanced` is N / (classes × images of the class), as scikit-learn's; `sqrt` is its square root. Where an image may
    have several classes (`labels` [N, classes]), the factor weighs a class's presence: images without ÷ with it.
    """
    if kind == "none":
        return None
    if labels.ndim == 2:
        with_it = labels.sum(0)
        weights = (len(labels) - with_it) / with_it.clamp_min(1)
    else:
        counts = torch.bincount(labels, minlength=classes)
        weights = len(labels) / (int((counts > 0).sum()) * counts.clamp_min(1))
    return weights if kind == "balanced" else weights.sqrt()


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
