"""Which channels a method chose: a map of blocks × channels with their salience scores and the chosen ones marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from visgraft.adapters.directory import TENSORS, read_tensors
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import create_backbone
from visgraft.core.attach import assemble
from visgraft.core.attached import get_attached
from visgraft.core.method import Batches, ChoosesChannels
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError
from visgraft.methods import get_method
from visgraft.methods.salience import SCORE_FUNCTIONS, channel_squares
from visgraft.pictures import ORANGE, Picture, Values, draw

Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Choice:
    """The channels chosen by `score` at one site: `marks` [blocks, channels], and its `blocks` by number from 0."""

    site: str
    score: str
    blocks: tuple[int, ...]
    marks: Marks


@dataclass(frozen=True)
class ChannelMap:
    """A choice as the page shows it: how many channels of how many are tuned per block, and the picture.

    `always` and `never` count the channels chosen in all blocks and in none; `held` is the mean share of the salience
    that the chosen channels hold, None where the scores are not known.
    """

    site: str
    score: str
    chosen: int
    width: int
    blocks: int
    always: int
    never: int
    held: float | None
    picture: Picture


def choices(model: nn.Module) -> list[Choice]:
    """Return the channels that an attached method works on, site by site and, in stages, width by width.

    Empty where it works on all channels.
    """
    attached = get_attached(model)
    found: dict[tuple[str, str, int], list[tuple[int, torch.Tensor]]] = {}
    for key, position in attached.where.items():
        module = attached.positions[key]
        if isinstance(module, ChoosesChannels) and position.block is not None:
            site, index, score = module.chosen_channels()
            found.setdefault((site, score, position.adds_width), []).append((position.block, index))
    result = []
    for (site, score, width), rows in found.items():
        marks = np.zeros((len(rows), width), dtype=bool)
        for row, (_, index) in zip(marks, rows, strict=True):
            row[index.cpu().numpy()] = True
        result.append(Choice(site, score, tuple(block for block, _ in rows), marks))
    return result


def stored_choices(adapter: Path, record: AdapterRecord) -> list[Choice]:
    """`choices` of an adapter's file alone: its modules are built without the backbone's weights.

    Raises:
        AdapterError: its tensors are missing, damaged, or not those of its configuration.
        VisgraftError: the backbone's architecture is not known here.
    """
    if not issubclass(get_method(record.method.method), ChoosesChannels):
        return []
    tensors = read_tensors(adapter)
    with torch.device("meta"):
        model = assemble(create_backbone(record.located(adapter, "none"), record.outputs), record.method)
    for key, module in get_attached(model).positions.items():
        inside = f"{CHILD}.positions.{key}."
        own = {name.removeprefix(inside): t for name, t in tensors.items() if name.startswith(inside)}
        try:
            module.load_state_dict(own, assign=True)
        except RuntimeError as error:
            file = adapter / TENSORS
            raise AdapterError(f"{file} does not fit its config at {key}; restore it or train again") from error
    return choices(model)


def channel_scores(model: nn.Module, batches: Batches, choice: Choice) -> Values:
    """Return the salience [blocks, channels] by which the choice was made, on the plain frozen backbone.

    Where channels were drawn at random, or the lowest taken, it is the class-aware score all the same.
    """
    squares = channel_squares(model, batches, choice.site)
    formula = SCORE_FUNCTIONS["class_agnostic" if choice.score == "class_agnostic" else "class_aware"]
    return np.stack([formula(squares[block]).cpu().numpy() for block in choice.blocks])


def channel_order(marks: Marks, scores: Values | None) -> NDArray[np.int64]:
    """Order channels so that the map can be read: those chosen in most blocks first, then by their mean salience."""
    strength = np.zeros(marks.shape[1]) if scores is None else (scores / scores.mean(axis=1, keepdims=True)).mean(0)
    return np.lexsort((-strength, -marks.sum(axis=0)))


def held_shares(marks: Marks, scores: Values) -> Values:
    """Return per block the share of the total salience that the chosen channels hold, between 0 and 1."""
    return (scores * marks).sum(axis=1) / scores.sum(axis=1)


def channel_map(choice: Choice, scores: Values | None) -> ChannelMap:
    """Draw a choice; without scores, the chosen channels alone."""
    marks = choice.marks
    often = marks.sum(axis=0)
    held = None if scores is None else held_shares(marks, scores)
    blocks, width = marks.shape
    chosen = int(marks[0].sum())
    alt = f"{chosen} of {width} channels chosen in each of {blocks} blocks at {choice.site}"
    order = channel_order(marks, scores)
    picture = _draw(choice, None if scores is None else scores[:, order], marks[:, order], held, alt)
    return ChannelMap(
        choice.site, choice.score, chosen, width, blocks, int((often == blocks).sum()), int((often == 0).sum()),
        None if held is None else float(held.mean()), picture,
    )  # fmt: skip


ROW = 7  # pixel rows of one block in the map: salience, the marks below it, and a gap
GAP = 1
MARK = 2


def map_colours(scores: Values | None, marks: Marks) -> Values:
    """Return the map's pixels as RGBA [blocks * ROW, channels, 4]: a band of salience above a band of marks per block.

    Salience is compared within its block, by its logarithm, from the 1st percentile (dark) to the 99th (bright).
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    blocks, channels = marks.shape
    pixels = np.zeros((blocks, ROW, channels, 4))
    if scores is not None:
        logs = np.log(np.maximum(scores, 1e-12))
        low, high = (np.percentile(logs, q, axis=1, keepdims=True) for q in (1, 99))
        pixels[:, : ROW - GAP - MARK] = colormaps["viridis"](np.clip((logs - low) / (high - low + 1e-12), 0, 1))[
            :, None
        ]
    top = 0 if scores is None else ROW - GAP - MARK
    band = pixels[:, top : ROW - GAP]
    band[...] = np.where(marks[:, None, :, None], (*to_rgb(ORANGE), 1.0), 0.0)
    return pixels.reshape(blocks * ROW, channels, 4)


def _draw(choice: Choice, scores: Values | None, marks: Marks, held: Values | None, alt: str) -> Picture:
    """Draw the map, below it how often each channel is chosen, and beside it what the chosen ones hold."""
    blocks, channels = marks.shape

    def paint(figure: Any, theme: dict[str, str]) -> None:
        ratios = (1,) if held is None else (5, 1)
        grid = figure.add_gridspec(2, len(ratios), width_ratios=ratios, height_ratios=(max(blocks, 4), 3.2))
        main = figure.add_subplot(grid[0, 0])
        main.imshow(map_colours(scores, marks), aspect="auto", interpolation="nearest", extent=(0, channels, blocks, 0))
        main.set_yticks(np.arange(blocks) + 0.43, _block_names(choice.blocks), fontsize=9)
        main.set(ylabel="block", title="channels, each column the same one in all blocks")
        main.tick_params(left=False, labelbottom=False)
        below = figure.add_subplot(grid[1, 0], sharex=main)
        below.fill_between(np.arange(channels + 1), np.append(marks.sum(0), 0), step="post", color=ORANGE, lw=0)
        below.set(ylim=(0, blocks), ylabel="chosen in\nblocks", xlabel="channels, those chosen in most blocks first")
        if held is not None:
            _shares(figure.add_subplot(grid[0, 1], sharey=main), held, marks[0].mean(), theme)
        for spine in main.spines.values():
            spine.set_visible(False)

    return draw(paint, (9.6, 1.9 + 0.27 * blocks), alt, "png")


def _shares(axes: Any, held: Values, even: float, theme: dict[str, str]) -> None:
    axes.barh(np.arange(len(held)) + 0.43, 100 * held, height=0.7, color=ORANGE)
    axes.axvline(100 * even, color=theme["ink"], lw=1, ls="--")
    axes.set(xlim=(0, 118 * held.max()), title="salience held (%)")
    axes.tick_params(labelleft=False, left=False)


def _block_names(blocks: Sequence[int]) -> list[str]:
    return [str(block + 1) for block in blocks]
