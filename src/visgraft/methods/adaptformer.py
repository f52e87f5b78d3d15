"""AdaptFormer (arXiv:2205.13535): a scaled bottleneck beside the MLP, from the stream before norm2 to the stream."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.core.low_rank import add_by_rows, linear_by_rows
from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option


@dataclass(frozen=True)
class AdaptFormerConfig(MethodConfig):
    """Options of AdaptFormer.

    The paper's own bottleneck is 64; 8 is the size at which later papers compare it with other methods. `form`,
    `scale` and `bottleneck` are what the paper ablates; a learned scale and the LayerNorm are options of the authors'
    program alone. A LayerNorm after the up-projection comes behind the scale there, so it takes the scale's effect
    away.
    """

    bottleneck: int = option(8, "inner width of each module")
    form: str = option(
        "parallel", "parallel: beside the MLP; sequential: on the MLP's output", ("parallel", "sequential")
    )
    scale: float = option(0.1, "factor s of the module; where it is learned, what it starts from")
    learn_scale: bool = option(False, "learn one factor per module instead of keeping it fixed")
    norm: str = option("none", "LayerNorm in the module: before down, or after up", ("none", "before", "after"))
    dropout: float = option(0.1, "dropout on the hidden features while training")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("bottleneck", "scale")
        self.check_rates("dropout")


@register("adaptformer", paper="arXiv:2205.13535")
class AdaptFormer(Method):
    """x + MLP(norm2(x)) + s (ReLU(x W_d + b_d) W_u + b_u), x being the stream between attention and norm2.

    Source: the paper's AdaptMLP (section 3.2). The module's input is not normalised, and what it adds passes neither
    LayerScale nor drop-path. Where a backbone has no such place in the stream, it stands between the MLP's input and
    output, whose norm comes first. W_d [C, r] starts Kaiming-uniform and W_u [r, C] at zero, both biases at zero, so
    the model starts unchanged.
    """

    Config = AdaptFormerConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "bottleneck": (4, 8, 16, 64), "scale": (0.1, 0.5, 1.0, 5.0)}

    def __init__(self, config: AdaptFormerConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        self.scale: float | nn.Parameter = config.scale
        if config.learn_scale:
            self.scale = nn.Parameter(torch.full((1,), config.scale))
        before, after = position.reads_width, position.adds_width
        self.norm_before = nn.LayerNorm(before) if config.norm == "before" else nn.Identity()
        self.down = nn.Linear(before, config.bottleneck)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, after)
        self.norm_after = nn.LayerNorm(after) if config.norm == "after" else nn.Identity()
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    @classmethod
    def placements(cls, config: AdaptFormerConfig) -> tuple[tuple[Place, ...], ...]:
        if config.form == "sequential":
            return (Place.at("mlp.out"),)
        return (Place("stream.mid", "stream.out"),), (Place("mlp.in", "mlp.out"),)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return s (ReLU(x W_d + b_d) W_u + b_u): [B, N, C] -> [B, N, C]."""
        hidden = self.dropout(F.relu(self.down(self.norm_before(x))))
        added: Tensor = self.norm_after(F.linear(hidden, self.scale * self.up.weight, self.scale * self.up.bias))
        return added

    def by_rows(self, tensors: Mapping[str, Tensor], x: Tensor, onto: Tensor, in_place: bool = False) -> Tensor:
        """As `forward`, with projections, factor and norm of each image."""
        scale = tensors["scale"].view(-1, 1, 1) if "scale" in tensors else self.scale
        seen = _norm_by_rows(self.norm_before, x, tensors, "norm_before")
        hidden = F.relu(linear_by_rows(seen, tensors["down.weight"], tensors["down.bias"]))
        up, bias = tensors["up.weight"].mT, tensors["up.bias"].unsqueeze(1)
        if isinstance(self.norm_after, nn.Identity):
            return add_by_rows(onto, scale * hidden, up, (scale * bias).squeeze(1), in_place)
        added = (hidden @ up + bias) * scale
        return onto + _norm_by_rows(self.norm_after, added, tensors, "norm_after").to(onto.dtype)


def _norm_by_rows(norm: nn.Module, x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The norm [B, N, C] with a factor and a shift of each image."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    weight, bias = (tensors[f"{name}.{part}"].unsqueeze(1) for part in ("weight", "bias"))
    return torch.addcmul(bias, F.layer_norm(x, norm.normalized_shape, None, None, norm.eps), weight)
