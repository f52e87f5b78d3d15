"""Affine maps behind modules: recover (A, a) by probing in float64, and fold them into neighbouring layers."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.core.families import NORMS, norm_parameters
from visgraft.core.method import Grid, Method, Position
from visgraft.core.sites import Bias, Neighbour, Site
from visgraft.errors import MergeError

RELATIVE_TOLERANCE = 1e-9  # of float64 arithmetic; an activation function misses it by orders of magnitude
PROBING_GRID = Grid(4, 4, 0)  # where a site's tensor says by itself how its tokens lie


class AffineMap(NamedTuple):
    """delta(x) = A x + a for every token; `matrix` A [adds_width, reads_width] and `shift` a [adds_width], float64.

    Of a map that treats every channel apart, `matrix` is the diagonal alone: [adds_width].
    """

    matrix: Tensor
    shift: Tensor


class FoldTarget(NamedTuple):
    """Where a place folds: the layers concerned, and on which side of them the map acts.

    `input`: W (I + A); `output`: (I + A) W; `beside`: W + A; the last two on `rows` of W where the neighbour has them.
    `padded`: a constant would have to move behind zeros that are added in between.
    """

    side: str
    neighbours: tuple[Neighbour, ...]
    padded: bool = False


def probe(
    module: Method, position: Position, grid: Grid | None, shared: nn.Module | None = None, diagonal: bool = False
) -> AffineMap:
    """Return the affine map that the module in eval mode adds to every token, found by feeding zero and the identity.

    `shared` holds the modules that the method shares between positions, if any. `diagonal`: the module is said to
    treat every channel apart, so ones are fed instead of the identity, and the map is its diagonal.

    Raises:
        MergeError: the module is not affine, or mixes tokens (or channels, if `diagonal`): it misses its own map on
            random input.
    """
    # One copy of both, because a method's module refers to the shared ones without owning them.
    exact: Any = copy.deepcopy(nn.ModuleList([module, shared or nn.Identity()])).to("cpu", torch.float64).eval()[0]
    grid = grid or PROBING_GRID
    tokens = grid.prefix_tokens + grid.height * grid.width
    generator = torch.Generator().manual_seed(0)

    def added(x: Tensor) -> Tensor:
        with torch.no_grad():
            onto = x if position.place.reads == position.place.adds_to else torch.zeros(1, dtype=x.dtype)
            onto = onto.expand(*x.shape[:-1], position.adds_width)
            return exact(x, onto, grid) - onto

    width = position.reads_width
    shift = added(torch.zeros(1, tokens, width, dtype=torch.float64))[0, 0]
    if diagonal:
        matrix = added(torch.ones(1, tokens, width, dtype=torch.float64))[0, 0] - shift
    else:
        identity = torch.eye(-(-width // tokens) * tokens, width, dtype=torch.float64).view(-1, tokens, width)
        matrix = (added(identity).flatten(0, 1)[:width] - shift).T
    x = torch.randn(2, tokens, width, generator=generator, dtype=torch.float64)
    expected, found = (x * matrix if diagonal else x @ matrix.T) + shift, added(x)
    if (found - expected).abs().max() > RELATIVE_TOLERANCE * (1 + expected.abs().max()):
        raise MergeError(
            f"the module at {position.key} is not affine in each token, so no linear layer can take it over; "
            "keep the adapter attached"
        )
    return AffineMap(matrix, shift)


def fold_target(reads: Site, adds_to: Site) -> FoldTarget | None:
    """Return where a place that reads and adds at these sites folds exactly, or None."""
    if reads is adds_to:
        if reads.feeds:
            return FoldTarget("input", reads.feeds, reads.padded)
        return FoldTarget("output", (reads.produced_by,)) if reads.produced_by else None
    producer = adds_to.produced_by
    if producer and any(feed == replace(producer, rows=None) for feed in reads.feeds):
        return FoldTarget("beside", (producer,))
    return None


def _homes(model: nn.Module, neighbour: Neighbour) -> tuple[Bias, ...]:
    """Where the bias of a linear layer is kept; empty where it has none."""
    if neighbour.biases is not None:
        return neighbour.biases
    linear: Any = model.get_submodule(neighbour.path)
    return () if linear.bias is None else (Bias(f"{neighbour.path}.bias", (0, len(linear.bias))),)


def _homeless(model: nn.Module, neighbour: Neighbour) -> Tensor:
    """Which rows of the neighbour's output can take no constant: bool [rows]."""
    linear: Any = model.get_submodule(neighbour.path)
    lacking = torch.ones(linear.weight.shape[0], dtype=torch.bool)
    for _, (start, stop) in _homes(model, neighbour):
        lacking[start:stop] = False
    if neighbour.free:
        lacking[slice(*neighbour.free)] = False
    return lacking[slice(*neighbour.rows)] if neighbour.rows else lacking


def refusal(model: nn.Module, target: FoldTarget, shifts: bool, diagonal: bool) -> str | None:
    """Return why a map of this kind does not fold into a target exactly; None where it does."""
    if shifts and target.padded:
        return "adds a constant in front of padded windows, whose zeros it would change"
    for neighbour in target.neighbours:
        layer: Any = model.get_submodule(neighbour.path)
        if isinstance(layer, NORMS):
            if not diagonal:
                return f"mixes channels, which the norm {neighbour.path} cannot"
            if shifts and getattr(layer, norm_parameters(layer)[1], None) is None:
                return f"adds a constant, but {neighbour.path} has no bias to take it"
        elif shifts and bool(_homeless(model, neighbour).any()):
            part = "no bias" if not _homes(model, neighbour) else "no bias for keys, where a constant does not cancel"
            return f"adds a constant, but {neighbour.path} has {part}"
    return None


def fold(model: nn.Module, target: FoldTarget, affine: AffineMap) -> None:
    """Write the map into its layers in place; the arithmetic is float64, rounded once at the end.

    Raises:
        MergeError: the map has a constant that a layer cannot take, or mixes channels in front of a norm.
    """
    reason = refusal(model, target, bool(affine.shift.any()), _is_diagonal(affine.matrix))
    if reason:
        raise MergeError(f"the adapter {reason}; keep the adapter attached")
    with torch.no_grad():
        for neighbour in target.neighbours:
            layer: Any = model.get_submodule(neighbour.path)
            if isinstance(layer, NORMS):
                _fold_norm(layer, affine)
            else:
                _fold_linear(model, layer, neighbour, target.side, affine)


def _is_diagonal(matrix: Tensor) -> bool:
    """Whether a map treats every channel apart."""
    if matrix.ndim == 1:
        return True
    return matrix.shape[0] == matrix.shape[1] and not bool((matrix - torch.diag(matrix.diagonal())).any())


def _times(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return `weight @ matrix` of a map or of its diagonal, leaving out the map's rows and columns of zeros.

    SCT's maps are zero outside an eighth of them.
    """
    if matrix.ndim == 1:
        return weight * matrix
    rows, columns = matrix.any(1), matrix.any(0)
    if bool(rows.all() & columns.all()):
        return weight @ matrix
    product = weight.new_zeros(len(weight), len(columns))
    product[:, columns] = weight[:, rows] @ matrix[rows][:, columns]
    return product


def folded_norm(factor: Tensor, shift: Tensor, affine: AffineMap) -> tuple[Tensor, Tensor]:
    """Return a norm's factor [C] and shift [C], float64, with a map folded in that treats every channel apart."""
    diagonal = affine.matrix if affine.matrix.ndim == 1 else affine.matrix.diagonal()
    return factor * (1 + diagonal), shift * (1 + diagonal) + affine.shift


def folded_linear(weight: Tensor, bias: Tensor, side: str, affine: AffineMap) -> tuple[Tensor, Tensor]:
    """Return a linear layer's weight [out, in] and bias [out], float64, with a map folded in (see `FoldTarget`)."""
    matrix, constant = affine
    if side == "input":
        return weight + _times(weight, matrix), bias + weight @ constant
    if side == "output":
        turned = matrix if matrix.ndim == 1 else matrix.T
        return weight + _times(weight.T, turned).T, bias + _times(bias[None], turned)[0] + constant
    return weight + (torch.diag(matrix) if matrix.ndim == 1 else matrix), bias + constant


def _fold_norm(norm: Any, affine: AffineMap) -> None:
    """Scale and shift the norm's own factor and shift."""
    factor_name, shift_name = norm_parameters(norm)
    factor, shift = getattr(norm, factor_name), getattr(norm, shift_name, None)
    old = factor.double().flatten()
    moved = AffineMap(*(tensor.to(factor.device) for tensor in affine))
    scaled, added = folded_norm(old, torch.zeros_like(old) if shift is None else shift.double().flatten(), moved)
    factor.copy_(scaled.view_as(factor))
    if shift is not None:
        shift.copy_(added.view_as(shift))


def _fold_linear(model: nn.Module, layer: Any, neighbour: Neighbour, side: str, affine: AffineMap) -> None:
    """Multiply or add to the layer's weight (of a convolution: for each pixel of its kernel), and move the constant."""
    rows = slice(*neighbour.rows) if neighbour.rows else slice(None)
    moved = AffineMap(*(tensor.to(layer.weight.device) for tensor in affine))
    kernel = layer.weight.shape[1:]
    weight, bias = layer.weight.detach().double().flatten(1)[rows], read_bias(model, layer, neighbour)[rows]
    new_weight, new_bias = folded_linear(weight, bias, side, moved)
    if bool(new_bias[_homeless(model, neighbour).to(new_bias.device)].any()):
        raise MergeError(f"the adapter adds a constant where {neighbour.path} has no bias; keep the adapter attached")
    layer.weight[rows] = new_weight.unflatten(1, kernel).to(layer.weight.dtype)
    start = neighbour.rows[0] if neighbour.rows else 0
    for path, (first, last) in _homes(model, neighbour):
        low, high = max(first, start), min(last, start + len(new_bias))
        if low < high:
            home = model.get_parameter(path)
            home[low - first : high - first] = new_bias[low - start : high - start].to(home.dtype)


def read_bias(model: nn.Module, layer: Any, neighbour: Neighbour) -> Tensor:
    """Return the whole bias in float64, zero where there is none."""
    bias = torch.zeros(layer.weight.shape[0], dtype=torch.float64, device=layer.weight.device)
    for path, (start, stop) in _homes(model, neighbour):
        owner, _, name = path.rpartition(".")
        home: Any = getattr(model.get_submodule(owner), name)  # in a bank it is a plain tensor
        bias[start:stop] = home.detach().double()
    return bias


def add_missing_biases(model: nn.Module, target: FoldTarget) -> list[str]:
    """Give every linear layer of a target that has no bias one of zeros; returns their paths."""
    added = []
    for neighbour in target.neighbours:
        layer: Any = model.get_submodule(neighbour.path)
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is None and neighbour.biases is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
            added.append(neighbour.path)
    return added
