"""ARC, Adapter Re-Composing (arXiv:2310.06234): one projection for all layers, re-scaled in each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option

SITES = ("attn.in", "attn.out", "mlp.in", "mlp.out")


@dataclass(frozen=True)
class ARCConfig(MethodConfig):
    """Options of ARC.

    `places` None takes what enters attention and what enters the MLP, or the MLP's input and output where there is
    no attention; attn.in alone is the paper's ARC_att. `init` mixed is the authors' published program.
    """

    bottleneck: int = option(50, "inner width of the adapters (D')")
    places: tuple[str, ...] | None = option(None, "sites to adapt; none: attn.in and mlp.in", SITES)
    bias: bool = option(True, "a bias b for each layer and place")
    dropout: float = option(0.1, "dropout on the inner features while training")
    init: str = option(
        "mixed",
        "how coefficients start: zero at attention and xavier uniform at the MLP (mixed), or one of both everywhere",
        ("mixed", "xavier", "zero"),
    )

    affine = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("bottleneck")
        self.check_rates("dropout")

    @property
    def shifts(self) -> bool:
        return self.bias

    @property
    def starts_as_identity(self) -> bool:
        return not any(_starts_at_random(self, site) for site in self.places or SITES)


class Projection(nn.Module):
    """The projection that all layers share at one place: `weight` U [C, k], Xavier-uniform."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, bottleneck))
        nn.init.xavier_uniform_(self.weight)


@register("arc", paper="arXiv:2310.06234")
class ARC(Method):
    """x + x (U ∘ c) Uᵀ + b: U [C, k] shared by all layers, c [k] and b [C] of each layer, no activation function.

    The up-projection is the transpose of the down-projection, and the re-scaling coefficients c alone tell the layers'
    maps apart (the symmetric, shared projections of the paper's abstract). There is one U for each place and, where a
    backbone's width changes, for each width. b starts at zero, c as `init` says: in the authors' program the MLP's
    coefficients start at random, so the model does not start unchanged.
    """

    Config = ARCConfig
    recipe = TrainConfig(lr=1e-2)
    knobs: ClassVar = {"lr": (1e-3, 2e-3, 5e-3, 1e-2), "bottleneck": (10, 50, 100)}

    def __init__(self, config: ARCConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        projection = shared[_projection_name(position)]
        self._projection = (projection,)  # in a tuple, so that it is registered only once, where it belongs
        self.coefficients = nn.Parameter(torch.zeros(config.bottleneck))
        self.bias = nn.Parameter(torch.zeros(position.adds_width)) if config.bias else None
        self.dropout = nn.Dropout(config.dropout)
        if _starts_at_random(config, position.place.reads):
            nn.init.xavier_uniform_(self.coefficients.unsqueeze(0))

    @classmethod
    def placements(cls, config: ARCConfig) -> tuple[tuple[Place, ...], ...]:
        if config.places:
            return (Place.at(*config.places),)
        return Place.at("attn.in", "mlp.in"), Place.at("mlp.in", "mlp.out")

    @classmethod
    def shared(cls, config: ARCConfig, positions: Sequence[Position]) -> dict[str, nn.Module]:
        widths = {_projection_name(position): position.reads_width for position in positions}
        return {name: Projection(width, config.bottleneck) for name, width in widths.items()}

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return x (U ∘ c) Uᵀ + b: [..., C] -> [..., C]."""
        projection = cast(Tensor, self._projection[0].weight)
        added = self.dropout(x @ (projection * self.coefficients)) @ projection.T
        return cast(Tensor, added if self.bias is None else added + self.bias)

    def low_rank(self) -> LowRank:
        projection = cast(Tensor, self._projection[0].weight)
        dropout = self.dropout.p if self.training else 0.0
        return LowRank(projection * self.coefficients, projection.T, bias=self.bias, dropout=dropout)


def _starts_at_random(config: ARCConfig, site: str) -> bool:
    return config.init == "xavier" or (config.init == "mixed" and site.startswith("mlp."))


def _projection_name(position: Position) -> str:
    return f"projection_{position.place.reads.replace('.', '_')}_{position.reads_width}"
