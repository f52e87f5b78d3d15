"""The size of the images that a timm model takes, whatever its family."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from visgraft.errors import SiteError


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return the shape (channels, height, width) of one image for this model.

    A model built for one size says it itself (`built_size`). The others take any size: theirs is the one that they
    were created for (`Backbone.image_size`), else the one that their weights were trained with (`pretrained_cfg`).

    Raises:
        SiteError: the model does not say.
    """
    size = built_size(model) or _created_for(model)
    channels = input_channels(model)
    if size is None or channels is None:
        raise SiteError(
            f"{type(model).__name__} does not say which image size it takes; create it with visgraft.create_backbone "
            "or timm.create_model"
        )
    return (channels, *size)


def built_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the (height, width) that a model was built for, or None where its layers take any size."""
    for child in model.children():  # a patch embedding: ViT's and Swin's `patch_embed`, MLP-Mixer's `stem`
        if hasattr(child, "img_size"):
            return _pair(child.img_size)
    # CoAtNet, LeViT and others keep the size in no layer; timm (1.0.31) keeps the argument that it built them with.
    traits: Any = getattr(model, "_traits", None) or {}
    facts: Any = getattr(model, "pretrained_cfg", None) or {}
    return _pair(traits.get("img_size")) or (_created_for(model) if facts.get("fixed_input_size") else None)


def recorded_size(model: nn.Module, backbone: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) that a record of a backbone like this model names, else that of the model's weights.

    `backbone` is what `Backbone.to_dict` gives; None: neither says.
    """
    asked = backbone.get("image_size") or (backbone.get("arguments") or {}).get("img_size")
    facts: Any = getattr(model, "pretrained_cfg", None) or {}
    return _pair(asked or facts.get("input_size", (0, None))[1:])


def sides(size: Sequence[int] | None) -> str:
    """Return height and width as text; "any size" where there are none."""
    return "any size" if size is None else " × ".join(map(str, size))


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the (height, width) of the patches into which a model cuts its images, or None where it cuts none."""
    for child in model.children():
        if hasattr(child, "img_size") and hasattr(child, "patch_size"):
            return _pair(child.patch_size)
    return None


def input_channels(model: nn.Module) -> int | None:
    """Return how many channels an image has: timm's attribute, else the first convolution's; None: not known."""
    known: Any = getattr(model, "in_chans", None)
    if known is None:
        known = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return None if known is None else int(known)


def _created_for(model: nn.Module) -> tuple[int, int] | None:
    """The size that the model was created for, else that of its weights; timm notes both in one place."""
    facts: Any = getattr(model, "pretrained_cfg", None) or {}
    return _pair(facts.get("input_size", (0, None))[1:])


def _pair(size: Any) -> tuple[int, int] | None:
    """Both sides of a size that is given as one number, two, or not at all."""
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    return (int(size[0]), int(size[1])) if len(size) == 2 and None not in size else None
