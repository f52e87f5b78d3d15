"""Salient channels: which channels of a frozen backbone answer most strongly to a task's images (SCT, section 1a)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from visgraft.errors import VisgraftError
from visgraft.method import Batches
from visgraft.sites import find_grid, find_sites
from visgraft.taps import tap

SCORES = ("class_aware", "class_agnostic", "random", "lowest")
SCORING_BATCH = 32  # fixed, because the batch size changes the rounding of the features


class _SquareSums:
    """Act that adds the squares of a site's patch tokens to fp64 sums per class: {label: [channels]}."""

    def __init__(self, prefix_tokens: int) -> None:
        self.prefix_tokens = prefix_tokens
        self.labels: list[int] = []
        self.sums: dict[int, Tensor] = {}

    def __call__(self, value: Tensor, onto: Tensor) -> Tensor:
        squares = value[:, self.prefix_tokens :].double().square().sum(dim=1)
        for label in set(self.labels):
            rows = [i for i, other in enumerate(self.labels) if other == label]
            self.sums[label] = self.sums.get(label, 0) + squares[rows].sum(dim=0)
        return onto


def channel_squares(model: nn.Module, batches: Batches, site: str) -> list[dict[int, Tensor]]:
    """Return per block the fp64 sums over images and patch tokens of a site's squared channels: {label: [channels]}.

    The model runs plain, in eval mode and without gradient, in batches of a fixed size, so the result does not
    depend on how the caller batches. Prefix tokens (class token, registers) are left out.
    """
    blocks = find_sites(model)
    prefix = find_grid(model).prefix_tokens
    acts = [_SquareSums(prefix) for _ in blocks]
    handles = [handle for sites, act in zip(blocks, acts, strict=True) for handle in tap(model, sites[site], act)]
    modes = {module: module.training for module in model.modules()}
    like = next(model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            for images, labels in _rebatch(batches):
                for act in acts:
                    act.labels = labels.tolist()
                model(images.to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not acts[0].sums:
        raise VisgraftError("no images to score channels with: `batches` is empty; pass (images, labels) of the task")
    return [act.sums for act in acts]


def _rebatch(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same images in the same order, in batches of the fixed size."""
    images, labels = torch.empty(0), torch.empty(0, dtype=torch.long)
    for more_images, more_labels in batches:
        images = torch.cat([images, more_images]) if len(images) else more_images
        labels = torch.cat([labels, more_labels.cpu()])
        while len(labels) >= SCORING_BATCH:
            yield images[:SCORING_BATCH], labels[:SCORING_BATCH]
            images, labels = images[SCORING_BATCH:], labels[SCORING_BATCH:]
    if len(labels):
        yield images, labels


def _class_aware(sums: dict[int, Tensor]) -> Tensor:
    """Mean over the classes of each channel's norm: S[k] = mean_c sqrt(sum h[i, t, k]²)."""
    return torch.stack([sums[label].sqrt() for label in sorted(sums)]).mean(dim=0)


def _class_agnostic(sums: dict[int, Tensor]) -> Tensor:
    """One norm over all images."""
    return torch.stack([sums[label] for label in sorted(sums)]).sum(dim=0).sqrt()


def _lowest(sums: dict[int, Tensor]) -> Tensor:
    """The class-aware score turned round."""
    return -_class_aware(sums)


_SCORES: dict[str, Callable[[dict[int, Tensor]], Tensor]] = {
    "class_aware": _class_aware,
    "class_agnostic": _class_agnostic,
    "lowest": _lowest,
}


def salient_channels(
    model: nn.Module,
    batches: Batches | None,
    channels: int,
    site: str = "stream.mid",
    score: str = "class_aware",
) -> list[Tensor]:
    """Return the `channels` highest-scoring channels of each block, in ascending order: one int64 [channels] per block.

    Args:
        model: the plain backbone, nothing attached.
        batches: the task's training images [B, 3, H, W] without augmentation, and labels [B]; not needed for `random`.
        channels: how many to choose per block.
        site: where the features are read: `stream.mid` for SCT's mode attn, `stream.out` for its mode mlp.
        score: `class_aware` (the paper's), `class_agnostic`, `lowest` (its opposite) or `random` (torch's generator).

    Raises:
        VisgraftError: an unknown score or site, more channels than there are, or no images where they are needed.
    """
    if score not in SCORES:
        raise VisgraftError(f"unknown score {score!r}; choose one of {', '.join(SCORES)}")
    blocks = find_sites(model)
    if site not in blocks[0]:
        raise VisgraftError(f"channels cannot be scored at {site!r}; this backbone has {', '.join(blocks[0])}")
    if not 0 < channels <= blocks[0][site].width:
        raise VisgraftError(f"channels is {channels}, but {site} has 1 to {blocks[0][site].width}; choose fewer")
    if score == "random":
        return [torch.randperm(sites[site].width)[:channels].sort().values for sites in blocks]
    if batches is None:
        raise VisgraftError(
            f"the score {score!r} looks at the task's images: pass `batches` of (images, labels), or use score 'random'"
        )
    scores = [_SCORES[score](sums) for sums in channel_squares(model, batches, site)]
    return [s.topk(channels).indices.sort().values.cpu() for s in scores]
