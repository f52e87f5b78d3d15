"""Merge: fold an attached method into the backbone, and measure that the plain model answers as the adapted one."""

import copy
import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from visgraft.backbones.wrappers import unwrapped
from visgraft.core.attach import strip
from visgraft.core.attached import get_attached
from visgraft.core.dryrun import meta_copy
from visgraft.core.method import Position, TokenMethod
from visgraft.core.placing import find_positions
from visgraft.core.sites import Sites
from visgraft.core.tensors import eval_mode
from visgraft.errors import MergeError, VisgraftError
from visgraft.export.affine import FoldTarget, add_missing_biases, fold, fold_target, probe, refusal
from visgraft.export.certificate import Certificate, answers, certify, fold_difference, image_batches
from visgraft.methods import get_method
from visgraft.option_types import choices_of, convert, types_of
from visgraft.options import MethodConfig


def why_not_merged(model: nn.Module, config: MethodConfig, allow_new_bias: bool = False) -> str | None:
    """Return why a method with these options does not fold exactly into a plain backbone; None where it does.

    Raises:
        SiteError: it cannot be attached there in the first place.
    """
    return _refusal(model, config, *find_positions(model, config), allow_new_bias)


def _refusal(
    model: nn.Module, config: MethodConfig, positions: Collection[Position], sites: Sites, allow_new_bias: bool
) -> str | None:
    """`why_not_merged` where positions and sites are known."""
    method = get_method(config.method)
    if config.passes:
        return "answers each task in a pass of its own, with other weights"
    if issubclass(method, TokenMethod):
        return "inserts tokens, which no weight can take over"
    for position in positions:
        target = fold_target(*sites.at(position))
        if target is None:
            return f"changes {position.place.adds_to}, which no linear layer alone produces or reads"
        if not config.affine:
            return "is not linear"
        taking = _with_biases(model, target) if allow_new_bias else model
        reason = refusal(taking, target, config.shifts, config.diagonal)
        if reason:
            return reason
    return None


def _with_biases(model: nn.Module, target: FoldTarget) -> nn.Module:
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
    hints = types_of(type(config))
    for name in sorted(hints, key=lambda name: not isinstance(getattr(config, name), bool)):
        current = getattr(config, name)
        for choice in [not current] if isinstance(current, bool) else choices_of(hints[name]):
            try:
                value = convert(choice, hints[name], name, typed=isinstance(choice, str))
                if mergeable(model, dataclasses.replace(config, **{name: value})):
                    return f"train it with {name}={choice}, which folds, or keep the adapter attached"
            except (VisgraftError, TypeError):
                continue
    return "keep the adapter attached"


def _fold_all(model: nn.Module, plain: nn.Module, allow_new_bias: bool) -> None:
    """Fold every position of the attached model into the plain copy."""
    attached = get_attached(model)
    reason = _refusal(plain, attached.config, attached.where.values(), attached.sites, allow_new_bias)
    if reason:
        advice = remedy(plain, attached.config)
        raise MergeError(f"{attached.config.method} {reason}, so it cannot be folded exactly; {advice}")
    for key, position in attached.where.items():
        reads, adds_to = attached.sites.at(position)
        target = fold_target(reads, adds_to)
        assert target is not None
        module: Any = attached.positions[key]
        affine = probe(module, position, reads.grid, attached.shared, attached.config.diagonal)
        if allow_new_bias and bool(affine.shift.any()):
            add_missing_biases(plain, target)
        fold(plain, target, affine)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise MergeError(f"the model is in {dtype}, in which folding rounds visibly; call model.float() first")


def folded(model: nn.Module, *, allow_new_bias: bool = False) -> nn.Module:
    """Return a plain copy in eval mode with the method folded into its weights, without measuring it (see `merge`).

    Raises:
        MergeError: the method cannot be folded exactly here.
    """
    attached, model = get_attached(model), unwrapped(model)
    _check_dtype(next(model.parameters()).dtype)
    # The digest is handed on as it is: a copy of it would make it, and the plain model has none.
    plain = strip(copy.deepcopy(model, {id(attached.plain): attached.plain})).eval()
    _fold_all(model, plain, allow_new_bias)
    return plain


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode in float64, on the CPU where the model's device has no float64 (Apple's GPUs)."""
    plain = get_attached(model).plain
    device = "cpu" if next(model.parameters()).device.type == "mps" else next(model.parameters()).device
    # The digest is handed on as it is: a copy of it would make it.
    return copy.deepcopy(model, {id(plain): plain}).to(device, torch.float64).eval()


def _rounded(exact: nn.Module, like: nn.Module) -> nn.Module:
    """Give every tensor, in place, the device and the precision that it has in another model."""
    usual = next(like.parameters())
    own = {**dict(like.named_parameters()), **dict(like.named_buffers())}
    for name, tensor in (*exact.named_parameters(), *exact.named_buffers()):
        target = own.get(name, usual)  # a bias may be new
        tensor.data = tensor.data.to(target.device, target.dtype)
    return exact


@torch.inference_mode(False)  # in it, the merged model's tensors could not be trained later
def merge(model: nn.Module, images: Any = None, *, allow_new_bias: bool = False) -> tuple[nn.Module, Certificate]:
    """Return a plain copy of the model with the method folded into its weights, and the measured certificate.

    The fold is made and proven in float64 and rounded once; meanwhile two copies of the model are held in float64.

    Args:
        model: a model with something attached, in float32 or float64; it is left as it is.
        images: preprocessed images [B, 3, H, W], or an iterable of such or of (images, labels); None: seeded noise.
        allow_new_bias: give a linear layer without bias one, where the adapter adds a constant; the merged model then
            has tensors that timm's constructor does not make.

    Raises:
        MergeError: the method cannot be folded exactly here, the folded model is another function, rounding does more
            to it than to the adapted one, or there is nothing to measure on.
        DataError: the images do not fit the model.
    """
    attached, model = get_attached(model), unwrapped(model)
    _check_dtype(next(model.parameters()).dtype)
    first, batches, source = image_batches(images, model)  # before the fold, so that wrong ones are named at once
    reference = in_float64(model)
    exact = folded(reference, allow_new_bias=allow_new_bias)
    truth = answers(reference, first)
    difference = fold_difference(truth, answers(exact, first))
    del reference
    plain = _rounded(exact, model)
    with eval_mode(model):
        measured = certify(model, plain, batches, first, truth, difference)
    return plain, Certificate(attached.config.method, source=source, **measured)
