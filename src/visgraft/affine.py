"""Affine maps behind modules: recover (A, a) by probing in float64, and fold them into neighbouring linear layers."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.errors import MergeError
from visgraft.method import Grid, Method, Place, Position
from visgraft.sites import Neighbour, Site

RELATIVE_TOLERANCE = 1e-9  # of float64 arithmetic; an activation function misses it by orders of magnitude


class AffineMap(NamedTuple):
    """delta(x) = A x + a for every token; `matrix` A [adds_width, reads_width] and `shift` a [adds_width], float64."""

    matrix: Tensor
    shift: Tensor


class Fold(NamedTuple):
    """Where a place folds: the linear layers concerned, and on which side of them the map acts.

    `input`: W (I + A); `output`: (I + A) W; `beside`: W + A; the last two on `rows` of W where the neighbour has them.
    """

    side: str
    neighbours: tuple[Neighbour, ...]


def probe(module: Method, position: Position, grid: Grid, shared: nn.Module | None = None) -> AffineMap:
    """Return the affine map that the module in eval mode adds to every token, found by feeding zero and the identity.

    `shared` holds the modules that the method shares between positions, if any.

    Raises:
        MergeError: the module is not affine, or mixes tokens: it misses its own map on random input.
    """
    # One copy of both, because a method's module refers to the shared ones without owning them.
    exact: Any = copy.deepcopy(nn.ModuleList([module, shared or nn.Identity()])).to("cpu", torch.float64).eval()[0]
    tokens = grid.prefix_tokens + grid.height * grid.width
    generator = torch.Generator().manual_seed(0)

    def added(x: Tensor) -> Tensor:
        with torch.no_grad():
            return exact(x, torch.zeros(*x.shape[:-1], position.adds_width, dtype=x.dtype), grid)

    shift = added(torch.zeros(1, tokens, position.reads_width, dtype=torch.float64))[0, 0]
    rows = -(-position.reads_width // tokens) * tokens
    identity = torch.eye(rows, position.reads_width, dtype=torch.float64).view(-1, tokens, position.reads_width)
    matrix = (added(identity).flatten(0, 1)[: position.reads_width] - shift).T
    x = torch.randn(2, tokens, position.reads_width, generator=generator, dtype=torch.float64)
    expected, found = x @ matrix.T + shift, added(x)
    if (found - expected).abs().max() > RELATIVE_TOLERANCE * (1 + expected.abs().max()):
        raise MergeError(
            f"the module at {position.key} is not affine in each token, so no linear layer can take it over; "
            "keep the adapter attached"
        )
    return AffineMap(matrix, shift)


def fold_target(place: Place, sites: Mapping[str, Site]) -> Fold | None:
    """Return where a place folds exactly in one block, or None."""
    reads, adds_to = sites[place.reads], sites[place.adds_to]
    if reads is adds_to:
        if reads.feeds:
            return Fold("input", reads.feeds)
        return Fold("output", (reads.produced_by,)) if reads.produced_by else None
    producer = adds_to.produced_by
    if producer and any(feed == replace(producer, rows=None) for feed in reads.feeds):
        return Fold("beside", (producer,))
    return None


def fold(model: nn.Module, target: Fold, affine: AffineMap) -> None:
    """Write the map into its linear layers in place; the arithmetic is float64, rounded once at the end.

    Raises:
        MergeError: the map has a shift and the layer has no bias to take it.
    """
    for neighbour in target.neighbours:
        linear = model.get_submodule(neighbour.path)
        assert isinstance(linear, nn.Linear)
        rows = slice(*neighbour.rows) if neighbour.rows else slice(None)
        matrix, shift = (tensor.to(linear.weight.device) for tensor in affine)
        weight = linear.weight.detach().double()[rows]
        bias = torch.zeros(len(weight)).double() if linear.bias is None else linear.bias.detach().double()[rows]
        bias = bias.to(weight.device)
        if target.side == "input":
            new_weight, change = weight + weight @ matrix, weight @ shift
        elif target.side == "output":
            new_weight, change = weight + matrix @ weight, matrix @ bias + shift
        else:
            new_weight, change = weight + matrix, shift
        if linear.bias is None and bool(change.any()):
            raise MergeError(
                f"{neighbour.path} has no bias, but the adapter adds a constant there; "
                "keep the adapter attached, or use a method without bias"
            )
        with torch.no_grad():
            linear.weight[rows] = new_weight.to(linear.weight.dtype)
            if linear.bias is not None:
                linear.bias[rows] = (bias + change).to(linear.bias.dtype)
