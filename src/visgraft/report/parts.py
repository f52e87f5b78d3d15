"""What each part of a method contributes (ALoRE's experts): where in a picture it acts, and what it does alone."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from visgraft.core.attached import get_attached
from visgraft.core.method import Grid, MadeOfParts
from visgraft.data.images import Images
from visgraft.export.merge import folded, mergeable
from visgraft.measure.evaluation import evaluate
from visgraft.pictures import Picture, Values, colour_grid, heat_map, photograph
from visgraft.report.mistakes import picture_of

MOST_PARTS = 8
PICTURES = 4


@dataclass(frozen=True)
class Tile:
    """What one part adds in one picture: its norm over the picture, and its main directions as colours."""

    norm: Picture
    directions: Picture


@dataclass(frozen=True)
class PartRow:
    """One picture: as it is, what enters the method's module there, and one tile per part.

    `scale` is what the norms' clear and red stand for, in per cent of the mean norm of what enters.
    """

    picture: Picture
    enters: Picture
    tiles: tuple[Tile, ...]
    scale: tuple[float, float]


@dataclass(frozen=True)
class Alone:
    """The figure (top-1, or mean average precision) of the model with one part alone and with all but that part."""

    name: str
    alone: float
    without: float


@dataclass(frozen=True)
class PartsShown:
    """The parts of a method as the page shows them.

    `shown` are the numbers, from 1, of the parts in the pictures, taken at `place` of `block` (from 1) of `blocks`;
    `strength` the norm of what they add there, in per cent of what enters. `none` and `all` are the figures with no
    part and with all; `merged` says whether all figures are those of plain merged models.
    """

    name: str
    shown: tuple[int, ...]
    strength: tuple[float, ...]
    block: int
    blocks: int
    place: str
    rows: tuple[PartRow, ...]
    alone: tuple[Alone, ...]
    none: float
    all: float
    merged: bool


class Shown(NamedTuple):
    """The module whose parts the page shows, its block counted from 0, and the site it reads."""

    module: MadeOfParts
    block: int
    site: str


def made_of_parts(model: nn.Module) -> Shown | None:
    """Return the module whose parts are shown, the first of a late block; None: it is not made of parts."""
    attached = get_attached(model)
    late = max(len(attached.sites.blocks) - 2, 0)  # in the last block only the class token goes on: patches are idle
    inside = {key: position.block for key, position in attached.where.items() if position.block is not None}
    late = min(late, max(inside.values(), default=0))
    for key, block in inside.items():
        module = attached.positions[key]
        if block >= late and isinstance(module, MadeOfParts):
            return Shown(module, block, attached.where[key].place.reads)
    return None


def show_parts(model: nn.Module, images: Images, precision: str) -> PartsShown | None:
    """Return what the parts of the attached method do on these images; None where it is not made of parts."""
    made = made_of_parts(model)
    if made is None:
        return None
    module, blocks = made.module, len(get_attached(model).sites.blocks)
    count, name = module.parts, module.part_name
    with_parts = count_alone(model, images, count, precision, name)
    chosen = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int)
    x, grid = entering(
        model, cast(nn.Module, module), images.normalised(torch.stack([images.pixels[int(i)] for i in chosen]))
    )
    with torch.no_grad():
        patches = x[:, grid.prefix_tokens :]
        added = [module.part_delta(patches, part).float().cpu() for part in range(count)]
    patches = patches.float().cpu()
    size = patches.norm(dim=-1).mean().item()
    strength = [100 * part.norm(dim=-1).mean().item() / max(size, 1e-12) for part in added]
    shown = sorted(sorted(range(count), key=lambda i: -strength[i])[:MOST_PARTS])
    rows = _rows(images, chosen.tolist(), patches, [added[i] for i in shown], shown, grid[:2], name)
    return PartsShown(
        name, tuple(i + 1 for i in shown), tuple(strength[i] for i in shown), made.block + 1, blocks,
        made.site, rows, *with_parts,
    )  # fmt: skip


def entering(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, Grid]:
    """Return the tensor [B, N, C] that enters an attached module when the model sees normalised images [B, 3, H, W].

    The grid says how its tokens lie.
    """
    seen: list[tuple[Tensor, Grid]] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[2])))
    like = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(x.to(like.device, like.dtype))
    finally:
        handle.remove()
    return seen[0]


def _rows(
    images: Images, chosen: Sequence[int], patches: Tensor, added: Sequence[Tensor], shown: Sequence[int],
    size: tuple[int, int], name: str,
) -> tuple[PartRow, ...]:  # fmt: skip
    """Draw one row per picture; a colour means the same direction in all pictures of a column."""
    entering_norm = max(patches.norm(dim=-1).mean().item(), 1e-12)
    enters, directions = _colours(patches, size), [_colours(part, size) for part in added]
    rows = []
    for row, index in enumerate(chosen):
        pixels = picture_of(images, index)
        norms = [part[row].norm(dim=-1).view(size).numpy().astype(np.float64) for part in added]
        low, high = float(np.min(norms)), float(np.max(norms))
        tiles = tuple(
            Tile(
                heat_map(pixels, (norm - low) / max(high - low, 1e-12), f"Where {name} {part + 1} adds most"),
                colour_grid(colours[row], f"Main directions of what {name} {part + 1} adds"),
            )
            for part, norm, colours in zip(shown, norms, directions, strict=True)
        )
        picture = photograph(pixels, "The picture")
        scale = (100 * low / entering_norm, 100 * high / entering_norm)
        rows.append(PartRow(picture, colour_grid(enters[row], "Main directions of what enters"), tiles, scale))
    return tuple(rows)


def _colours(tokens: Tensor, size: tuple[int, int]) -> Values:
    """Map tokens [B, N, C] to colours [B, height, width, 3]: their first three principal components over all pictures.

    They are taken of what differs within pictures, since otherwise each picture would have but one colour. Each runs
    from 0 to 1 between its 1st and 99th percentile; where nothing varies, all is grey.
    """
    flat = (tokens - tokens.mean(dim=1, keepdim=True)).flatten(0, 1).double().numpy()
    count = min(3, *flat.shape)
    found = np.zeros((len(flat), 3))
    if flat.std() > 1e-12:
        found[:, :count] = PCA(count, svd_solver="full").fit_transform(flat)
    low, high = np.percentile(found, (1, 99), axis=0)
    scaled = np.where(high - low > 1e-9, (found - low) / np.maximum(high - low, 1e-9), 0.5)
    return np.clip(scaled, 0, 1).reshape(len(tokens), *size, 3)


def count_alone(
    model: nn.Module, images: Images, count: int, precision: str, name: str
) -> tuple[tuple[Alone, ...], float, float, bool]:
    """Measure the model with each part alone and without it, with no part, and with all.

    Each is a plain model, into which only the parts kept were merged, where the method folds into this backbone.
    """
    attached = get_attached(model)
    folds = mergeable(model, attached.config)
    everything = range(count)

    def figure(kept: Collection[int]) -> float:
        changed = keep_parts(model, kept)
        return evaluate(folded(changed) if folds else changed, images, precision, resamples=0).figure

    rows = tuple(
        Alone(f"{name} {i + 1}", figure((i,)), figure([other for other in everything if other != i]))
        for i in everything
    )
    return rows, figure(()), figure(everything), folds


def keep_parts(model: nn.Module, kept: Collection[int]) -> nn.Module:
    """Return a copy of an adapted model in which only the parts in `kept` add anything."""
    changed = copy.deepcopy(model)
    for module in get_attached(changed).positions.values():
        assert isinstance(module, MadeOfParts)
        module.keep_parts(kept)
    return changed
