"""Where a method stands in a backbone, block by block, and which of the backbone's own tensors it may train."""

from collections.abc import Mapping, Sequence

from torch import nn

from visgraft.core.finding import find_sites
from visgraft.core.method import OwnTensor, Place, Position
from visgraft.core.registry import get_method
from visgraft.core.sites import BEFORE_BLOCKS, Site, Sites
from visgraft.errors import SiteError, VisgraftError
from visgraft.options import MethodConfig


def choose_places(config: MethodConfig, sites: Sites, backbone: str) -> tuple[Place, ...]:
    """Return the first of the method's sets of places that the backbone offers in every block.

    A place that reads at one site and adds at another is offered where the tokens of both lie alike. Where only the
    last blocks are adapted, none before the blocks is.

    Raises:
        SiteError: no set is offered; the message names what is missing.
    """
    options = get_method(config.method).placements(config)
    withheld = BEFORE_BLOCKS if config.last_blocks else frozenset()
    offered = sites.everywhere() - withheld
    apart: list[Place] = []
    for places in options:
        if all(name in offered for place in places for name in place):
            apart = [place for place in places if not _alike(place, sites)]
            if not apart:
                return places
    if apart:
        raise SiteError(
            f"{config.method} reads {apart[0].reads} and adds to {apart[0].adds_to}, but the tokens of {backbone} lie "
            "otherwise there (in windows); choose another place"
        )
    names = [name for places in options for place in places for name in place]
    missing = sites.missing(names)
    if not missing and withheld.intersection(names):
        raise SiteError(
            f"{config.method} is to stand at {', '.join(sorted(withheld.intersection(names)))}, before the "
            f"blocks that last_blocks={config.last_blocks} adapts; leave out that place or last_blocks"
        )
    raise SiteError(
        f"{config.method} needs the site {', '.join(sorted(missing))}, which {backbone} lacks "
        f"(it has {', '.join(sorted(offered))}); use other options, another method or another backbone"
    )


def _alike(place: Place, sites: Sites) -> bool:
    if place.reads in sites.outside:
        return place.adds_to in sites.outside
    return all(block[place.reads].grid == block[place.adds_to].grid for block in sites.blocks)


def find_positions(model: nn.Module, config: MethodConfig) -> tuple[list[Position], Sites]:
    """Return where the method stands in this backbone, block by block, and the backbone's sites."""
    method = get_method(config.method)
    if not method.placements(config):
        return [], Sites()
    sites = find_sites(model)
    start = first_block(config, sites, type(model).__name__)
    places = choose_places(config, sites, type(model).__name__)
    outside = [Position(None, p, *_widths(p, sites.outside, sites.outside)) for p in places if p.reads in sites.outside]
    inside = [
        Position(
            first, place, *_widths(place, sites.blocks[first], sites.blocks[last]), None if first == last else last
        )
        for first, last in _from_block(start, method.spans(config, sites.stages))
        for place in places
        if place.reads not in sites.outside
    ]
    if config.last_blocks and not inside:
        raise VisgraftError(f"last_blocks has no effect on {config.method}, which stands in none of them; leave it out")
    return [*outside, *inside], sites


def first_block(config: MethodConfig, sites: Sites, backbone: str) -> int:
    """Return the number, from 0, of the first block that may be adapted.

    Raises:
        VisgraftError: there are fewer blocks than `last_blocks`.
    """
    count = len(sites.blocks)
    if (config.last_blocks or 0) > count:
        raise VisgraftError(
            f"last_blocks is {config.last_blocks}, but {backbone} has {count} blocks; take at most {count}"
        )
    return count - (config.last_blocks or count)


def _from_block(start: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans that add in block `start` or later; one that reads before it reads there instead."""
    return list(dict.fromkeys((max(first, start), last) for first, last in spans if last >= start))


def own_from_block(start: int, tensors: Sequence[OwnTensor], sites: Sites) -> set[str]:
    """Return the names of the backbone's own tensors in the blocks from `start` on, between and behind them."""
    inside = [f"{block['stream.in'].host}." for block in sites.blocks]
    adapted, before = tuple(inside[start:]), tuple(inside[:start])
    first = next((i for i, tensor in enumerate(tensors) if tensor.name.startswith(inside[start])), 0)
    # What leads from one stage to the next is in the layer of the block behind it, but stands before that block.
    later = [(tensor.layer, i) > (tensors[first].layer, first) for i, tensor in enumerate(tensors)]
    return {
        tensor.name
        for tensor, behind in zip(tensors, later, strict=True)
        # Layer 0 holds what comes before the blocks, or everything where the model does not say.
        if tensor.name.startswith(adapted) or (behind and tensor.layer and not tensor.name.startswith(before))
    }


def _widths(place: Place, reads: Mapping[str, Site], adds: Mapping[str, Site]) -> tuple[int, int]:
    return reads[place.reads].width, adds[place.adds_to].width
