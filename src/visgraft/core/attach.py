"""Attach a method to a backbone in place, freeze the rest, and take it off again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from visgraft.backbones.heads import head_outputs, head_paths
from visgraft.backbones.wrappers import refuse_wrapped, unwrapped
from visgraft.core.attached import AdoptHook, Attached, find_attached, get_attached
from visgraft.core.dryrun import prove_sites
from visgraft.core.method import Batches, FrozenLayer, Method, OwnTensor, Position, ReadsLayer, TokenMethod
from visgraft.core.passes import PickOutputs, RepeatImages
from visgraft.core.placing import find_positions, first_block, own_from_block
from visgraft.core.registry import get_method
from visgraft.core.side_by_side import side_by_side
from visgraft.core.sites import Site
from visgraft.core.taps import Act, Add, Apply, Insert, Read, Remove
from visgraft.core.tensors import CHILD, own_tensors
from visgraft.errors import SiteError, VisgraftError
from visgraft.options import MethodConfig


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


def attach(model: nn.Module, config: MethodConfig, batches: Batches | None = None) -> nn.Module:
    """Attach a method to a timm model in place, freeze everything else but the head, and return the model.

    Args:
        model: the plain backbone, with or without a head (`num_classes=0`).
        config: the method's options, e.g. `SCTConfig()`; its class says which method.
        batches: (images [B, 3, H, W], labels [B]) of the task, for methods that look at it first (SCT's scores).

    Raises:
        SiteError: the backbone lacks a place that the method needs, or a hook would sit in the wrong one.
        VisgraftError: something is attached already, nothing would train, the method needs `batches`, or the head has
            other outputs than the tasks that have passes of their own.
    """
    if config.blend is not None:
        raise VisgraftError("blend is what visgraft.blend writes; attach the method without it")
    return assemble(model, config, lambda method, modules: method.calibrate(config, model, modules, batches))


def assemble(
    model: nn.Module,
    config: MethodConfig,
    calibrate: Callable[[type[Method], Sequence[Method]], None] | None = None,
) -> nn.Module:
    """`attach` without the look at the data unless `calibrate` is given: for loading and for the meta device."""
    refuse_wrapped(model, "attach to")
    if before := find_attached(model):
        raise VisgraftError(f"{before.config.method} is attached already; call visgraft.detach first")
    method, outputs = get_method(config.method), head_outputs(model)
    if config.passes and outputs != sum(config.passes):
        raise VisgraftError(
            f"{config.method} has passes for tasks with {sum(config.passes)} outputs in all, but the head has "
            f"{outputs}; create the model with as many classes"
        )
    positions, sites = find_positions(model, config)
    if positions:
        prove_sites(model, list(dict.fromkeys(site for position in positions for site in sites.at(position))))
    attached = Attached(model, config, sites)
    tensors = own_tensors(model)
    attached.unfrozen = tuple((*method.unfrozen(config, tensors), *_also_trained(config, tensors)))
    if config.last_blocks:
        adapted = own_from_block(first_block(config, sites, type(model).__name__), tensors, sites)
        attached.unfrozen = tuple(name for name in attached.unfrozen if name in adapted)
    if not (positions or attached.unfrozen or attached.head):
        raise VisgraftError(
            f"{config.method} would train nothing: this {type(model).__name__} has no head; create it with num_classes"
        )
    like = next(model.parameters())
    with torch.device(like.device):
        modules = _make_modules(method, config, positions, attached.shared)
    attached.where = {position.key: position for position in positions}
    attached.positions.update(dict(zip(attached.where, modules, strict=True)))
    attached.to(like.dtype)
    if issubclass(method, ReadsLayer):
        _show_layers(model, attached)
    if calibrate is not None:
        calibrate(method, modules)
    _hook(model, attached)
    if config.passes:
        attached.taps.handles.append(model.register_forward_pre_hook(RepeatImages(len(config.passes))))
        attached.taps.handles.append(model.register_forward_hook(PickOutputs(config.passes)))
    _freeze(model, attached)
    attached.taps.handles.append(model.register_forward_pre_hook(AdoptHook(attached)))
    model.add_module(CHILD, attached)
    model.train(model.training)
    return model


def _make_modules(
    method: type[Method], config: MethodConfig, positions: Sequence[Position], shared: nn.ModuleDict
) -> list[Method]:
    """Return the module of every position; what they share is put into `shared`."""
    if config.blend is not None:
        return side_by_side(method, config, positions, shared)
    shared.update(method.shared(config, positions))
    return [method(config, position, dict(shared.items())) for position in positions]


def _also_trained(config: MethodConfig, tensors: Sequence[OwnTensor]) -> list[str]:
    """Return the names of the backbone's own tensors that train beside the method's modules.

    Raises:
        VisgraftError: the backbone has none of the kind.
    """
    kinds = (config.also_train or "").split("+")
    found = [
        tensor.name
        for tensor in tensors
        if ("norms" in kinds and tensor.norm)
        or ("biases" in kinds and (tensor.role == "bias" or (tensor.norm and tensor.role == "buffer")))
    ]
    if config.also_train and not found:
        raise VisgraftError(f"also_train is {config.also_train!r}, but this backbone has none; leave it out")
    return found


def _show_layers(model: nn.Module, attached: Attached) -> None:
    """Hand every module the frozen linear layer whose output it adds to.

    Raises:
        SiteError: the site is no linear layer's output.
    """
    for key, position in attached.where.items():
        module: Any = attached.positions[key]
        made_by = attached.sites.at(position)[1].produced_by
        layer: Any = None if made_by is None else model.get_submodule(made_by.path)
        if made_by is None or not isinstance(layer, nn.Linear | nn.Conv2d):
            raise SiteError(
                f"{attached.config.method} reads the frozen layer that makes {position.place.adds_to}, but in "
                f"{type(model).__name__} that is no linear layer; choose another place or method"
            )
        module.beside(FrozenLayer(layer, made_by.rows))


def _hook(model: nn.Module, attached: Attached) -> None:
    """Put every module of the method on its site; those that read one site unchanged in between read it together."""
    reading: dict[Site, Read] = {}
    taps = attached.taps
    for key, position in attached.where.items():
        module: Any = attached.positions[key]
        reads, adds_to = attached.sites.at(position)
        for path in {site.separate_bias for site in (reads, adds_to) if site.separate_bias}:
            attached.set(path, "qkv_bias_separate", True)
        if isinstance(module, TokenMethod):
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
    attached.frozen = tuple(parameter for parameter in model.parameters() if not parameter.requires_grad)


def strip(model: nn.Module) -> nn.Module:
    """Take off hooks and modules and give back the flags, but leave trained values in place."""
    attached = get_attached(model)
    attached.reset()
    delattr(model, CHILD)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attached.flags.get(name, parameter.requires_grad))  # a head may be newer
    return model.train(model.training)


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach` in place: the model's tensors, flags and outputs are what they were before. Returns the model.

    A head that was put in since makes way for the one that was there.

    Raises:
        VisgraftError: nothing is attached, or the model is inside a wrapper such as a compiled model.
    """
    refuse_wrapped(model, "detach")
    attached = get_attached(model)
    attached.adopt()
    strip(model)
    attached.reset_head()
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in attached.originals.items():
            state[name].copy_(tensor)
    return model


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters; shared ones count once. Without anything attached, `adapter` is 0."""
    model = unwrapped(model)
    head = tuple(f"{path}." for path in head_paths(model))
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    in_head = {name for name in numbers if head and name.startswith(head)}
    adapter = 0
    if find_attached(model):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        adapter = sum(numbers[name] for name in trained - in_head)
    return ParameterCount(adapter, sum(numbers[name] for name in in_head), sum(numbers.values()))
