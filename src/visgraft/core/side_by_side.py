"""Modules of several adapters of one method at one place: what a blend of adapters consists of."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.core.method import FrozenLayer, Grid, Method, Position, TokenMethod
from visgraft.errors import VisgraftError
from visgraft.options import MethodConfig


class SideBySide(Method):
    """Σ_i w_i delta_i(x): each module reads the same tensor, and what they add is summed with their weights."""

    def __init__(self, config: MethodConfig, position: Position, parts: Sequence[Method]) -> None:
        super().__init__(config, position, {})
        assert config.blend is not None
        self.weights = config.blend
        self.parts = nn.ModuleList(parts)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the weighted sum of what the modules add: [B, N, reads_width] -> [B, N, adds_width]."""
        added = [w * cast(Method, part).delta(x, grid) for w, part in zip(self.weights, self.parts, strict=True)]
        return sum(added[1:], start=added[0])

    def low_rank(self) -> LowRank | None:
        found = [cast(Method, part).low_rank() for part in self.parts]
        if any(one is None for one in found):
            return None
        return joined(cast(list[LowRank], found), self.weights)

    def beside(self, layer: FrozenLayer) -> None:
        """Hand the frozen layer to modules that read it."""
        for part in self.parts:
            cast(Any, part).beside(layer)


def side_by_side(
    method: type[Method], config: MethodConfig, positions: Sequence[Position], shared: nn.ModuleDict
) -> list[Method]:
    """Return a module for every position, made of one for each adapter; what those share is put into `shared`.

    Raises:
        VisgraftError: the method inserts tokens, which cannot stand at one place twice.
    """
    assert config.blend is not None
    if issubclass(method, TokenMethod):
        raise VisgraftError(
            f"{config.method} inserts tokens, which cannot be added up; blend adapters of another method"
        )
    copies = []
    for number in range(len(config.blend)):
        own = method.shared(config, positions)
        shared.update({f"{number}_{name}": module for name, module in own.items()})
        copies.append([method(config, position, own) for position in positions])
    return [SideBySide(config, position, parts) for position, *parts in zip(positions, *copies, strict=True)]


def joined(maps: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return the weighted sum of low-rank maps as one, whose rank is the sum of theirs."""
    first = maps[0]
    ups = [weight * one.scale * one.up for weight, one in zip(weights, maps, strict=True)]
    mix = None
    if any(one.mix is not None for one in maps):
        parts = [_unfolded(one) for one in maps]
        rows, columns = sum(p.shape[1] for p in parts), sum(p.shape[3] for p in parts)
        mix = parts[0].new_zeros(parts[0].shape[0], rows, parts[0].shape[2], columns)
        row = column = 0
        for part in parts:
            mix[:, row : row + part.shape[1], :, column : column + part.shape[3]] = part
            row, column = row + part.shape[1], column + part.shape[3]
        mix = mix.reshape(mix.shape[0] * rows, -1)
    biases = [w * one.bias for w, one in zip(weights, maps, strict=True) if one.bias is not None]
    bias = sum(biases[1:], start=biases[0]) if biases else None
    down = torch.cat([one.down for one in maps], 1)
    return LowRank(down, torch.cat(ups), mix, bias, 1.0, first.dropout, first.drop_mixed)


def _unfolded(one: LowRank) -> Tensor:
    """Return M [a, k, b, k'] of a map that has one."""
    assert one.mix is not None
    return one.mix.view(-1, one.down.shape[1], one.mix.shape[1] // len(one.up), len(one.up))
