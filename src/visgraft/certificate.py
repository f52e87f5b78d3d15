"""What is measured between an adapted model and the plain one it was folded into, and what must hold.

Whether a fold is right is not asked of float32, whose rounding depends on the processor and on how much a model
amplifies it. In float64 a right fold changes the answers by 1e-14 of the largest, and a wrong one by much more than
the 1e-9 allowed. The merged model is that fold with every tensor rounded once. Both models are then held against the
answers in float64: the merged one may err little more than the adapted one does, because it computes the same function
in fewer steps, with one more rounding, of the weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.errors import MergeError
from visgraft.input_size import input_size

REFERENCE_IMAGES = 16
"""Images that are run in float64; errors are compared over so many, because over a few a ratio says nothing."""

FOLD_TOLERANCE = 1e-9
"""Of the largest logit, between the adapted and the folded model in float64. Right folds of tiny models of every family
stay below 3e-14; one weight wrong by 0.1 % of itself lies above it (tests/test_merge.py)."""

ERROR_FACTOR = 4.0
"""How much the merged model may err of what the adapted one errs. Rounding a layer's weights errs about as much as
rounding its output, so up to sqrt(2) is expected; what is above that is left to chance."""


@dataclass(frozen=True)
class Certificate:
    """What was measured between the adapted and the merged model; differences and errors are in units of the logits.

    `max_abs_difference` is the largest difference of any logit (of any feature where there is no head) in the model's
    own precision, `dtype`, and `top1_agreement` the share of the `images` with the same highest logit; `source` says
    whether those were real images or seeded noise. `fold_difference` is the largest difference of any logit in float64
    and `fold_tolerance` what it had to stay below. `adapted_error` and `merged_error` are the root mean squares of what
    each model, in its own precision, errs against the adapted one in float64, and `error_tolerance` what the latter had
    to stay below; all three are None of a model in float64. These five were measured on `reference_images` images, with
    seeded noise in place of those that were lacking. `verdict` says all this in a sentence.
    """

    method: str
    max_abs_difference: float
    top1_agreement: float
    images: int
    source: str
    dtype: str
    fold_difference: float
    fold_tolerance: float
    adapted_error: float | None
    merged_error: float | None
    error_tolerance: float | None
    reference_images: int
    verdict: str


def image_batches(images: Any, model: nn.Module) -> tuple[Tensor, Iterator[Tensor], str]:
    """Return the images to run in float64, all images batch by batch, and their source: `images` or `noise`.

    Args:
        images: preprocessed images [B, 3, H, W], or an iterable of such or of (images, labels); None: seeded noise.
        model: says how large noise has to be.

    Raises:
        MergeError: there are no images.
    """
    source = "noise" if images is None else "images"
    given = [_noise(input_size(model))] if images is None else [images] if isinstance(images, Tensor) else images
    batches, first = _tensors(given), list[Tensor]()
    for batch in batches:
        first.append(batch)
        if sum(map(len, first)) >= REFERENCE_IMAGES:
            break
    if not sum(map(len, first)):
        raise MergeError("no images to measure the merged model on; pass some, or None for seeded noise")
    shape = first[0].shape[1:]
    reference = [batch.cpu() for batch in first if batch.shape[1:] == shape]
    reference.append(_noise(shape).to(reference[0]))
    return torch.cat(reference)[:REFERENCE_IMAGES], chain(first, batches), source


def _tensors(batches: Iterable[Any]) -> Iterator[Tensor]:
    return (batch if isinstance(batch, Tensor) else batch[0] for batch in batches)


def _noise(shape: Iterable[int]) -> Tensor:
    return torch.randn(REFERENCE_IMAGES, *shape, generator=torch.Generator().manual_seed(0))


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's logits [B, classes] in float64, computed on its own device and in its own precision."""
    like = next(model.parameters())
    with torch.no_grad():
        return model(images.to(like.device, like.dtype)).double()


def fold_difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the largest difference of logits computed in float64 before and after folding, and what is allowed.

    Raises:
        MergeError: it is more than rounding in float64 makes.
    """
    found, allowed = (before - after).abs().max().item(), FOLD_TOLERANCE * before.abs().max().item()
    if not found <= allowed:
        raise MergeError(
            f"the folded model is another function: in float64 it differs by {found:.2e} on {len(before)} images, "
            f"above {allowed:.2e}; keep the adapter attached, and report this, because a fold should be exact"
        )
    return found, allowed


def certify(
    model: nn.Module,
    merged: nn.Module,
    batches: Iterable[Tensor],
    first: Tensor,
    truth: Tensor,
    fold: tuple[float, float],
) -> dict[str, Any]:
    """Measure both models, in eval mode, in their own precision; return all fields of a certificate but two.

    Args:
        model: the adapted model.
        merged: the plain one.
        batches: images [B, 3, H, W] to compare both on.
        first: images on which both are held against `truth`, the answers of the adapted model in float64.
        fold: what `fold_difference` returned.

    Raises:
        MergeError: the merged model errs more than rounding explains.
    """
    largest, agree, count = 0.0, 0, 0
    for batch in batches:
        before, after = answers(model, batch), answers(merged, batch)
        largest = max(largest, (before - after).abs().max().item())
        agree += int((before.argmax(-1) == after.argmax(-1)).sum())
        count += len(batch)
    dtype = next(model.parameters()).dtype
    adapted_error, merged_error, allowed = (
        (None, None, None) if dtype == torch.float64 else _errors(model, merged, first, truth)
    )
    verdict = f"folding changes no logit by more than {fold[0]:.1e} in float64 (allowed {fold[1]:.1e})"
    if adapted_error is not None:
        verdict += (
            f"; against float64 the merged model errs by {merged_error:.1e} (allowed {allowed:.1e}), the adapted one "
            f"by {adapted_error:.1e}"
        )
    return {
        "max_abs_difference": largest,
        "top1_agreement": agree / count,
        "images": count,
        "dtype": str(dtype).removeprefix("torch."),
        "fold_difference": fold[0],
        "fold_tolerance": fold[1],
        "adapted_error": adapted_error,
        "merged_error": merged_error,
        "error_tolerance": allowed,
        "reference_images": len(first),
        "verdict": verdict,
    }


def _errors(model: nn.Module, merged: nn.Module, images: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Return what the adapted and the merged model err, and what is allowed of the merged one.

    Raises:
        MergeError: it is more.
    """
    adapted, folded = (
        (answers(one, images).to(truth) - truth).square().mean().sqrt().item() for one in (model, merged)
    )
    dtype = next(model.parameters()).dtype
    # No answer in this precision can be expected to be nearer than its own rounding.
    least = torch.finfo(dtype).eps / 2 * truth.square().mean().sqrt().item()
    allowed = ERROR_FACTOR * max(adapted, least)
    if not folded <= allowed:
        raise MergeError(
            f"rounded to {str(dtype).removeprefix('torch.')}, the merged model errs by {folded:.2e} on {len(images)} "
            f"images where the adapted one errs by {adapted:.2e}, above {allowed:.2e}; keep the adapter attached, or "
            "merge in float64 (model.double())"
        )
    return adapted, folded, allowed
