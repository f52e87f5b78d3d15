"""How much the images of a class count in the loss."""

import torch
from torch import Tensor


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
