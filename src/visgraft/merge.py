"""Merge: fold an attached method into the backbone, and measure that the plain model answers as the adapted one."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.affine import fold, fold_target, probe
from visgraft.attach import choose_places, get_attached, strip
from visgraft.config import MethodConfig
from visgraft.errors import MergeError, SiteError
from visgraft.registry import get_method
from visgraft.sites import Site, find_grid, find_image_shape, find_sites

NOISE_IMAGES = 16


@dataclass(frozen=True)
class Certificate:
    """What was measured between the adapted and the merged model, in the model's own precision.

    `max_abs_difference` is the largest difference of any logit (of any feature where there is no head), `tolerance`
    what it had to stay below, `top1_agreement` the share of `images` with the same highest logit, and `source` says
    whether those were real images or seeded noise.
    """

    method: str
    max_abs_difference: float
    tolerance: float
    top1_agreement: float
    images: int
    source: str
    dtype: str


def mergeable(config: MethodConfig, blocks: Sequence[Mapping[str, Site]]) -> bool:
    """Whether a method with these options folds exactly into these blocks; raises SiteError where it cannot attach."""
    method = get_method(config.method)
    if not method.placements(config):
        return True
    places = choose_places(config, blocks, "this backbone")
    return method.affine(config) and all(fold_target(place, sites) for sites in blocks for place in places)


def _remedy(config: MethodConfig, blocks: Sequence[Mapping[str, Site]]) -> str:
    """Name the options with which the method would fold here."""
    for field in dataclasses.fields(config):
        for choice in field.metadata.get("choices") or ():
            value = (choice,) if isinstance(getattr(config, field.name), tuple) else choice
            try:
                if mergeable(dataclasses.replace(config, **{field.name: value}), blocks):
                    return f"train it with {field.name}={choice}, which folds, or keep the adapter attached"
            except (SiteError, TypeError):
                continue
    return "keep the adapter attached"


def _fold_all(model: nn.Module, plain: nn.Module) -> None:
    """Fold every position of the attached model into the plain copy."""
    attached = get_attached(model)
    if not attached.where:
        return
    blocks = find_sites(plain)
    for key, position in attached.where.items():
        target = fold_target(position.place, blocks[position.block])
        if target is None or not attached.method.affine(attached.config):
            where = position.place.adds_to
            reason = "is not linear" if target else f"changes {where}, which no linear layer alone produces or reads"
            remedy = _remedy(attached.config, blocks)
            raise MergeError(f"{attached.config.method} {reason}, so it cannot be folded exactly; {remedy}")
        module: Any = attached.positions[key]
        fold(plain, target, probe(module, position, find_grid(plain), attached.shared))


def _noise(model: nn.Module) -> list[Tensor]:
    shape = find_image_shape(model) if hasattr(model, "patch_embed") else (3, 224, 224)
    return [torch.randn(NOISE_IMAGES, *shape, generator=torch.Generator().manual_seed(0))]


def _compare(model: nn.Module, plain: nn.Module, images: Any, method: str) -> Certificate:
    """Run both models and measure; the images are moved to the model's device and precision."""
    like = next(model.parameters())
    largest, scale, agree, count = 0.0, 0.0, 0, 0
    batches = _noise(plain) if images is None else [images] if isinstance(images, Tensor) else images
    with torch.no_grad():
        for batch in batches:
            x = (batch if isinstance(batch, Tensor) else batch[0]).to(like.device, like.dtype)
            before, after = model(x).double(), plain(x).double()
            largest = max(largest, (before - after).abs().max().item())
            scale = max(scale, before.abs().max().item())
            agree += int((before.argmax(-1) == after.argmax(-1)).sum())
            count += len(x)
    if not count:
        raise MergeError("no images to measure the merged model on; pass some, or None for seeded noise")
    tolerance = 1e-9 * scale if like.dtype == torch.float64 else 1e-5 * scale + 1e-5
    source = "noise" if images is None else "images"
    return Certificate(method, largest, tolerance, agree / count, count, source, str(like.dtype).removeprefix("torch."))


def merge(model: nn.Module, images: Any = None) -> tuple[nn.Module, Certificate]:
    """Return a plain copy of the model with the method folded into its weights, and the measured certificate.

    Args:
        model: a model with something attached, in float32 or float64; it is left as it is.
        images: preprocessed images [B, 3, H, W], or an iterable of such or of (images, labels); None: seeded noise.

    Raises:
        MergeError: the method cannot be folded exactly here, or the measured difference is above the tolerance.
    """
    attached = get_attached(model)
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise MergeError(f"the model is in {dtype}, in which folding rounds visibly; call model.float() first")
    training = model.training
    plain = strip(copy.deepcopy(model)).eval()
    try:
        model.eval()
        _fold_all(model, plain)
        certificate = _compare(model, plain, images, attached.config.method)
    finally:
        model.train(training)
    if not certificate.max_abs_difference <= certificate.tolerance:
        raise MergeError(
            f"the merged model differs by {certificate.max_abs_difference:.2e} on {certificate.images} images, above "
            f"{certificate.tolerance:.2e}; keep the adapter attached, or merge in float64 (model.double())"
        )
    return plain, certificate
