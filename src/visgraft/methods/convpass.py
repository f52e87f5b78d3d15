"""Convpass (arXiv:2207.07039): a convolutional bypass beside each branch of a block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option

PLACES = {"attn": Place("attn.in", "stream.mid"), "mlp": Place("mlp.in", "stream.out")}


@dataclass(frozen=True)
class ConvpassConfig(MethodConfig):
    """Options of Convpass.

    `places` None takes both branches, or the MLP's output where the backbone has no attention; attn alone is the
    paper's Convpass-attn. The authors chose `scale` out of 0.01 to 100 and `init` task by task; the median of their 19
    scales is 1, which does not train on the drawn gauges here (docs/recipes.md), and their program's default is centre.
    """

    bottleneck: int = option(8, "channels of the bypass (h)")
    places: tuple[str, ...] | None = option(None, "branches with a bypass beside them; none: both", tuple(PLACES))
    scale: float = option(0.1, "fixed factor s of the bypass")
    dropout: float = option(0.1, "dropout before the last layer while training")
    init: str = option(
        "centre", "how the 3 × 3 kernel starts: the identity at its centre, or xavier uniform", ("centre", "xavier")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("bottleneck", "scale")
        self.check_rates("dropout")


@register("convpass", paper="arXiv:2207.07039")
class Convpass(Method):
    """s Up(φ(Conv3×3(φ(Down x)))) with φ(x) = x σ(1.702 x), read behind the norm and added to the stream.

    The patches are convolved as an image, and each prefix token as an image of 1 × 1, on which only the kernel's
    centre acts. Down [h, C] starts Xavier-uniform, Up [C, h] and all biases at zero, so the model starts unchanged;
    activation, dropout and starts are those of the authors' program. The bypass is added outside LayerScale and,
    unlike there, outside drop-path.
    """

    Config = ConvpassConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "scale": (0.1, 1.0, 10.0, 100.0)}

    def __init__(self, config: ConvpassConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        inner = config.bottleneck
        self.scale = config.scale
        self.down = nn.Linear(position.reads_width, inner)
        self.conv = nn.Conv2d(inner, inner, kernel_size=3, padding=1)
        self.up = nn.Linear(inner, position.adds_width)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        if config.init == "centre":
            nn.init.dirac_(self.conv.weight)
        else:
            nn.init.xavier_uniform_(self.conv.weight)
        for layer in (self.down, self.conv, self.up):
            nn.init.zeros_(cast(Tensor, layer.bias))

    @classmethod
    def placements(cls, config: ConvpassConfig) -> tuple[tuple[Place, ...], ...]:
        if config.places:
            return (tuple(PLACES[name] for name in config.places),)
        return tuple(PLACES.values()), (Place("mlp.in", "mlp.out"),)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the bypass of the tokens [B, N, R], which lie as `grid` says: [B, N, C]."""
        prefix, image = grid.split(_quick_gelu(self.down(x)))
        # A kernel of 3 × 3 on an image of 1 × 1, padded with zeros, is its centre.
        prefix = F.linear(prefix, self.conv.weight[:, :, 1, 1], self.conv.bias)
        hidden = self.dropout(_quick_gelu(grid.join(prefix, self.conv(image))))
        # The scale goes to the small layer: on the result it would cost a pass over a tensor of the features' size.
        return F.linear(hidden, self.scale * self.up.weight, self.scale * self.up.bias)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
