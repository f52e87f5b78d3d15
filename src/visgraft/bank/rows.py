"""A method's module at one position, computed for many images at once, each with tensors of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visgraft.bank.layout import slots_of, substituted
from visgraft.core.attached import Attached
from visgraft.core.low_rank import LowRank, add_by_rows
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
        windows = len(x) // images
        if self.start == 0 and self.stop == images:
            return x
        return x[self.start * windows : self.stop * windows]


class ByRows:
    """A module of a method, whose forward for n images takes every tensor with a first axis of n.

    Tensors of a site come as [n · windows, N, C]. Nobody else may run the module meanwhile.
    """

    def __init__(self, attached: Attached, key: str) -> None:
        self.module: Any = attached.positions[key]
        here, shared = f"{CHILD}.positions.{key}.", f"{CHILD}.shared."
        self.slots = [*slots_of(self.module, here), *slots_of(attached.shared, shared)]
        self.own = {name: name.removeprefix(here) for name, _, _ in self.slots if name.startswith(here)}
        self.factored = not isinstance(self.module, TokenMethod) and self.module.low_rank() is not None

    def forward(self, span: Span, x: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        """Return what the module makes of `onto`, as `Method.forward` does."""
        module: Any = self.module
        if isinstance(module, ActsByRows):
            images = span.stop - span.start
            tensors = {short: span.tensors[name] for name, short in self.own.items() if name in span.tensors}
            seen = _tokens(x, images)
            found: Tensor = module.by_rows(tensors, seen, seen if x is onto else _tokens(onto, images))
            return found.reshape(onto.shape)
        if self.factored:
            factors = self.factors(span)
            return add_factors(onto, hidden_by_rows(x, factors.down), factors)
        if x is onto:
            return self.mapped(span, lambda x: module(x, x, grid), x)
        return self.mapped(span, lambda x, onto: module(x, onto, grid), x, onto)

    def factors(self, span: Span) -> LowRank:
        """Return the module's low-rank map with factors [n, ...] of each image."""
        told: list[LowRank] = []

        def one(own: dict[str, Tensor]) -> tuple[Tensor, ...]:
            with substituted(self.slots, own):
                told.append(self.module.low_rank())
            return tuple(x for x in told[-1] if isinstance(x, Tensor))

        made = iter(torch.vmap(one)(self._chosen(span)))
        found: list[Any] = [next(made) if isinstance(x, Tensor) else x for x in told[-1]]
        return LowRank(*found)

    def mapped(self, span: Span, act: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return what `act` makes of each image's part [windows, N, C] of the inputs, put together again."""

        def one(own: dict[str, Tensor], *parts: Tensor) -> Tensor:
            with substituted(self.slots, own):
                return act(*parts)

        images = span.stop - span.start
        return torch.vmap(one)(self._chosen(span), *(x.unflatten(0, (images, -1)) for x in inputs)).flatten(0, 1)

    def _chosen(self, span: Span) -> dict[str, Tensor]:
        return {name: span.tensors[name] for name, _, _ in self.slots if name in span.tensors}


def _tokens(x: Tensor, images: int) -> Tensor:
    """All tokens of an image together: [n · windows, N, C] -> [n, windows · N, C]."""
    return x if len(x) == images else x.reshape(images, -1, x.shape[-1])


def hidden_by_rows(x: Tensor, down: Tensor) -> Tensor:
    """Return the hidden features [n, tokens, a k] of x [n · windows, N, a p] by factors [n, p, k]."""
    images, inner, rank = down.shape
    blocks = x.reshape(images, -1, inner) @ down
    return blocks.view(images, -1, x.shape[-1] // inner * rank)


def read_together(x: Tensor, maps: Sequence[LowRank]) -> list[Tensor]:
    """Return the hidden features of several maps that read one tensor, with one pass over it where they can."""
    if len({one.down.shape[1] for one in maps}) > 1 or x.shape[-1] != maps[0].down.shape[1]:
        return [hidden_by_rows(x, one.down) for one in maps]
    hidden = hidden_by_rows(x, torch.cat([one.down for one in maps], 2))
    return list(hidden.split([one.down.shape[2] for one in maps], -1))


def add_factors(onto: Tensor, hidden: Tensor, factors: LowRank, in_place: bool = False) -> Tensor:
    """Return `onto` [n · windows, N, b q] plus the map's last product with each image's factors."""
    mixed = hidden if factors.mix is None else hidden @ factors.mix
    images, inner, width = factors.up.shape
    mixed, up = mixed.reshape(images, -1, inner), factors.up if factors.scale == 1 else factors.up * factors.scale
    if in_place and onto.dtype == mixed.dtype and onto.shape == (images, mixed.shape[1], width):
        onto.baddbmm_(mixed, up)
        return onto if factors.bias is None else onto.add_(factors.bias.unsqueeze(1))
    if width == onto.shape[-1]:
        result = add_by_rows(onto.reshape(images, -1, width), mixed, up, factors.bias)
    else:  # in blocks
        result = add_by_rows(onto.reshape(images, -1, width), mixed, up).view(images, -1, onto.shape[-1])
        result = result if factors.bias is None else result + factors.bias.unsqueeze(1)
    return result.reshape(onto.shape)
