"""FacT, Factor-Tuning (arXiv:2212.03145): all increments of a model's square matrices as one factorised tensor."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.errors import SiteError
from visgraft.options import MethodConfig, TrainConfig, option

TARGETS = {
    "qkv": (Place("attn.in", "attn.qkv"),),
    "proj": (Place("attn.context", "attn.out"),),
    "fc1": (Place("mlp.in", "mlp.hidden"),),
    "fc2": (Place("mlp.act", "mlp.out"),),
}
THREE_PROJECTIONS = tuple(Place("attn.in", f"attn.{part}") for part in "qkv")
INPUT_TO_PROJ = Place("attn.in", "attn.out")
CHOICES = (tuple(TARGETS), ("qkv", "proj"), ("fc1", "fc2"))
"""What is adapted by default, in order of preference: SwiGLU has no single fc1, other families no attention."""
INSIDE_WINDOWS = {"attn.in": "qkv.in", "attn.out": "proj.out"}
GATHERS = ("attn.out", "proj.out", "mlp.out")
"""Sites whose layer makes one width out of one or several; the others make several out of one."""


@dataclass(frozen=True)
class FacTConfig(MethodConfig):
    """Options of FacT.

    `targets` None takes all four, or as many as the backbone offers: no fc1 and fc2 where the MLP has two first layers,
    those two alone without attention. The authors chose `rank` and
    `scale` task by task: ranks of 4 to 16 for tt and of 16 and 32 for tucker, scales of 0.01 to 100, whose median is
    10 in both forms.

    `proj_reads` context is the increment of the projection's matrix, as in the paper and in the published program.
    That a version of the program read the attention's input there instead is UNVERIFIED; `input` does so, and then
    the increment belongs to no layer and cannot be merged.
    """

    form: str = option("tt", "tensor-train (a core per matrix), or tucker (one core for all)", ("tt", "tucker"))
    rank: int = option(16, "rank of the factorisation (r)")
    targets: tuple[str, ...] | None = option(
        None, "projections with an increment; none: all that the backbone has", tuple(TARGETS)
    )
    scale: float = option(10.0, "fixed factor s of the increment")
    dropout: float = option(0.1, "dropout before the last factor while training")
    proj_reads: str = option(
        "context", "what proj's increment reads: what enters proj, or what enters attention", ("context", "input")
    )

    affine = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rank", "scale")
        self.check_rates("dropout")


class Factors(nn.Module):
    """What all M matrices of one width d share: U [d, r] and V [r, d], in Tucker form also P [r, M] and C [r, r, r].

    `columns` says which of the M matrices belong to which position, by its key.
    """

    def __init__(self, config: FacTConfig, width: int, positions: Sequence[Position]) -> None:
        super().__init__()
        ends = list(itertools.accumulate((_squares(position)[1] for position in positions), initial=0))
        self.columns = {p.key: slice(*pair) for p, pair in zip(positions, itertools.pairwise(ends), strict=True)}
        self.down = nn.Parameter(torch.empty(width, config.rank))
        self.up = nn.Parameter(torch.zeros(config.rank, width))
        nn.init.kaiming_uniform_(self.down.T, a=math.sqrt(5))
        if config.form == "tucker":
            self.matrices = nn.Parameter(torch.empty(config.rank, ends[-1]))
            self.core = nn.Parameter(torch.empty(config.rank, config.rank, config.rank))
            nn.init.xavier_uniform_(self.matrices)
            nn.init.xavier_uniform_(self.core)


@register("fact", paper="arXiv:2212.03145")
class FacT(Method):
    """x W_i with W_i = s U Σ_i V, one r × r core Σ_i for each d × d matrix i of the model.

    The paper (Figure 2) cuts the weights of every layer into 12 squares: query, key, value and proj one
    each, fc1 and fc2 four each (in general as many as the hidden width holds). In FacT-TT the cores are free, in
    FacT-TK they are slices of one small tensor, (Σ_i)_ab = Σ_t C_abt P_ti. Backbones whose width changes have
    factors for each width. U and the cores start uniform within 1/√fan-in, C and P Xavier-uniform, V at zero, so the
    model starts unchanged. For fc1 and fc2 the authors' Tucker program deals a core's entries out in another order
    than this formula, which is the paper's.
    """

    Config = FacTConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "scale": (0.1, 1.0, 10.0, 100.0)}

    def __init__(self, config: FacTConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        width, squares = _squares(position)
        factors: Any = shared[_factors_name(width)]
        self._factors = (factors,)  # in a tuple, so that the shared module is registered only once, where it belongs
        self.scale, self.gathers = config.scale, position.place.adds_to in GATHERS
        self.columns = factors.columns[position.key]
        self.dropout = nn.Dropout(config.dropout)
        self.core = None
        if config.form == "tt":
            self.core = nn.Parameter(torch.empty(squares, config.rank, config.rank))
            bound = 1 / math.sqrt(config.rank * (squares if self.gathers else 1))
            nn.init.uniform_(self.core, -bound, bound)

    @classmethod
    def placements(cls, config: FacTConfig) -> tuple[tuple[Place, ...], ...]:
        fused = [_places(config, targets) for targets in ([config.targets] if config.targets else CHOICES)]
        # Where query, key and value have a layer each, the three take the place of the one.
        return tuple(dict.fromkeys(places for one in fused for places in (one, _windowed(one), _unfused(one))))

    @classmethod
    def shared(cls, config: FacTConfig, positions: Sequence[Position]) -> dict[str, nn.Module]:
        of_width: dict[int, list[Position]] = {}
        for position in positions:
            of_width.setdefault(_squares(position)[0], []).append(position)
        return {_factors_name(width): Factors(config, width, those) for width, those in of_width.items()}

    @property
    def cores(self) -> Tensor:
        """Σ [m, r, r] of the m matrices at this position."""
        if self.core is not None:
            return self.core
        factors = self._factors[0]
        return torch.einsum("abt,tm->mab", factors.core, factors.matrices[:, self.columns])

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return s x U Σ_i V side by side: [..., d] -> [..., m d]; or summed over x's parts: [..., m d] -> [..., d]."""
        factors, cores = self._factors[0], self.cores
        if self.gathers:
            hidden = torch.einsum("...ma,mab->...b", x.unflatten(-1, (len(cores), -1)) @ factors.down, cores)
        else:
            hidden = torch.einsum("...a,mab->...mb", x @ factors.down, cores)
        # The scale goes to the small factor: on the result it would cost a pass over a tensor of the features' size.
        added = self.dropout(hidden) @ (self.scale * factors.up)
        return added if self.gathers else added.flatten(-2)

    def low_rank(self) -> LowRank:
        factors, cores, rank = self._factors[0], self.cores, self._factors[0].down.shape[1]
        mix = cores.reshape(-1, rank) if self.gathers else cores.permute(1, 0, 2).reshape(rank, -1)
        dropout = self.dropout.p if self.training else 0.0
        return LowRank(factors.down, factors.up, mix, scale=self.scale, dropout=dropout, drop_mixed=True)


def _squares(position: Position) -> tuple[int, int]:
    """Return the width d at a position and how many d × d matrices its layer holds."""
    wide, width = position.adds_width, position.reads_width
    site = position.place.adds_to
    if site in GATHERS:
        wide, width = width, wide
    if wide % width:
        names = "fc1 and fc2" if site.startswith("mlp.") else "proj" if site in GATHERS else "qkv"
        raise SiteError(
            f"{position.place.reads} to {site} is {position.reads_width} × {position.adds_width}, which FacT cannot "
            f"cut into squares of {width}; leave {names} out of targets"
        )
    return width, wide // width


def _factors_name(width: int) -> str:
    return f"factors_{width}"


def _places(config: FacTConfig, targets: Sequence[str]) -> tuple[Place, ...]:
    places = tuple(place for target in targets for place in TARGETS[target])
    if config.proj_reads == "input":
        places = tuple(INPUT_TO_PROJ if place in TARGETS["proj"] else place for place in places)
    return places


def _windowed(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """The same places inside the windows of attention, where it has any."""
    return tuple(Place(*(INSIDE_WINDOWS.get(name, name) for name in place)) for place in places)


def _unfused(places: tuple[Place, ...]) -> tuple[Place, ...]:
    return tuple(p for place in places for p in (THREE_PROJECTIONS if place in TARGETS["qkv"] else (place,)))
