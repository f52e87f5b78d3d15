"""What is measured between an adapted model and the plain one it was folded into, and what must hold.

Whether a fold is right is not asked of float32, whose rounding depends on the processor and on how much a model
amplifies it. In float64 a right fold changes an answer by 1e-14 of it, and a wrong one by much more than the 1e-9
allowed. The merged model is that fold with every tensor rounded once. Both models are then held against the answers in
float64: the merged one may err little more than the adapted one does, because it computes the same function in fewer
steps, with one more rounding, of the weights.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.backbones.input_size import input_size
from visgraft.core.fitting import check_shape
from visgraft.data.tasks import LabelTask
from visgraft.errors import MergeError
from visgraft.export.task_proof import agreement_by_task, least_of_tasks

REFERENCE_IMAGES = 16
"""Images that are run in float64; errors are compared over so many, because over a few a ratio says nothing."""

FOLD_TOLERANCE = 1e-9
"""Between the adapted and the folded model in float64: of what a logit varies by between images, so that neither a
constant nor another class hides a mistake. One weight wrong by 0.1 % of itself lies above it (tests/test_merge.py)."""

FLOAT64_ROUNDING = 1e-13
"""Of a logit itself, which is allowed besides; right folds of tiny models of every family stay below 3e-14."""

ERROR_FACTOR = 4.0
"""How much the merged model may err of what the adapted one errs. Rounding a layer's weights errs about as much as
rounding its output, so up to sqrt(2) is expected; what is above that is left to chance."""


@dataclass(frozen=True)
class Certificate:
    """What was measured between the adapted and the merged model; differences and errors are in units of the logits.

    `max_abs_difference` is the largest difference of any logit (of any feature where there is no head) in the model's
    own precision, `dtype`, and `top1_agreement` the share of the `images` with the same highest logit; `source` says
    whether those were real images or seeded noise. `fold_difference` is by how much folding changes a logit in float64,
    and `fold_tolerance` what it had to stay below, of the logit that came nearest. `adapted_error` and `merged_error`
    are the medians over all logits of what each model, in its own precision, errs against the adapted one in float64,
    and `error_tolerance` what the latter had to stay below; all three are None of a model in float64. These five were
    measured on `reference_images` images, with seeded noise in place of those that were lacking or alike. `verdict`
    says all this in a sentence. With several tasks, `tasks` holds what `agreement_by_task` says of each, and
    `top1_agreement` is the lowest of them.
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
    tasks: Mapping[str, Any] = field(default_factory=dict)


def told_of(certificate: Any) -> dict[str, Any]:
    """Return a certificate's fields as plain values, without `tasks` where there is one label."""
    told = asdict(certificate)
    return told if told.get("tasks") else {name: value for name, value in told.items() if name != "tasks"}


def image_batches(images: Any, model: nn.Module) -> tuple[Tensor, Iterator[Tensor], str]:
    """Return the images to run in float64, all images batch by batch, and their source: `images` or `noise`.

    Args:
        images: preprocessed images [B, 3, H, W], or an iterable of such or of (images, labels); None: seeded noise.
        model: says how large images have to be.

    Raises:
        MergeError: there are no images.
        DataError: they do not fit the model.
    """
    source = "noise" if images is None else "images"
    given = [_noise(input_size(model))] if images is None else [images] if isinstance(images, Tensor) else images
    batches, first = _tensors(given, model), list[Tensor]()
    for batch in batches:
        first.append(batch)
        if sum(map(len, first)) >= REFERENCE_IMAGES:
            break
    if not first:
        raise MergeError("no images to measure the merged model on; pass some, or None for seeded noise")
    shape = first[0].shape[1:]
    own = torch.cat([batch.cpu() for batch in first if batch.shape[1:] == shape])[:REFERENCE_IMAGES]
    # Copies of one image are one sample of how rounding goes, and a blank one may be a lucky one.
    reference = torch.cat([own.unique(dim=0), _noise(shape).to(own)])[:REFERENCE_IMAGES]
    return reference, chain(first, batches), source


def _tensors(batches: Iterable[Any], model: nn.Module) -> Iterator[Tensor]:
    """Yield the images [B, 3, H, W] of batches that are not empty, each checked against the model."""
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, tuple | list) else None
        if not isinstance(images, Tensor) or images.ndim != 4:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(batch).__name__
            raise MergeError(f"images to measure on are tensors [B, 3, H, W] or (images, labels), not {shape}")
        if len(images):
            check_shape(model, images.shape[1], images.shape[2:], "images to measure on")
            yield images


def _noise(shape: Iterable[int]) -> Tensor:
    return torch.randn(REFERENCE_IMAGES, *shape, generator=torch.Generator().manual_seed(0))


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's logits [B, classes] in float64, computed on its own device and in its own precision.

    Features that a model without a head leaves unpooled are taken as so many logits.
    """
    like = next(model.parameters())
    with torch.no_grad():
        return model(images.to(like.device, like.dtype)).double().flatten(1)


def fold_difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return by how much a logit of [B, classes] in float64 changes by folding, and what is allowed, where it is worst.

    Raises:
        MergeError: it is more than rounding in float64 makes, or there is nothing to compare.
    """
    masked = (before == before[0]).all(0) & before.isinf().all(0)  # a class that is never to be answered
    if not bool(before[:, ~masked].isfinite().all()):
        raise MergeError(
            "the adapted model itself does not answer in finite numbers, so nothing can be measured; check the images "
            "that were passed, and the adapter"
        )
    found = _differences(before, after).amax(0)
    finite = before.masked_fill(masked, 0.0)
    varies = finite.amax(0) - finite.amin(0)
    allowed = FOLD_TOLERANCE * varies + FLOAT64_ROUNDING * finite.abs().amax(0)
    worst = int(torch.where(found == 0, 0.0, found / allowed).nan_to_num(nan=torch.inf).argmax())
    difference, most = found[worst].item(), allowed[worst].item()
    if not difference <= most:
        raise MergeError(
            f"the folded model is another function: in float64 it differs by {difference:.2e} on {len(before)} images, "
            f"above {most:.2e}; keep the adapter attached, and report this, because a fold should be exact"
        )
    return difference, most


def _differences(before: Tensor, after: Tensor) -> Tensor:
    """Absolute differences; none between equal infinities."""
    return torch.where(before == after, 0.0, (before - after).abs())


def certify(
    model: nn.Module,
    merged: nn.Module,
    batches: Iterable[Tensor],
    first: Tensor,
    truth: Tensor,
    fold: tuple[float, float],
    tasks: Sequence[LabelTask] = (),
) -> dict[str, Any]:
    """Measure both models, in eval mode, in their own precision; return all fields of a certificate but two.

    Args:
        model: the adapted model.
        merged: the plain one.
        batches: images [B, 3, H, W] to compare both on.
        first: images on which both are held against `truth`, the answers of the adapted model in float64.
        fold: what `fold_difference` returned.
        tasks: what the outputs answer, where that is not one label.

    Raises:
        MergeError: the merged model errs more than rounding explains.
    """
    largest, agree, count, pairs = 0.0, 0, 0, list[tuple[Tensor, Tensor]]()
    for batch in batches:
        before, after = answers(model, batch), answers(merged, batch)
        if not torch.equal(before.isfinite(), after.isfinite()) or bool(before.isnan().any()):
            raise MergeError(
                "in its own precision the adapted or the merged model does not answer in finite numbers; check the "
                "images that were passed, and the adapter"
            )
        largest = max(largest, _differences(before, after).max().item())
        agree += int((before.argmax(-1) == after.argmax(-1)).sum())
        count += len(batch)
        pairs += [(before, after)] if tasks else []
    dtype = next(model.parameters()).dtype
    adapted_error, merged_error, allowed = (
        (None, None, None) if dtype == torch.float64 else _errors(model, merged, first, truth)
    )
    verdict = f"in float64 folding changes the logits at worst by {fold[0]:.1e} where {fold[1]:.1e} is allowed"
    if adapted_error is not None:
        verdict += (
            f"; against float64 the merged model errs by {merged_error:.1e} (allowed {allowed:.1e}), the adapted one "
            f"by {adapted_error:.1e}"
        )
    compared = [torch.cat(each) for each in zip(*pairs, strict=True)]
    by_task = agreement_by_task(compared[0], compared[1], tasks) if tasks else {}
    return {
        "max_abs_difference": largest,
        "top1_agreement": least_of_tasks(by_task) if tasks else agree / count,
        "images": count,
        "dtype": str(dtype).removeprefix("torch."),
        "fold_difference": fold[0],
        "fold_tolerance": fold[1],
        "adapted_error": adapted_error,
        "merged_error": merged_error,
        "error_tolerance": allowed,
        "reference_images": len(first),
        "verdict": verdict,
        "tasks": by_task,
    }


def _errors(model: nn.Module, merged: nn.Module, images: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Return what the adapted and the merged model err, and what is allowed of the merged one.

    Raises:
        MergeError: it is more.
    """
    # Medians, because an image on which a network amplifies rounding a thousandfold says nothing about the others.
    finite = truth.isfinite()
    adapted, folded = (
        (answers(one, images).to(truth) - truth)[finite].abs().median().item() for one in (model, merged)
    )
    dtype = next(model.parameters()).dtype
    # No answer in this precision can be expected to be nearer than its own rounding.
    least = torch.finfo(dtype).eps / 2 * truth[finite].abs().median().item()
    allowed = ERROR_FACTOR * max(adapted, least)
    if not folded <= allowed:
        raise MergeError(
            f"rounded to {str(dtype).removeprefix('torch.')}, the merged model errs by {folded:.2e} on {len(images)} "
            f"images where the adapted one errs by {adapted:.2e}, above {allowed:.2e}; keep the adapter attached, or "
            "merge in float64 (model.double())"
        )
    return adapted, folded, allowed
