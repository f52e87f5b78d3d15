"""Attach a method to a backbone in place, freeze the rest, and take it off again."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visgraft.config import MethodConfig
from visgraft.dryrun import prove_sites
from visgraft.errors import SiteError, VisgraftError
from visgraft.method import Batches, Method, Place, Position
from visgraft.registry import get_method
from visgraft.sites import Site, find_grid, find_sites
from visgraft.taps import Apply, ApplyKept, Keep, Kept, tap

CHILD = "visgraft"
"""Name of the child module that `attach` registers on the backbone; it holds everything that the method adds."""


class Attached(nn.Module):
    """What `attach` leaves on the model: the method's modules and all that `detach`, `save` and `merge` need.

    `positions` maps a key to the method's module there; `shared` holds the modules common to all positions.
    """

    def __init__(self, model: nn.Module, config: MethodConfig, digest: str | None) -> None:
        super().__init__()
        self.config = config
        self.digest = digest
        self.positions = nn.ModuleDict()
        self.shared = nn.ModuleDict()
        self.where: dict[str, Position] = {}
        self.head = head_paths(model)
        self.unfrozen: tuple[str, ...] = ()
        self.originals: dict[str, Tensor] = {}
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.handles: list[Any] = []
        self._backbone: tuple[nn.Module] = (model,)  # in a tuple, because a child must not register its parent

    @property
    def method(self) -> type[Method]:
        """The registered class of the attached method."""
        return get_method(self.config.method)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; parts of the backbone that do not train stay in eval mode, drop-path excepted.

        A frozen part in training mode would drop features at random and move BatchNorm's statistics.
        """
        super().train(mode)
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


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the classifier's linear layers, found by identity; empty for `num_classes=0`."""
    if not hasattr(model, "get_classifier"):
        return ()
    found: Any = model.get_classifier()  # type: ignore[operator]
    heads = found if isinstance(found, tuple | list) else (found,)
    wanted = {id(head) for head in heads if head is not None and next(head.parameters(), None) is not None}
    return tuple(path for path, module in model.named_modules() if id(module) in wanted)


def get_attached(model: nn.Module) -> Attached:
    """Return what `attach` left on the model.

    Raises:
        VisgraftError: nothing is attached.
    """
    attached = getattr(model, CHILD, None)
    if not isinstance(attached, Attached):
        raise VisgraftError(f"nothing is attached to this {type(model).__name__}; call visgraft.attach first")
    return attached


def backbone_digest(model: nn.Module) -> str | None:
    """Return the sha256 of the plain backbone's tensors in order of name; None where tensors hold no data (meta).

    The head is left out because it is new for every task, and position embeddings because resampling them to
    another image size may round differently on another machine.
    """
    digest, head = hashlib.sha256(), head_paths(model)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            return None
        if name.startswith(tuple(f"{path}." for path in (*head, CHILD))) or name.endswith("pos_embed"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def choose_places(config: MethodConfig, blocks: Sequence[Mapping[str, Site]], backbone: str) -> tuple[Place, ...]:
    """Return the first of the method's sets of places that every block offers.

    Raises:
        SiteError: no set is offered; the message names what is missing.
    """
    options = get_method(config.method).placements(config)
    for places in options:
        if all(name in sites for sites in blocks for place in places for name in place):
            return places
    wanted = sorted({name for places in options for place in places for name in place})
    missing = [name for name in wanted if any(name not in sites for sites in blocks)]
    raise SiteError(
        f"{config.method} needs the site {', '.join(missing)}, which {backbone} lacks "
        f"(it has {', '.join(sorted(set.intersection(*(set(sites) for sites in blocks))))}); choose among those"
    )


def find_positions(model: nn.Module, config: MethodConfig) -> tuple[list[Position], list[Mapping[str, Site]]]:
    """Return where the method stands in this backbone, block by block, and the backbone's sites."""
    if not get_method(config.method).placements(config):
        return [], []
    blocks = list[Mapping[str, Site]](find_sites(model))
    places = choose_places(config, blocks, type(model).__name__)
    positions = [
        Position(index, place, sites[place.reads].width, sites[place.adds_to].width)
        for index, sites in enumerate(blocks)
        for place in places
    ]
    return positions, blocks


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
    positions, blocks = find_positions(model, config)
    sites = {(p.block, name): blocks[p.block][name] for p in positions for name in p.place}
    if sites:
        prove_sites(model, list(sites.values()))
    attached = Attached(model, config, backbone_digest(model))
    attached.unfrozen = tuple(method.unfrozen(config, _tensor_names(model, attached.head)))
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
    _hook(model, attached, blocks)
    _freeze(model, attached)
    model.add_module(CHILD, attached)
    model.train(model.training)
    return model


def _tensor_names(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Names of the backbone's own tensors in its state dict, the head's left out."""
    inside = tuple(f"{path}." for path in head)
    return [name for name in model.state_dict() if not (inside and name.startswith(inside))]


def _hook(model: nn.Module, attached: Attached, blocks: Sequence[Mapping[str, Site]]) -> None:
    """Put every module of the method on its site."""
    if not attached.where:
        return
    grid = find_grid(model)
    for key, position in attached.where.items():
        module: Any = attached.positions[key]
        reads, adds_to = (blocks[position.block][name] for name in position.place)
        if reads is adds_to:
            attached.handles += tap(model, reads, Apply(module, grid))
        else:
            kept = Kept()
            attached.handles += tap(model, reads, Keep(kept))
            attached.handles += tap(model, adds_to, ApplyKept(module, grid, kept))


def _freeze(model: nn.Module, attached: Attached) -> None:
    """Freeze the backbone but for the head and what the method unfreezes, and keep copies of those tensors."""
    inside = tuple(f"{path}." for path in attached.head)
    trained = {*attached.unfrozen, *(name for name in attached.flags if inside and name.startswith(inside))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    state = model.state_dict()
    attached.originals = {name: state[name].detach().clone() for name in sorted(trained)}


def strip(model: nn.Module) -> nn.Module:
    """Take off hooks and modules and give back the flags, but leave trained values in place."""
    attached = get_attached(model)
    for handle in attached.handles:
        handle.remove()
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
