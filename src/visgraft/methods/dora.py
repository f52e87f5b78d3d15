"""DoRA (arXiv:2402.09353): a frozen weight taken apart into magnitude and direction, the direction moved by LoRA."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.core.method import FrozenLayer, Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.methods.lora import PROJECTIONS, places_of
from visgraft.options import MethodConfig, TrainConfig, option


@dataclass(frozen=True)
class DoRAConfig(MethodConfig):
    """Options of DoRA. Targets, rank and scale are those of LoRA here, UNVERIFIED for this method."""

    rank: int = option(8, "inner width of each branch (r)")
    targets: tuple[str, ...] | None = option(
        None, "projections to adapt; none: q and v, or fc1 and fc2 without attention", tuple(PROJECTIONS)
    )
    scale: float = option(5.0, "fixed factor of each branch, alpha / r in LoRA's paper")

    affine = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rank", "scale")


@register("dora", paper="arXiv:2402.09353")
class DoRA(Method):
    """W' = m (W + s B A) / ‖W + s B A‖, row by row, in place of the frozen W [D, R]; its bias stays.

    Equation 5 of the paper. That the norm is taken of each output's row, as common programs take it, is an UNVERIFIED
    reading of its column-wise norm. The magnitude m [D] starts as W's own row norms, A [R, r] Kaiming-uniform and B
    [r, D] at zero, so the model starts unchanged. What trains and is stored of m is its difference from those
    norms: the same gradient, exact in every precision, and weight decay pulls towards W. The norm in the denominator is
    a constant to the gradient (section 4.3).
    """

    Config = DoRAConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "scale": (1.0, 5.0), "rank": (2, 4, 8, 16)}

    def __init__(self, config: DoRAConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        self.scale = config.scale
        self.down = nn.Parameter(torch.empty(position.reads_width, config.rank))
        self.up = nn.Parameter(torch.zeros(config.rank, position.adds_width))
        self.magnitude = nn.Parameter(torch.zeros(position.adds_width))
        nn.init.kaiming_uniform_(self.down.T, a=math.sqrt(5))

    def beside(self, layer: FrozenLayer) -> None:
        self.layer = layer

    @classmethod
    def placements(cls, config: DoRAConfig) -> tuple[tuple[Place, ...], ...]:
        return places_of(config.targets)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return x (W' - W)ᵀ: [..., R] -> [..., D]."""
        weight = self.layer.weight.to(self.down.device, self.down.dtype)
        moved = weight + (self.down @ (self.scale * self.up)).T
        length = moved.norm(dim=1).detach()
        # A row of zeros has no direction, and stays one until the branch gives it some.
        factor = (weight.norm(dim=1) + self.magnitude) / torch.where(length > 0, length, 1)
        return F.linear(x, factor.unsqueeze(1) * moved - weight)
