"""Merge: fold an attached method into the backbone, and measure that the plain model answers as the adapted one."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.affine import Fold, add_missing_biases, fold, fold_target, probe, refusal
from visgraft.attach import find_positions, get_attached, strip
from visgraft.config import MethodConfig
from visgraft.dryrun import meta_copy
from visgraft.errors import MergeError, VisgraftError
from visgraft.finding import find_sites
from visgraft.input_size import input_size
from visgraft.registry import get_method

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


def why_not_merged(model: nn.Module, config: MethodConfig, allow_new_bias: bool = False) -> str | None:
    """Return why a method with these options does not fold exactly into a plain backbone; None where it does.

    Raises:
        SiteError: it cannot be attached there in the first place.
    """
    method = get_method(config.method)
    positions, sites = find_positions(model, config)
    if method.inserts:
        return "inserts tokens, which no weight can take over"
    for position in positions:
        target = fold_target(*sites.at(position))
        if target is None:
            return f"changes {position.place.adds_to}, which no linear layer alone produces or reads"
        if not method.affine(config):
            return "is not linear"
        taking = _with_biases(model, target) if allow_new_bias else model
        reason = refusal(taking, target, method.shifts(config), method.diagonal(config))
        if reason:
            return reason
    return None


def _with_biases(model: nn.Module, target: Fold) -> nn.Module:
    """Return a copy without data in which the target's layers have the biases that they can have."""
    plain = meta_copy(model)
    add_missing_biases(plain, target)
    return plain


def mergeable(model: nn.Module, config: MethodConfig) -> bool:
    """Whether a method with these options folds exactly into this plain backbone.

    Raises:
        SiteError: it cannot be attached there in the first place.
    """
    return why_not_merged(model, config) is None


def remedy(model: nn.Module, config: MethodConfig) -> str:
    """Name an option with which the method would fold into this plain backbone, or say what else to do."""
    # A switch, such as one for biases, changes less than another place does.
    for field in sorted(
        dataclasses.fields(config), key=lambda field: not isinstance(getattr(config, field.name), bool)
    ):
        current = getattr(config, field.name)
        values = [not current] if isinstance(current, bool) else field.metadata.get("choices") or ()
        for choice in values:
            value: Any = (choice,) if "tuple" in str(field.type) else choice
            try:
                if mergeable(model, dataclasses.replace(config, **{field.name: value})):
                    return f"train it with {field.name}={choice}, which folds, or keep the adapter attached"
            except (VisgraftError, TypeError):
                continue
    return "keep the adapter attached"


def _fold_all(model: nn.Module, plain: nn.Module, allow_new_bias: bool) -> None:
    """Fold every position of the attached model into the plain copy."""
    attached = get_attached(model)
    reason = why_not_merged(plain, attached.config, allow_new_bias)
    if reason:
        advice = remedy(plain, attached.config)
        raise MergeError(f"{attached.config.method} {reason}, so it cannot be folded exactly; {advice}")
    if not attached.where:
        return
    sites = find_sites(plain)
    for key, position in attached.where.items():
        reads, adds_to = sites.at(position)
        target = fold_target(reads, adds_to)
        assert target is not None
        module: Any = attached.positions[key]
        affine = probe(module, position, reads.grid, attached.shared, attached.method.diagonal(attached.config))
        if allow_new_bias and bool(affine.shift.any()):
            add_missing_biases(plain, target)
        fold(plain, target, affine)


def folded(model: nn.Module, *, allow_new_bias: bool = False) -> nn.Module:
    """Return a plain copy in eval mode with the method folded into its weights, without measuring it (see `merge`).

    Raises:
        MergeError: the method cannot be folded exactly here.
    """
    attached = get_attached(model)
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise MergeError(f"the model is in {dtype}, in which folding rounds visibly; call model.float() first")
    # The digest is handed on as it is: a copy of it would make it, and the plain model has none.
    plain = strip(copy.deepcopy(model, {id(attached.plain): attached.plain})).eval()
    _fold_all(model, plain, allow_new_bias)
    return plain


def _noise(model: nn.Module) -> list[Tensor]:
    return [torch.randn(NOISE_IMAGES, *input_size(model), generator=torch.Generator().manual_seed(0))]


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


def merge(model: nn.Module, images: Any = None, *, allow_new_bias: bool = False) -> tuple[nn.Module, Certificate]:
    """Return a plain copy of the model with the method folded into its weights, and the measured certificate.

    Args:
        model: a model with something attached, in float32 or float64; it is left as it is.
        images: preprocessed images [B, 3, H, W], or an iterable of such or of (images, labels); None: seeded noise.
        allow_new_bias: give a linear layer without bias one, where the adapter adds a constant; the merged model then
            has tensors that timm's constructor does not make.

    Raises:
        MergeError: the method cannot be folded exactly here, or the measured difference is above the tolerance.
    """
    plain, training = folded(model, allow_new_bias=allow_new_bias), model.training
    try:
        model.eval()
        certificate = _compare(model, plain, images, get_attached(model).config.method)
    finally:
        model.train(training)
    if not certificate.max_abs_difference <= certificate.tolerance:
        raise MergeError(
            f"the merged model differs by {certificate.max_abs_difference:.2e} on {certificate.images} images, above "
            f"{certificate.tolerance:.2e}; keep the adapter attached, or merge in float64 (model.double())"
        )
    return plain, certificate
