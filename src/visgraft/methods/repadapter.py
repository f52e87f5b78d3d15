"""RepAdapter (arXiv:2302.08106): a linear bottleneck with a group-wise up-projection, made to be folded away."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.errors import SiteError, VisgraftError
from visgraft.options import MethodConfig, TrainConfig, option

SITES = ("attn.in", "attn.out", "mlp.in", "mlp.out")


@dataclass(frozen=True)
class RepAdapterConfig(MethodConfig):
    """Options of RepAdapter.

    The authors' program has biases. Without them the count is the paper's 0.22 M on ViT-B (0.24 M with), and the map
    folds into every backbone: a constant needs a bias to fold into, which some projections lack. So they are off by
    default. The program searches `scale` per task among 0.1, 0.5, 1, 5 and 10.
    """

    bottleneck: int = option(8, "inner width of each adapter; groups must divide it")
    groups: int = option(2, "groups of the up-projection (k); 1 is dense; must divide the width")
    places: tuple[str, ...] | None = option(None, "sites to adapt; none: attn.in and mlp.in", SITES)
    bias: bool = option(False, "a bias in both projections")
    scale: float = option(5.0, "fixed factor s of the adapter: x + s x up(down(x))")
    dropout: float = option(0.1, "dropout on the hidden features while training")

    affine = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("bottleneck", "groups", "scale")
        self.check_rates("dropout")
        if self.bottleneck % self.groups:
            raise VisgraftError(f"groups is {self.groups}, which does not divide bottleneck {self.bottleneck}")

    @property
    def shifts(self) -> bool:
        return self.bias


@register("repadapter", paper="arXiv:2302.08106")
class RepAdapter(Method):
    """x + s ((x W_d + b_d) W_u + b_u) before qkv and before the MLP; W_u is block-diagonal in k groups.

    Source: section 3 of the paper (a dense down-projection, a group-wise up-projection, folded into the projection that
    follows). W_d [C, r] starts Xavier-uniform, W_u [k, r/k, C/k] and the biases at zero, so the model starts unchanged.
    """

    Config = RepAdapterConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "scale": (0.1, 0.5, 1.0, 5.0, 10.0)}

    def __init__(self, config: RepAdapterConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        groups, rank, width = config.groups, config.bottleneck, position.adds_width
        if width % groups:
            raise SiteError(
                f"{position.place.reads} has {width} channels, which {groups} groups do not divide; change groups"
            )
        self.scale = config.scale
        self.down = nn.Parameter(torch.empty(position.reads_width, rank))
        self.up = nn.Parameter(torch.zeros(groups, rank // groups, width // groups))
        self.down_bias = nn.Parameter(torch.zeros(rank)) if config.bias else None
        self.up_bias = nn.Parameter(torch.zeros(width)) if config.bias else None
        self.dropout = nn.Dropout(config.dropout)
        nn.init.xavier_uniform_(self.down)

    @classmethod
    def placements(cls, config: RepAdapterConfig) -> tuple[tuple[Place, ...], ...]:
        if config.places:
            return (Place.at(*config.places),)
        return Place.at("attn.in", "mlp.in"), Place.at("mlp.in", "mlp.out")

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return s ((x W_d + b_d) W_u + b_u): [B, N, C] -> [B, N, C]."""
        hidden = x @ self.down
        if self.down_bias is not None:
            hidden = hidden + self.down_bias
        parts = self.dropout(hidden).unflatten(-1, self.up.shape[:2])
        added = torch.einsum("...gr,grc->...gc", parts, self.scale * self.up).flatten(-2)
        return added if self.up_bias is None else added + self.scale * self.up_bias

    def low_rank(self) -> LowRank | None:
        """The groups as one block-diagonal factor; None where the hidden features have a bias."""
        if self.down_bias is not None:
            return None
        groups, inner, width = self.up.shape
        same = torch.eye(groups, dtype=self.up.dtype, device=self.up.device).view(groups, 1, groups, 1)
        up = (self.up.unsqueeze(2) * same).reshape(groups * inner, groups * width)
        return LowRank(self.down, up, scale=self.scale, dropout=self.dropout.p if self.training else 0.0)

    @classmethod
    def holding(cls, places: Collection[Place], rank: int, shifts: bool) -> RepAdapterConfig | None:
        """A single group is any map of the rank."""
        own = Place.at(*SITES)
        if not places or not set(own) >= set(places):
            return None
        names = tuple(place.reads for place in own if place in places)
        return RepAdapterConfig(bottleneck=rank, groups=1, places=names, bias=shifts, scale=1.0)

    def hold(self, down: Tensor, up: Tensor, shift: Tensor) -> None:
        with torch.no_grad():
            self.down[:, : len(up)] = down
            self.up.zero_()[0, : len(up)] = up / self.scale
            if self.up_bias is not None:
                self.up_bias.copy_(shift / self.scale)
