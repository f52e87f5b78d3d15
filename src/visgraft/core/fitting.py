"""Whether images have the channels and the size that a model takes, asked before anything is done with them."""

from collections.abc import Sequence

import torch
from torch import nn

from visgraft.backbones.input_size import built_size, input_channels, sides
from visgraft.core.tensors import eval_mode
from visgraft.errors import DataError, VisgraftError


def check_shape(
    model: nn.Module,
    channels: int | None,
    size: Sequence[int],
    what: str,
    *,
    kind: type[VisgraftError] = DataError,
    remedy: str = "load them with visgraft.model_data_config(model)",
) -> None:
    """Raise where a model does not take images of so many channels and this size.

    A model whose layers take any size is not asked further. One that was built for another size may still take this
    one (timm's `dynamic_img_size`, Twins, XCiT), which a blank image shows.

    Args:
        model: a plain or an adapted model.
        channels: how many an image has; None: not known.
        size: height and width of an image.
        what: which images, in the plural; the message begins with it.
        kind: the kind of error.
        remedy: what to do about another size, besides creating another model.

    Raises:
        VisgraftError: of the given kind; the message names what the images have and what the model takes.
    """
    own, built = input_channels(model), built_size(model)
    channels, (height, width) = channels or own or 3, size
    if own in (None, channels) and built in (None, (height, width)):
        return
    if _runs(model, (channels, height, width)):
        return
    name = type(model).__name__
    if own not in (None, channels):
        raise kind(
            f"{what} have {channels} channels, but this {name} takes {own} (in_chans={own}); "
            f"create it with in_chans={channels}, for which timm adapts pretrained weights, or pass tensors of your own"
        )
    asked = height if height == width else (height, width)
    raise kind(
        f"{what} have {sides(size)} pixels, but this {name} takes {sides(built)}; {remedy}, or create the model with "
        f"img_size={asked} (image_size= in visgraft.Backbone)"
    )


def _runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model answers one blank image of a shape."""
    like = next(model.parameters())
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(1, *shape, device=like.device, dtype=like.dtype))
    except Exception:  # layers answer a size that they cannot use with whatever they run into
        return False
    return True
