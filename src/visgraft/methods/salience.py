"""Salient channels: which channels of a frozen backbone answer most strongly to a task's images (SCT, section 1a)."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.core.finding import find_sites
from visgraft.core.fitting import check_shape
from visgraft.core.method import Batches, Grid
from visgraft.core.sites import Site
from visgraft.core.taps import Taps
from visgraft.core.tensors import eval_mode
from visgraft.errors import DataError, VisgraftError

SCORES = ("class_aware", "class_agnostic", "random", "lowest")
EVERY = -1  # in place of a class: all images
SCORING_BATCH = 32  # fixed, because the batch size changes the rounding of the features


class _SquareSums:
    """Act that adds the squares of a site's patch tokens to fp64 sums per class: {label: [channels]}."""

    def __init__(self) -> None:
        self.images = 0
        self.members: dict[int, list[int]] = {}
        self.sums: dict[int, Tensor] = {}

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        value = value[:, grid.prefix_tokens :].unflatten(0, (self.images, -1))  # the windows of an image are adjacent
        # On a CPU image by image: a batch's features in fp64 do not fit its caches, and take several times as long.
        parts = value.split(1) if value.device.type == "cpu" else (value,)
        squares = torch.cat([part.double().square().sum(dim=2).sum(dim=1) for part in parts])
        for label, rows in self.members.items():
            self.sums[label] = self.sums.get(label, 0) + squares[rows].sum(dim=0)
        return onto


def _members(labels: Tensor) -> dict[int, list[int]]:
    """Return which images of a batch have each class; where they may have several, `EVERY` leads to all of them."""
    if labels.ndim == 2:
        having = {label: column.nonzero()[:, 0].tolist() for label, column in enumerate(labels.T)}
        return {EVERY: list(range(len(labels)))} | {label: rows for label, rows in having.items() if rows}
    members: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(row)
    return members


def channel_squares(model: nn.Module, batches: Batches, site: str) -> list[dict[int, Tensor]]:
    """Return per block the fp64 sums over images and patch tokens of a site's squared channels: {label: [channels]}.

    The model runs plain, in eval mode and without gradient, in batches of a fixed size, so the result does not
    depend on how the caller batches. Prefix tokens (class token, registers) are left out. Where images may have
    several classes (labels [B, classes] of 0 and 1), each counts for all of its classes, and `EVERY` holds the sum
    over all images.
    """
    return _squares_at(model, batches, [site])[site]


def _squares_at(model: nn.Module, batches: Batches, names: Sequence[str]) -> dict[str, list[dict[int, Tensor]]]:
    """`channel_squares` of several sites in one pass over the images."""
    blocks = find_sites(model).blocks
    acts = {name: [_SquareSums() for _ in blocks] for name in names}
    taps = Taps()
    for name, found in acts.items():
        for sites, act in zip(blocks, found, strict=True):
            taps.put(model, sites[name], act)
    apart: dict[str, Any] = {path: model.get_submodule(path) for path in _separate_biases(blocks, names)}
    before = {path: attention.qkv_bias_separate for path, attention in apart.items()}
    like = next(model.parameters())
    try:
        for attention in apart.values():
            attention.qkv_bias_separate = True
        with torch.no_grad(), eval_mode(model):
            for images, labels in _rebatch(model, batches):
                members = _members(labels)
                for act in chain.from_iterable(acts.values()):
                    act.members, act.images = members, len(images)
                model(images.to(like.device, like.dtype))
    finally:
        taps.remove()
        for path, attention in apart.items():
            attention.qkv_bias_separate = before[path]
    sums = {name: [act.sums for act in found] for name, found in acts.items()}
    if not sums[names[0]][0]:
        raise VisgraftError("no images to score channels with: `batches` is empty; pass (images, labels) of the task")
    return sums


def _separate_biases(blocks: Sequence[Mapping[str, Site]], names: Sequence[str]) -> set[str]:
    """Attentions that must be told to add their bias apart, so that the sites' tensors pass."""
    paths = {sites[name].separate_bias for sites in blocks for name in names}
    return {path for path in paths if path}


def _rebatch(model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same images in the same order, in batches of the fixed size.

    Raises:
        DataError: something is no batch of images and labels, or its images do not fit the model.
    """
    images, labels = torch.empty(0), torch.empty(0, dtype=torch.long)
    for batch in batches:
        more_images, more_labels = _checked(model, batch)
        images = torch.cat([images, more_images]) if len(images) else more_images
        labels = torch.cat([labels, more_labels.cpu()]) if len(labels) else more_labels.cpu()
        while len(labels) >= SCORING_BATCH:
            yield images[:SCORING_BATCH], labels[:SCORING_BATCH]
            images, labels = images[SCORING_BATCH:], labels[SCORING_BATCH:]
    if len(labels):
        yield images, labels


def _checked(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images [B, 3, H, W] and labels of a batch, checked."""
    pair: tuple[Any, Any] = (batch[0], batch[1]) if isinstance(batch, tuple | list) and len(batch) == 2 else (0, 0)
    images, labels = pair
    tensors = isinstance(images, Tensor) and isinstance(labels, Tensor)
    if not (tensors and images.ndim == 4 and labels.ndim > 0 and len(images) == len(labels)):
        raise DataError(
            "`batches` must yield pairs (images [B, 3, H, W], labels [B]) of tensors; pass images.batches() of "
            "visgraft.Images, a DataLoader, or a list [(images, labels)]"
        )
    check_shape(model, images.shape[1], images.shape[2:], "images to score channels with")
    return images, labels


def _class_aware(sums: dict[int, Tensor]) -> Tensor:
    """Mean over the classes of each channel's norm: S[k] = mean_c sqrt(sum h[i, t, k]²)."""
    classes = sorted(sums.keys() - {EVERY})
    if not classes:
        raise VisgraftError("none of the images has a class to score channels by; use the score class_agnostic")
    return torch.stack([sums[label].sqrt() for label in classes]).mean(dim=0)


def _class_agnostic(sums: dict[int, Tensor]) -> Tensor:
    """One norm over all images."""
    total = sums[EVERY] if EVERY in sums else torch.stack([sums[label] for label in sorted(sums)]).sum(dim=0)
    return total.sqrt()


def _lowest(sums: dict[int, Tensor]) -> Tensor:
    """The class-aware score turned round."""
    return -_class_aware(sums)


SCORE_FUNCTIONS: dict[str, Callable[[dict[int, Tensor]], Tensor]] = {
    "class_aware": _class_aware,
    "class_agnostic": _class_agnostic,
    "lowest": _lowest,
}


def salient_channels(
    model: nn.Module,
    batches: Batches | None,
    channels: int | None,
    site: str = "stream.mid",
    score: str = "class_aware",
) -> list[Tensor]:
    """Return the highest-scoring `channels` of each block, in ascending order: one int64 [channels] per block.

    Args:
        model: the plain backbone, nothing attached.
        batches: the task's training images [B, 3, H, W] without augmentation, and labels (int64 [B], or [B, classes]
            of 0 and 1 where images may have several classes); not needed for `random`.
        channels: how many to choose per block; None: an eighth of each block's width.
        site: where the features are read: `stream.mid` for SCT's mode attn, `stream.out` for its mode mlp, `attn.q`
            and `attn.v` for its mode qkv.
        score: `class_aware` (the paper's), `class_agnostic`, `lowest` (its opposite) or `random` (torch's generator).

    Raises:
        VisgraftError: an unknown score or site, more channels than there are, or no images where they are needed.
        DataError: the images do not fit the model, or `batches` holds something else.
    """
    return salient_channels_at(model, batches, channels, [site], score)[site]


def salient_channels_at(
    model: nn.Module,
    batches: Batches | None,
    channels: int | None,
    names: Sequence[str],
    score: str,
    among: Collection[int] | None = None,
) -> dict[str, list[Tensor]]:
    """`salient_channels` of several sites, each scored on its own, in one pass over the images: {site: per block}.

    Of blocks that are not `among` those asked for (None: all) no channel is chosen.
    """
    if score not in SCORES:
        raise VisgraftError(f"unknown score {score!r}; choose one of {', '.join(SCORES)}")
    blocks = find_sites(model).blocks
    asked = range(len(blocks)) if among is None else among
    counts: dict[str, list[int]] = {}
    for name in names:
        if any(name not in sites for sites in blocks):
            raise VisgraftError(f"channels cannot be scored at {name!r}; this backbone has {', '.join(blocks[0])}")
        narrowest = min(blocks[block][name].width for block in asked)
        if channels is not None and not 0 < channels <= narrowest:
            raise VisgraftError(f"channels is {channels}, but {name} has 1 to {narrowest}; choose fewer")
        counts[name] = [(channels or s[name].width // 8) if i in asked else 0 for i, s in enumerate(blocks)]
    if score == "random":
        chosen = {n: [torch.randperm(sites[n].width)[:k] for sites, k in _each(blocks, counts[n])] for n in names}
    elif batches is None:
        raise VisgraftError(
            f"the score {score!r} looks at the task's images: pass `batches` of (images, labels), or use score 'random'"
        )
    else:
        squares, formula = _squares_at(model, batches, names), SCORE_FUNCTIONS[score]
        chosen = {n: [formula(sums).topk(k).indices.cpu() for sums, k in _each(squares[n], counts[n])] for n in names}
    return {name: [index.sort().values for index in per_block] for name, per_block in chosen.items()}


def _each(blocks: Sequence[Any], counts: Sequence[int]) -> Iterator[tuple[Any, int]]:
    """Pair what there is of every block with how many channels it gets."""
    return zip(blocks, counts, strict=True)
