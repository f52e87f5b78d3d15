"""Whether images and their labels fit a model, asked before it is trained or measured on them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visgraft.backbones.heads import head_outputs
from visgraft.backbones.wrappers import unwrapped
from visgraft.core.fitting import check_shape
from visgraft.data.images import Images
from visgraft.errors import DataError


def check_fit(model: nn.Module, images: Images, what: str = "images") -> None:
    """Raise where a model cannot learn from images or be measured on them; nothing is decoded.

    A head with more outputs than there are labels is right where the number of classes is not known (`Images.outputs`
    is 0): a class may have no image here.

    Args:
        model: a plain or an adapted model with a head.
        images: images with labels.
        what: which images, in the plural; the message begins with it.

    Raises:
        DataError: there are no images, their labels are no labels, or channels, size or classes are not the model's.
    """
    model = unwrapped(model)
    if not isinstance(images, Images):
        raise DataError(f"{what} are a {type(images).__name__}; pass what visgraft.load_images returns")
    if images.tasks:
        _check_task_labels(images, what)
    else:
        _check_labels(images.labels, what)
    if not len(images.labels):
        raise DataError(f"there are no {what}; pass at least one")
    _check_pixels(images, what)
    outputs = head_outputs(model)
    if outputs is not None:
        check_classes_fit(images, outputs, what)
    check_shape(model, images.pixels.shape[1], images.pixels.shape[2:], what)


def check_classes_fit(images: Images, outputs: int, what: str = "images") -> None:
    """Raise a DataError where a head of so many outputs cannot answer what the images' labels say."""
    if images.tasks:
        answered = sum(task.outputs for task in images.tasks)
        if answered != outputs:
            raise DataError(
                f"{what} have {len(images.tasks)} tasks with {answered} outputs in all, but the model's head has "
                f"{outputs}; create the model with num_classes={answered}, or call model.reset_classifier before attach"
            )
        return
    highest = images.labels.shape[1] if images.multi_label else int(images.labels.max()) + 1
    classes = images.outputs or highest
    remedy = f"create the model with num_classes={max(classes, highest)}, or call model.reset_classifier before attach"
    if not outputs:
        raise DataError(f"the model has no head (num_classes=0), but {what} have {classes} classes; {remedy}")
    if highest > outputs:
        found = f"have labels for {highest} classes" if images.multi_label else f"have labels up to {highest - 1}"
        raise DataError(f"{what} {found}, but the model's head has {outputs} outputs; {remedy}")
    if outputs != classes and (images.multi_label or images.outputs):
        raise DataError(f"{what} have {classes} classes, but the model's head has {outputs} outputs; {remedy}")


def _check_task_labels(images: Images, what: str) -> None:
    """Raise a DataError unless labels are float32 [N, columns] for the tasks."""
    columns, labels = sum(task.columns for task in images.tasks), images.labels
    if labels.dtype != torch.float32 or labels.ndim != 2 or labels.shape[1] != columns:
        raise DataError(
            f"the labels of {what} are {_short(labels)} of shape {_shape(labels)}; for these {len(images.tasks)} tasks "
            f"pass float32 [N, {columns}], NaN where a label is not known"
        )


def _check_labels(labels: Any, what: str) -> None:
    """Raise a DataError unless labels are int64 [N] from 0 on, or float32 [N, classes] of 0 and 1."""
    wanted = "pass int64 [N], or float32 [N, classes] of 0 and 1 where an image may have several"
    if not isinstance(labels, Tensor):
        raise DataError(f"the labels of {what} are a {type(labels).__name__}, not a tensor; {wanted}")
    if {1: torch.int64, 2: torch.float32}.get(labels.ndim) != labels.dtype:
        raise DataError(f"the labels of {what} are {_short(labels)} of shape {_shape(labels)}; {wanted}")
    if labels.ndim == 2 and not bool(((labels == 0) | (labels == 1)).all()):
        raise DataError(f"the labels of {what} are not all 0 or 1, as labels [N, classes] must be; {wanted}")
    if labels.ndim == 1 and len(labels) and int(labels.min()) < 0:
        raise DataError(
            f"the labels of {what} go down to {int(labels.min())}, but classes are numbered from 0; "
            "leave out images without a class, or number the classes anew"
        )


def _check_pixels(images: Images, what: str) -> None:
    """Raise a DataError unless there are uint8 pixels [N, channels, H, W], as many as labels, with means for them."""
    pixels: Any = images.pixels
    if not hasattr(pixels, "shape") or isinstance(pixels, np.ndarray):
        raise DataError(f"the pixels of {what} are a {type(pixels).__name__}; pass a tensor, as torch.from_numpy makes")
    if isinstance(pixels, Tensor) and pixels.dtype != torch.uint8:
        raise DataError(f"{what} hold pixels in {_short(pixels)}; pass them as uint8 from 0 to 255")
    if len(pixels.shape) != 4:
        raise DataError(f"{what} have the shape {_shape(pixels)}; pass pixels [N, channels, height, width]")
    if len(pixels) != len(images):
        raise DataError(f"there are {len(pixels)} {what}, but {len(images)} labels; pass one label for each image")
    channels, means, deviations = pixels.shape[1], len(images.mean), len(images.std)
    if not {means, deviations} <= {1, channels}:
        raise DataError(
            f"{what} have {channels} channels, but {means} means and {deviations} standard deviations; pass one of "
            "each for every channel"
        )


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Any) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
