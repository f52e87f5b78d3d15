"""LoRA (arXiv:2106.09685): a low-rank branch beside frozen projections."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option

PROJECTIONS = {
    "q": Place("attn.in", "attn.q"),
    "k": Place("attn.in", "attn.k"),
    "v": Place("attn.in", "attn.v"),
    "proj": Place("attn.context", "attn.out"),
    "fc1": Place("mlp.in", "mlp.hidden"),
    "fc2": Place("mlp.act", "mlp.out"),
}


def _places(targets: Sequence[str], windows: bool) -> tuple[Place, ...]:
    """The targets' places; inside the windows of attention, where it has any."""
    inside = {"attn.in": "qkv.in", "attn.out": "proj.out"} if windows else {}
    places = [PROJECTIONS[target] for target in targets]
    return tuple(Place(*(inside.get(name, name) for name in place)) for place in places)


def places_of(targets: Sequence[str] | None) -> tuple[tuple[Place, ...], ...]:
    """Return the targets' places, then those inside windows; of None those of q and v, then of fc1 and fc2."""
    choices = (targets,) if targets else (("q", "v"), ("fc1", "fc2"))
    return tuple(places for some in choices for places in (_places(some, False), _places(some, True)))


def _targets_of() -> dict[Place, tuple[str, ...]]:
    """Return which targets stand for a place, inside windows or not; the fused projection is three of them."""
    found = {
        place: (target,) for target in PROJECTIONS for windows in (False, True) for place in _places([target], windows)
    }
    return found | {Place(reads, "attn.qkv"): ("q", "k", "v") for reads in ("attn.in", "qkv.in")}


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Options of LoRA."""

    rank: int = option(8, "inner width of each branch (r)")
    targets: tuple[str, ...] | None = option(
        None, "projections that get a branch; none: q and v, or fc1 and fc2 without attention", tuple(PROJECTIONS)
    )
    scale: float = option(5.0, "fixed factor of each branch, alpha / r in the paper")
    dropout: float = option(0.0, "dropout on what each branch reads while training")

    affine = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rank", "scale")
        self.check_rates("dropout")


@register("lora", paper="arXiv:2106.09685")
class LoRA(Method):
    """s (x A) B beside a frozen projection; A [R, r] starts Kaiming-uniform, B [r, D] at zero."""

    Config = LoRAConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "scale": (1.0, 5.0), "rank": (2, 4, 8, 16)}

    def __init__(self, config: LoRAConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Parameter(torch.empty(position.reads_width, config.rank))
        self.up = nn.Parameter(torch.zeros(config.rank, position.adds_width))
        nn.init.kaiming_uniform_(self.down.T, a=math.sqrt(5))

    @classmethod
    def placements(cls, config: LoRAConfig) -> tuple[tuple[Place, ...], ...]:
        return places_of(config.targets)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return (x A) (s B): [..., R] -> [..., D]."""
        return cast(Tensor, self.dropout(x) @ self.down @ (self.scale * self.up))

    def low_rank(self) -> LowRank | None:
        if self.training and self.dropout.p:
            return None  # it drops what the branch reads, not what it makes of it
        return LowRank(self.down, self.up, scale=self.scale)

    @classmethod
    def holding(cls, places: Collection[Place], rank: int, shifts: bool) -> LoRAConfig | None:
        known = _targets_of()
        if shifts or not places or not known.keys() >= set(places):
            return None
        wanted = {target for place in places for target in known[place]}
        return LoRAConfig(rank=rank, targets=tuple(target for target in PROJECTIONS if target in wanted), scale=1.0)

    def hold(self, down: Tensor, up: Tensor, shift: Tensor) -> None:
        with torch.no_grad():
            self.down[:, : len(up)] = down
            self.up.zero_()[: len(up)] = up / self.scale
