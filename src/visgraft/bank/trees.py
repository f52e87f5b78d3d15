"""Trees: the backbone's modules, lent to one forward at a time, with adapters put in by hooks of their own.

All trees share the backbone's tensors, so one more costs nothing but its modules. As a tree runs one forward at a time,
what belongs to a forward is simply held by it, and nothing of one forward is seen by another.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.backbones.heads import classifier_paths
from visgraft.bank.configuration import Configuration, OwnRows
from visgraft.bank.ground import FrozenBackbone, HeadKind
from visgraft.bank.layers import layer_by_images
from visgraft.bank.layout import slots_of, substituted
from visgraft.bank.rows import ByRows, FactorsByRows, Span, add_factors, alike, hidden_by_rows, read_together
from visgraft.core.attached import Attached, get_attached
from visgraft.core.families import NORMS, fuse_biases
from visgraft.core.low_rank import LowRank
from visgraft.core.method import Grid, InsertsByRows, ReadsLayer, TokenMethod
from visgraft.core.sites import Site
from visgraft.core.taps import Taps, is_traced

Compile = Callable[[nn.Module], Callable[[Tensor], Any]]
"""What is put around the modules before they run, such as `torch.compile`."""


class HeadSpan(NamedTuple):
    """Images `start` to `stop` of a batch with heads of one kind, and their tensors, each [stop - start, ...]."""

    start: int
    stop: int
    kind: HeadKind
    tensors: Mapping[str, Tensor]


class Forward:
    """What belongs to one mixed forward: how many images, whose rows are whose, and what hooks hand to later ones.

    With `copies`, the images pass the first `shared` blocks once and are then copied for so many adapters, each of
    which takes the place of an image in the spans; its images are to it what windows are to an image.
    """

    def __init__(self, images: int, spans: Mapping[Configuration, Span], heads: Sequence[HeadSpan]) -> None:
        self.images, self.spans, self.heads = images, spans, heads
        self.copies = 1
        self.shared: int | None = None
        self.kept: dict[Any, Any] = {}
        self.factors: dict[ByRows, LowRank] = {}


class UniformTree:
    """The backbone with one adapter at a time attached, as `visgraft.load` attaches it: for images that share one."""

    def __init__(
        self,
        configuration: Configuration,
        head: HeadKind,
        compile: Compile | None = None,
        halves: Mapping[int, nn.Parameter] | None = None,
    ) -> None:
        self.model = configuration.copy()
        if not any(isinstance(module, ReadsLayer) for module in self.model.modules()):  # which reads the weight itself
            _put(self.model, halves or {})
        _put_heads(self.model, head)
        self.run_model = compile(self.model) if compile else self.model
        self.slots = slots_of(self.model)

    def run(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the answers [B, outputs] with an adapter's tensors, which are shared, not copied."""
        with self.holding(tensors):
            found: Tensor = self.run_model(x)
            return found

    def holding(self, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Hold an adapter's tensors as long as this lasts."""
        return substituted(self.slots, tensors)


class MixedTree:
    """The backbone with several configurations put in, of which every image of a batch has an adapter of one."""

    def __init__(
        self,
        ground: FrozenBackbone,
        configurations: Sequence[Configuration],
        compile: Compile | None = None,
        precision: str = "fp32",
    ) -> None:
        self.model = ground.copy()
        _put(self.model, {} if precision == "fp32" else ground.halves())
        self.blocks = [block["stream.in"].host for block in ground.sites.blocks]
        self.forward: Forward | None = None
        for number, path in enumerate(self.blocks):  # before the methods' own hooks
            self.model.get_submodule(path).register_forward_pre_hook(_CopyHook(self, number))
        fuse_biases(self.model, ground.projections)
        self.factors: list[tuple[Configuration, FactorsByRows]] = []
        taps, acts = Taps(), dict[Site, list[_Acts]]()
        for configuration in configurations:
            template = configuration.copy()
            attached = get_attached(template)
            for path, attribute in attached.settings:
                value = getattr(template.get_submodule(path), attribute)
                setattr(self.model.get_submodule(path), attribute, value)
            modules = {key: ByRows(attached, key) for key in attached.where}
            self.factors += [(configuration, group) for group in alike(list(modules.values()))]
            for site, act in _acts(attached, modules):
                of_site = acts.setdefault(site, [])
                if not of_site or of_site[-1].configuration is not configuration:
                    of_site.append(_Acts(configuration, []))
                of_site[-1].acts.append(act)
        for site, of_site in acts.items():
            made = site.side == "output" and (
                isinstance(self.model.get_submodule(site.host), (nn.Linear, *NORMS))
                or site.name == "stream.out"  # the sum of a branch and the stream
            )
            fresh = (made or site.norm is not None) and not site.channels_first
            taps.put(self.model, site, _SiteAct(self, of_site, fresh, site.rows is not None))
        taps.forget_after_forward(self.model)
        self._own_layers(configurations)
        for path in ground.head_paths:
            _set(self.model, path, _Heads(self, path))
        self.run_model = compile(self.model) if compile else self.model

    def run(self, x: Tensor, forward: Forward) -> Tensor:
        """Return the answers [B, most outputs], padded with zeros behind the outputs that an image's head has."""
        self.forward = forward
        for configuration, group in self.factors:
            forward.factors |= group.make(forward.spans[configuration])
        if forward.shared is None:
            x = _copied(x, forward.copies)
        try:
            found: Tensor = self.run_model(x)
            return found
        finally:
            self.forward = None

    def _own_layers(self, configurations: Sequence[Configuration]) -> None:
        owned: dict[str, dict[str, dict[Configuration, list[OwnRows]]]] = {}
        for configuration in configurations:
            for path, tensors in configuration.owned.items():
                for leaf, parts in tensors.items():
                    owned.setdefault(path, {}).setdefault(leaf, {})[configuration] = parts
        for path, of_layer in owned.items():
            layer = self.model.get_submodule(path)
            vars(layer)["forward"] = partial(_owned_forward, self, layer, of_layer)


def _owned_forward(
    tree: MixedTree, layer: Any, owned: Mapping[str, Mapping[Configuration, list[OwnRows]]], x: Tensor
) -> Tensor:
    """The forward of a layer of which some configurations replace tensors."""
    forward = tree.forward
    assert forward is not None
    own = {leaf: _own_tensor(forward, getattr(layer, leaf), parts) for leaf, parts in owned.items()}
    return layer_by_images(layer, own, x)


def _own_tensor(forward: Forward, frozen: Tensor, parts: Mapping[Configuration, list[OwnRows]]) -> Tensor:
    """Return a layer's tensor for each image [B, ...]: the adapter's, or the backbone's own."""
    found = []
    for configuration, span in forward.spans.items():
        like = frozen.expand(span.stop - span.start, *frozen.shape)
        replaced = parts.get(configuration, [])
        if len(replaced) == 1 and replaced[0].rows is None:
            like = span.tensors[replaced[0].name]
        elif replaced:
            like = like.clone()
            for name, rows in replaced:
                like[:, slice(*(rows or (None, None)))] = span.tensors[name]
        found.append(like)
    return found[0] if len(found) == 1 else torch.cat(found)


class _CopyHook:
    """Forward pre-hook on a block that copies the images for every adapter, where those part."""

    def __init__(self, tree: MixedTree, number: int) -> None:
        self.tree, self.number = tree, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        forward = self.tree.forward
        assert forward is not None
        return (_copied(args[0], forward.copies), *args[1:]) if forward.shared == self.number else args


class _Acts(NamedTuple):
    """What one configuration does at one site, in order."""

    configuration: Configuration
    acts: list[Any]


class _SiteAct:
    """Act of a site that lets every configuration rewrite the rows of its own images.

    `fresh`: the site's tensor is nobody else's, so that acts may rewrite it in place; `part`: and it is some rows of a
    layer's output, which are rewritten where they are.
    """

    def __init__(self, tree: MixedTree, acts: Sequence[_Acts], fresh: bool, part: bool) -> None:
        self.tree, self.acts = tree, {one.configuration: one.acts for one in acts}
        both = any(len(one.acts) > 1 and any(isinstance(act, _ReadRows) for act in one.acts) for one in acts)
        self.fresh, self.part = fresh and not both, fresh and part

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        forward = self.tree.forward
        assert forward is not None
        pieces, changed = [], False
        fresh = self.fresh and not is_traced()  # what is written to a part becomes a slow scatter in an exported graph
        part = self.part and fresh
        for configuration, span in forward.spans.items():
            before = now = span.of(onto, forward.images)
            seen = before if value is onto else span.of(value, forward.images)
            for act in self.acts.get(configuration, ()):
                new = act(forward, span, now if seen is now else seen, now, grid, fresh)
                now, seen = new, new if seen is now else seen
            if now is not before and part:
                before.copy_(now)
            changed = changed or now is not before
            pieces.append(now)
        if not changed or part:
            return onto
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _ApplyRows:
    """A module reads and rewrites one site."""

    def __init__(self, module: ByRows) -> None:
        self.module = module

    def __call__(self, forward: Forward, span: Span, x: Tensor, onto: Tensor, grid: Grid, fresh: bool) -> Tensor:
        factors = forward.factors.get(self.module)
        if factors is None:
            return self.module.forward(span, x, onto, grid, fresh)
        return add_factors(onto, hidden_by_rows(x, factors.down), factors, fresh)


class _ReadRows:
    """Modules read one site together, and add at others: of low-rank maps only the hidden features are kept."""

    def __init__(self) -> None:
        self.readers: list[ByRows] = []

    def __call__(self, forward: Forward, span: Span, x: Tensor, onto: Tensor, grid: Grid, fresh: bool) -> Tensor:
        wide: dict[int, list[tuple[ByRows, LowRank]]] = {}
        for reader in self.readers:
            factors = forward.factors.get(reader)
            if factors is None:
                forward.kept[reader] = x, None
            else:
                wide.setdefault(factors.down.shape[1], []).append((reader, factors))
        for pairs in wide.values():
            hidden = read_together(x, [factors for _, factors in pairs])
            for (reader, factors), one in zip(pairs, hidden, strict=True):
                forward.kept[reader] = one, factors
        return onto


class _AddRows:
    """A module adds to one site what it makes of what it read at another."""

    def __init__(self, module: ByRows) -> None:
        self.module = module

    def __call__(self, forward: Forward, span: Span, x: Tensor, onto: Tensor, grid: Grid, fresh: bool) -> Tensor:
        read, factors = forward.kept.pop(self.module)
        if factors is None:
            return self.module.forward(span, read, onto, grid, fresh)
        return add_factors(onto, read, factors, fresh)


class _TokenRows:
    """A module inserts tokens, or takes them out again."""

    def __init__(self, module: ByRows, what: str) -> None:
        self.module, self.what = module, what

    def __call__(self, forward: Forward, span: Span, x: Tensor, onto: Tensor, grid: Grid, fresh: bool) -> Tensor:
        module, act = self.module.module, getattr(self.module.module, self.what)
        if isinstance(module, InsertsByRows):
            if self.what == "remove":
                removed: Tensor = act(x, grid)
                return removed
            rows = x.shape[0] // (span.stop - span.start)
            own = self.module.own_of(span).items()
            return module.insert_by_rows({name: t.repeat_interleave(rows, 0) for name, t in own}, x, grid)
        return self.module.mapped(span, lambda x: act(x, grid), x)


def _acts(attached: Attached, modules: Mapping[str, ByRows]) -> list[tuple[Site, Any]]:
    """Return what the modules do at which site, in the order in which `attach` hooks them."""
    found: list[tuple[Site, Any]] = []
    reading: dict[Site, _ReadRows] = {}
    for key, position in attached.where.items():
        module = modules[key]
        # The bias stands in the projection itself here.
        reads, adds_to = (dataclasses.replace(site, separate_bias=None) for site in attached.sites.at(position))
        if isinstance(module.module, TokenMethod):
            found += [(reads, _TokenRows(module, "insert")), (adds_to, _TokenRows(module, "remove"))]
            continue
        if reads == adds_to:
            found.append((reads, _ApplyRows(module)))
        else:
            if reads not in reading:
                reading[reads] = _ReadRows()
                found.append((reads, reading[reads]))
            reading[reads].readers.append(module)
            found.append((adds_to, _AddRows(module)))
        reading.pop(adds_to, None)
    return found


class _Heads(nn.Module):
    """In place of a layer of the head: that of every image."""

    def __init__(self, tree: MixedTree, path: str) -> None:
        super().__init__()
        self.tree, self.path = tree, path
        self.layers: dict[int, nn.Module] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [B, most outputs] of features [B, F]."""
        forward = self.tree.forward
        assert forward is not None
        if forward.shared == len(self.tree.blocks):
            x = _copied(x, forward.copies)
        each = x.unflatten(0, (forward.images, -1))
        found = [self._one(span, each[span.start : span.stop]) for span in forward.heads]
        most = max(one.shape[-1] for one in found)
        found = [nn.functional.pad(one, (0, most - one.shape[-1])) for one in found]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _one(self, span: HeadSpan, x: Tensor) -> Tensor:
        own = {
            name.removeprefix(f"{self.path}."): tensor
            for name, tensor in span.tensors.items()
            if name.startswith(f"{self.path}.")
        }
        template = span.kind.modules[self.path]
        if type(template) is nn.Linear and x.ndim == 3:
            weight = own["weight"].mT
            out = torch.baddbmm(own["bias"].unsqueeze(1), x, weight) if "bias" in own else x @ weight
            return out.flatten(0, 1)
        layer = self.layers.setdefault(id(template), copy.deepcopy(template))
        return layer_by_images(layer, own, x.flatten(0, 1))


def _copied(x: Tensor, copies: int) -> Tensor:
    """Return a batch so many times one behind the other."""
    return x if copies == 1 else x.repeat(copies, *([1] * (x.ndim - 1)))


def _put(model: nn.Module, others: Mapping[int, nn.Parameter]) -> None:
    """Put other tensors in place of those with these ids."""
    for module in model.modules():
        for leaf, tensor in module._parameters.items():
            module._parameters[leaf] = others.get(id(tensor), tensor)


def _put_heads(model: nn.Module, head: HeadKind) -> None:
    for path in classifier_paths(model):
        _set(model, path, copy.deepcopy(head.modules[path]) if head.outputs else nn.Identity())


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
