"""A method's module at one position, computed for many images at once, each with tensors of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visgraft.bank.layout import slots_of, substituted
from visgraft.core.attached import Attached
from visgraft.core.low_rank import LowRank, add_by_rows, compute_dtype
from visgraft.core.method import ActsByRows, Grid, TokenMethod
from visgraft.core.tensors import CHILD


class Span(NamedTuple):
    """Images `start` to `stop` of a batch, all of one configuration, and its tensors by name, each [stop - start, ...].

    Of a tensor in which every image has `windows` rows, `of` returns those of these images.
    """

    start: int
    stop: int
    tensors: Mapping[str, Tensor]

    def of(self, x: Tensor, images: int) -> Tensor:
        """Return the part of a tensor [images · windows, ...] that belongs to these images; all of it is itself."""
        windows = x.shape[0] // images
        if self.start == 0 and self.stop == images:
            return x
        return x[self.start * windows : self.stop * windows]


class ByRows:
    """A module of a method, whose forward for n images takes every tensor with a first axis of n.

    Tensors of a site come as [n · windows, N, C]. Nobody else may run the module meanwhile.
    """

    def __init__(self, attached: Attached, key: str) -> None:
        module: Any = attached.positions[key]
        self.module = module
        self.here, shared = f"{CHILD}.positions.{key}.", f"{CHILD}.shared."
        self.slots = [*slots_of(self.module, self.here), *slots_of(attached.shared, shared)]
        self.own = {name: name.removeprefix(self.here) for name, _, _ in self.slots if name.startswith(self.here)}
        self.factored = not isinstance(module, TokenMethod) and module.low_rank() is not None

    def forward(self, span: Span, x: Tensor, onto: Tensor, grid: Grid, in_place: bool = False) -> Tensor:
        """Return what the module makes of `onto`, as `Method.forward` does; with `in_place` it may rewrite it."""
        module: Any = self.module
        if isinstance(module, ActsByRows):
            images = span.stop - span.start
            seen = _tokens(x, images)
            to = seen if x is onto else _tokens(onto, images)
            found = module.by_rows(self.own_of(span), seen, to, in_place and _is_view(to, onto))
            return onto if found is to else found.reshape(onto.shape)
        if x is onto:
            return self.mapped(span, lambda x: module(x, x, grid), x)
        return self.mapped(span, lambda x, onto: module(x, onto, grid), x, onto)

    def own_of(self, span: Span) -> dict[str, Tensor]:
        """Return the module's own tensors of each image by their names in it."""
        return {short: span.tensors[name] for name, short in self.own.items() if name in span.tensors}

    def kind(self) -> Any:
        """Return what is equal for modules that differ in nothing but their tensors."""
        module = self.module
        plain = {name: value for name, value in vars(module).items() if name not in vars(torch.nn.Module())}
        shapes = tuple((self.own[name], tuple(s[leaf].shape)) for name, s, leaf in self.slots if name in self.own)
        inside = tuple((name, repr(child)) for name, child in module.named_children())
        return type(module), shapes, inside, repr(sorted((name, _told(value)) for name, value in plain.items()))

    def mapped(self, span: Span, act: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return what `act` makes of each image's part [windows, N, C] of the inputs, put together again."""

        def one(own: dict[str, Tensor], *parts: Tensor) -> Tensor:
            with substituted(self.slots, own):
                return act(*parts)

        images = span.stop - span.start
        return torch.vmap(one)(self._chosen(span), *(x.unflatten(0, (images, -1)) for x in inputs)).flatten(0, 1)

    def _chosen(self, span: Span) -> dict[str, Tensor]:
        return {name: span.tensors[name] for name, _, _ in self.slots if name in span.tensors}


def _told(value: Any) -> str:
    """A value of a module in words: plain ones by their value, others by which object they are."""
    if isinstance(value, tuple | list):
        return repr([_told(one) for one in value])
    return repr(value) if isinstance(value, bool | int | float | str | None) else f"{type(value)} {id(value)}"


class FactorsByRows:
    """The low-rank maps of modules that make factors of their tensors alike, made for all of them at once."""

    def __init__(self, members: Sequence[ByRows]) -> None:
        self.members = list(members)

    def make(self, span: Span) -> dict[ByRows, LowRank]:
        """Return each module's map with factors [n, ...] of each image, scaled, in the precision of the products."""
        first = self.members[0]
        told: list[LowRank] = []
        own = {
            name: torch.stack([span.tensors[f"{member.here}{short}"] for member in self.members])
            for name, short in first.own.items()
        }
        shared = {name: span.tensors[name] for name, _, _ in first.slots if name not in first.own}

        def one(own: dict[str, Tensor], shared: dict[str, Tensor]) -> tuple[Tensor, ...]:
            with substituted(first.slots, {**own, **shared}):
                told.append(first.module.low_rank())
            return tuple(x for x in told[-1] if isinstance(x, Tensor))

        # Without tensors of their own they have one map in common.
        made = torch.vmap(torch.vmap(one), (0, None))(own, shared) if own else torch.vmap(one, (None, 0))(own, shared)
        kind = told[-1]
        names = [name for name, value in zip(LowRank._fields, kind, strict=True) if isinstance(value, Tensor)]
        factors = dict(zip(names, made, strict=True))
        if kind.scale != 1:
            factors["up"] = factors["up"] * kind.scale
        factors = {name: _to_multiply(factor) for name, factor in factors.items()}
        found = {}
        for number, member in enumerate(self.members):
            of_member: dict[str, Any] = {name: x[number] if own else x for name, x in factors.items()}
            found[member] = kind._replace(**of_member, scale=1.0)
        return found


def _to_multiply(factors: Tensor) -> Tensor:
    """Return factors [modules, n, ...] in the precision of products; what modules have in common is converted once."""
    dtype = compute_dtype(factors)
    if factors.dtype != dtype and factors.stride(0) == 0:
        return factors[:1].to(dtype).expand(factors.shape)
    return factors.to(dtype)


def alike(modules: Sequence[ByRows]) -> list[FactorsByRows]:
    """Return groups of the modules that have factors, each of those that differ in nothing but their own tensors."""
    groups: dict[Any, list[ByRows]] = {}
    for module in modules:
        if module.factored:
            groups.setdefault(module.kind(), []).append(module)
    return [FactorsByRows(members) for members in groups.values()]


def _tokens(x: Tensor, images: int) -> Tensor:
    """All tokens of an image together: [n · windows, N, C] -> [n, windows · N, C]."""
    return x if x.shape[0] == images else x.reshape(images, -1, x.shape[-1])


def hidden_by_rows(x: Tensor, down: Tensor) -> Tensor:
    """Return the hidden features [n, tokens, a k] of x [n · windows, N, a p] by factors [n, p, k]."""
    images, inner, rank = down.shape
    blocks = torch.bmm(x.reshape(images, -1, inner), down)
    return blocks.view(images, -1, x.shape[-1] // inner * rank)


def read_together(x: Tensor, maps: Sequence[LowRank]) -> list[Tensor]:
    """Return the hidden features of several maps that read one tensor, with one pass over it where they can."""
    if len({one.down.shape[1] for one in maps}) > 1 or x.shape[-1] != maps[0].down.shape[1]:
        return [hidden_by_rows(x, one.down) for one in maps]
    hidden = hidden_by_rows(x, torch.cat([one.down for one in maps], 2))
    return list(hidden.split([one.down.shape[2] for one in maps], -1))


def add_factors(onto: Tensor, hidden: Tensor, factors: LowRank, in_place: bool = False) -> Tensor:
    """Return `onto` [n · windows, N, b q] plus the map's last product with each image's factors, of scale 1."""
    mixed, up = hidden if factors.mix is None else torch.bmm(hidden, factors.mix), factors.up
    images, inner, width = up.shape
    mixed = mixed.reshape(images, -1, inner)
    blocks, bias = onto.shape[-1] // width, factors.bias
    to = onto.reshape(images, -1, width)
    in_place = in_place and _is_view(to, onto)
    found = add_by_rows(to, mixed, up, bias if blocks == 1 else None, in_place)
    if blocks > 1 and bias is not None:
        wide = found.view(images, -1, onto.shape[-1]).add_(bias.to(found.dtype).unsqueeze(1))
        return onto if found is to else wide.reshape(onto.shape)
    return onto if found is to else found.reshape(onto.shape)


def _is_view(seen: Tensor, onto: Tensor) -> bool:
    """Whether a tensor that was reshaped for the images is surely the same memory, and no copy."""
    return seen.shape == onto.shape or onto.is_contiguous()
