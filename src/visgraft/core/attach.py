"""Attach a method to a backbone in place, freeze the rest, and take it off again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visgraft.backbones.heads import head_paths
from visgraft.core.dryrun import prove_sites
from visgraft.core.finding import find_sites
from visgraft.core.method import Batches, Method, OwnTensor, Place, Position
from visgraft.core.registry import get_method
from visgraft.core.sites import BEFORE_BLOCKS, Site, Sites
from visgraft.core.taps import Act, Add, Apply, Insert, Read, Remove, Taps
from visgraft.core.tensors import CHILD, LazyDigest, own_tensors
from visgraft.errors import SiteError, VisgraftError
from visgraft.options import MethodConfig


class Attached(nn.Module):
    """What `attach` leaves on the model: the method's modules and all that `detach`, `save` and `merge` need.

    `positions` maps a key to the method's module there; `shared` holds the modules common to all positions. `sites` are
    the backbone's, found once; none where the method puts no modules anywhere.
    """

    def __init__(self, model: nn.Module, config: MethodConfig, sites: Sites) -> None:
        super().__init__()
        self.config, self.sites = config, sites
        self.plain = LazyDigest(model)
        self.positions = nn.ModuleDict()
        self.shared = nn.ModuleDict()
        self.where: dict[str, Position] = {}
        self.head = head_paths(model)
        self.unfrozen: tuple[str, ...] = ()
        self.originals: dict[str, Tensor] = {}
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.taps = Taps()
        self.settings: dict[tuple[str, str], Any] = {}
        self._backbone: tuple[nn.Module] = (model,)  # in a tuple, because a child must not register its parent

    @property
    def method(self) -> type[Method]:
        """The registered class of the attached method."""
        return get_method(self.config.method)

    @property
    def digest(self) -> str | None:
        """The sha256 of the backbone that the method was attached to; None where its tensors hold no data (meta)."""
        return self.plain.value()

    def set(self, path: str, attribute: str, value: Any) -> None:
        """Set an attribute of one of the backbone's modules, to be set back by `reset`."""
        module = self._backbone[0].get_submodule(path)
        self.settings.setdefault((path, attribute), getattr(module, attribute))
        setattr(module, attribute, value)

    def reset(self) -> None:
        """Take off the hooks and set back what `set` changed."""
        self.taps.remove()
        for (path, attribute), value in self.settings.items():
            setattr(self._backbone[0].get_submodule(path), attribute, value)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; parts of the backbone that do not train stay in eval mode, drop-path excepted.

        A frozen part in training mode would drop features at random and move BatchNorm's statistics.
        """
        super().train(mode)
        self.plain.settle()
        trained = {name.rpartition(".")[0] for name in self.unfrozen}
        trained |= {".".join(path.split(".")[:n]) for path in trained for n in range(path.count(".") + 1)}
        inside = tuple(f"{path}." for path in (*self.head, CHILD))
        for path, module in self._backbone[0].named_modules():
            if path and not f"{path}.".startswith(inside) and not isinstance(module, DropPath):
                owner = path if next(module.parameters(), None) is not None else path.rpartition(".")[0]
                module.training = mode and owner in trained
        return self


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: trained ones without the head, the head's, and all of the model's with both."""

    adapter: int
    head: int
    total: int

    @property
    def backbone(self) -> int:
        """Parameters of the frozen backbone; where the method trains the backbone's own, those count as adapter."""
        return self.total - self.head - self.adapter


def get_attached(model: nn.Module) -> Attached:
    """Return what `attach` left on the model.

    Raises:
        VisgraftError: nothing is attached.
    """
    attached = getattr(model, CHILD, None)
    if not isinstance(attached, Attached):
        raise VisgraftError(f"nothing is attached to this {type(model).__name__}; call visgraft.attach first")
    return attached


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


def _own_from_block(start: int, tensors: Sequence[OwnTensor], sites: Sites) -> set[str]:
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


def attach(model: nn.Module, config: MethodConfig, batches: Batches | None = None) -> nn.Module:
    """Attach a method to a timm model in place, freeze everything else but the head, and return the model.

    Args:
        model: the plain backbone, with or without a head (`num_classes=0`).
        config: the method's options, e.g. `SCTConfig()`; its class says which method.
        batches: (images [B, 3, H, W], labels [B]) of the task, for methods that look at it first (SCT's scores).

    Raises:
        SiteError: the backbone lacks a place that the method needs, or a hook would sit in the wrong one.
        VisgraftError: something is attached already, nothing would train, or the method needs `batches`.
    """
    return assemble(model, config, lambda method, modules: method.calibrate(config, model, modules, batches))


def assemble(
    model: nn.Module,
    config: MethodConfig,
    calibrate: Callable[[type[Method], Sequence[Method]], None] | None = None,
) -> nn.Module:
    """`attach` without the look at the data unless `calibrate` is given: for loading and for the meta device."""
    if hasattr(model, CHILD):
        raise VisgraftError(f"{get_attached(model).config.method} is attached already; call visgraft.detach first")
    method = get_method(config.method)
    positions, sites = find_positions(model, config)
    if positions:
        prove_sites(model, list(dict.fromkeys(site for position in positions for site in sites.at(position))))
    attached = Attached(model, config, sites)
    tensors = own_tensors(model)
    attached.unfrozen = tuple(method.unfrozen(config, tensors))
    if config.last_blocks:
        adapted = _own_from_block(first_block(config, sites, type(model).__name__), tensors, sites)
        attached.unfrozen = tuple(name for name in attached.unfrozen if name in adapted)
    if not (positions or attached.unfrozen or attached.head):
        raise VisgraftError(
            f"{config.method} would train nothing: this {type(model).__name__} has no head; create it with num_classes"
        )
    like = next(model.parameters())
    with torch.device(like.device):
        attached.shared.update(method.shared(config, positions))
        modules = [method(config, position, dict(attached.shared.items())) for position in positions]
    attached.where = {position.key: position for position in positions}
    attached.positions.update(dict(zip(attached.where, modules, strict=True)))
    attached.to(like.dtype)
    if calibrate is not None:
        calibrate(method, modules)
    _hook(model, attached)
    _freeze(model, attached)
    model.add_module(CHILD, attached)
    model.train(model.training)
    return model


def _hook(model: nn.Module, attached: Attached) -> None:
    """Put every module of the method on its site; those that read one site unchanged in between read it together."""
    reading: dict[Site, Read] = {}
    taps = attached.taps
    for key, position in attached.where.items():
        module: Any = attached.positions[key]
        reads, adds_to = attached.sites.at(position)
        for path in {site.separate_bias for site in (reads, adds_to) if site.separate_bias}:
            attached.set(path, "qkv_bias_separate", True)
        if attached.method.inserts:
            taps.put(model, reads, Insert(module))
            taps.put(model, adds_to, Remove(module))
            _count_tokens(attached, position, module.tokens())
            continue
        if reads is adds_to or reads not in reading:
            source = taps.source(model, reads)
            act: Act = Apply(module, source) if reads is adds_to else reading.setdefault(reads, Read(source))
            taps.put(model, reads, act)
        if reads is not adds_to:
            kept = taps.keep()
            reading[reads].readers.append((module, kept))
            taps.put(model, adds_to, Add(module, kept))
        reading.pop(adds_to, None)
    taps.forget_after_forward(model)


def _count_tokens(attached: Attached, position: Position, tokens: int) -> None:
    """Tell modules that count the prefix tokens by themselves of those that pass through them."""
    assert position.block is not None
    last = position.block if position.last is None else position.last
    for block in attached.sites.blocks[position.block : last + 1]:
        counter = block[position.place.reads].prefix_counter
        if counter:
            prefix = block[position.place.reads].grid
            assert prefix is not None
            attached.set(counter, "num_prefix_tokens", prefix.prefix_tokens + tokens)


def _freeze(model: nn.Module, attached: Attached) -> None:
    """Freeze the backbone but for the head and what the method unfreezes, and keep copies of those tensors."""
    inside = tuple(f"{path}." for path in attached.head)
    trained = {*attached.unfrozen, *(name for name in attached.flags if inside and name.startswith(inside))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    state = model.state_dict()
    attached.originals = {name: state[name].detach().clone() for name in sorted(trained)}
    attached.plain.keep(attached.originals)


def strip(model: nn.Module) -> nn.Module:
    """Take off hooks and modules and give back the flags, but leave trained values in place."""
    attached = get_attached(model)
    attached.reset()
    delattr(model, CHILD)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attached.flags[name])
    return model.train(model.training)


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` in place: the model's tensors, flags and outputs are what they were before. Returns the model.

    Raises:
        VisgraftError: nothing is attached.
    """
    attached = get_attached(model)
    strip(model)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in attached.originals.items():
            state[name].copy_(tensor)
    return model


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters; shared ones count once. Without anything attached, `adapter` is 0."""
    head = tuple(f"{path}." for path in head_paths(model))
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    in_head = {name for name in numbers if head and name.startswith(head)}
    adapter = 0
    if hasattr(model, CHILD):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        adapter = sum(numbers[name] for name in trained - in_head)
    return ParameterCount(adapter, sum(numbers[name] for name in in_head), sum(numbers.values()))
