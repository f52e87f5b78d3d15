"""What a step of training needs: inputs, labels, the loss with its class weights, and the order of the images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.attach import get_attached
from visgraft.config import TrainConfig
from visgraft.data.augment import augmentation
from visgraft.data.images import Images
from visgraft.errors import VisgraftError

Loss = Callable[[Tensor, Tensor], Tensor]
Features = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The network that trains, its inputs (images, or features computed once), its labels and its loss.

    `inputs` takes (indices [B], epoch), `val_inputs` indices [B]; `loss` takes logits [B, classes] and labels.
    """

    network: nn.Module
    inputs: Callable[[Tensor, int], Tensor]
    labels: Tensor
    loss: Loss
    val_inputs: Callable[[Tensor], Tensor] | None
    val_labels: Tensor | None


def make_objective(
    model: nn.Module,
    images: Images,
    val: Images | None,
    config: TrainConfig,
    accelerator: Any,
    features: Features | None = None,
) -> Objective:
    """Train the whole model on images, or only its head on features that never change.

    `features` keeps those between calls: "train" and "val" [N, width] are put in, or taken from there.

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
        train_features, val_features = kept["train"], None if val is None else kept["val"]
        return Objective(
            model.get_classifier(),  # type: ignore[operator]
            lambda indices, epoch: train_features[indices],
            labels,
            loss,
            None if val_features is None else lambda indices: val_features[indices],
            val_labels,
        )

    def inputs(indices: Tensor, epoch: int) -> Tensor:
        pixels = augment(indices, epoch) if augment else images.pixels[indices]
        return images.normalised(pixels, device)

    def val_inputs(indices: Tensor) -> Tensor:
        assert val is not None
        return val.normalised(val.pixels[indices], device)

    return Objective(model, inputs, labels, loss, None if val is None else val_inputs, val_labels)


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
