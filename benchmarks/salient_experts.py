"""Salient experts: ALoRE's Kronecker sum of low-rank experts, on the channels that SCT would choose.

An experiment of our own, registered here for `salex.py` alone; docs/methods/salex.md says how it fared.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from visgraft.core.method import Batches, ChosenChannels, Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.errors import SiteError, VisgraftError
from visgraft.methods.alore import KroneckerFactors
from visgraft.methods.salience import SCORE_FUNCTIONS, SCORES, channel_squares
from visgraft.options import MethodConfig, TrainConfig, option

SITES = ("attn.in", "attn.out", "mlp.in", "mlp.out")
FORMS = ("square", "read", "write")
ORDERS = ("index", "interleaved")


@dataclass(frozen=True)
class SalexConfig(MethodConfig):
    """Options of the salient experts.

    Raises:
        VisgraftError: a number is out of range, there is no place, or an order needs scores that a random choice lacks.
    """

    channels: int | None = option(None, "salient channels per place (K); none: a quarter of the width")
    rank: int = option(4, "inner width of each expert (r)")
    experts: int = option(4, "number of experts and order of the Kronecker product (n); must divide K and the width")
    form: str = option("square", "from and to the salient channels; from them to all; or from all to them", FORMS)
    places: tuple[str, ...] | None = option(None, "sites to adapt; none: attn.in and mlp.in", SITES)
    scale: float = option(5.0, "fixed factor s of the adapter")
    dropout: float = option(0.1, "dropout on the experts' hidden features while training")
    score: str = option("class_aware", "how channels are chosen", SCORES)
    order: str = option("index", "how the salient channels are laid out over the Kronecker blocks", ORDERS)

    affine = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("channels", "rank", "experts", "scale")
        self.check_rates("dropout")
        if self.score == "random" and self.order != "index":
            raise VisgraftError(f"order {self.order} needs scores, which random has not; use order index")


@register("salex", paper="visgraft")
class Salex(Method):
    """x[out] + s x[in] W' with W' = Σ_i W_s^i ⊗ (D_i U_i), where in, out or both are the K salient channels.

    D [n, K_in/n, r] starts Xavier-uniform and U [n, r, K_out/n] at zero, so the model starts unchanged; W_s [n, n, n]
    is one bank for the whole model. With K = C this is ALoRE. There is no bias. Scores come from the plain frozen
    network, at the site itself.
    """

    Config = SalexConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "scale": (0.5, 1.0, 2.0, 5.0, 10.0)}
    part_name: ClassVar = "expert"

    index: Tensor

    def __init__(self, config: SalexConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        n, rank, width = config.experts, config.rank, position.adds_width
        channels = config.channels or width // 4
        for what, count in (("channels", channels), ("width", width)):
            if count % n or count > width:
                raise SiteError(f"{what} {count} at {position.place.reads} must be a multiple of {n}, ≤ {width}")
        self._bank = (shared["bank"],)  # in a tuple, so that the shared module is registered only once
        self.scale, self.score, self.site = config.scale, config.score, position.place.reads
        self.picks, self.puts = config.form != "write", config.form != "read"
        reads, writes = (channels if self.picks else width), (channels if self.puts else width)
        self.down = nn.Parameter(torch.empty(n, reads // n, rank))
        self.up = nn.Parameter(torch.zeros(n, rank, writes // n))
        self.dropout = nn.Dropout(config.dropout)
        for expert in self.down:
            nn.init.xavier_uniform_(expert)
        self.register_buffer("index", torch.arange(channels))

    @classmethod
    def placements(cls, config: SalexConfig) -> tuple[tuple[Place, ...], ...]:
        if config.places:
            return (Place.at(*config.places),)
        return Place.at("attn.in", "mlp.in"), Place.at("mlp.in", "mlp.out")

    @classmethod
    def shared(cls, config: SalexConfig, positions: Sequence[Position]) -> dict[str, nn.Module]:
        return {"bank": KroneckerFactors(config.experts, "xavier")}

    @classmethod
    def calibrate(
        cls, config: SalexConfig, model: nn.Module, modules: Sequence["Salex"], batches: Batches | None
    ) -> None:
        if config.score == "random":
            for module in modules:
                module.index.copy_(torch.randperm(_width(model))[: len(module.index)].sort().values)
            return
        if batches is None:
            raise VisgraftError(f"the score {config.score!r} looks at the task's images: pass `batches`")
        kept = list(batches)  # they are read once per site
        sums = {site: iter(channel_squares(model, kept, site)) for site in dict.fromkeys(m.site for m in modules)}
        for module in modules:  # they stand in order of the blocks
            module.index.copy_(_lay_out(next(sums[module.site]), len(module.index), config))

    def chosen_channels(self) -> ChosenChannels:
        return ChosenChannels(self.site, self.index, self.score)

    @property
    def bank(self) -> Tensor:
        """W_s [n, n, n], shared with all other positions."""
        return cast(Tensor, self._bank[0].weight)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the dense form of what is added, zero outside the written channels; [..., C] -> [..., C]."""
        added = self._added(x)
        if not self.puts:
            return added
        return torch.zeros_like(x).index_add(-1, self.index, added.to(x.dtype))

    def forward(self, x: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        added = self._added(x).to(onto.dtype)
        return onto.index_add(-1, self.index, added) if self.puts else onto + added

    def _added(self, x: Tensor) -> Tensor:
        """Return s x[in] W' [..., K_out]: down per expert and block, mix blocks by W_s, up, sum over the experts."""
        n, inner, _ = self.down.shape
        z = x.index_select(-1, self.index) if self.picks else x
        hidden = self.dropout(torch.einsum("...ap,ipr->...iar", z.unflatten(-1, (n, inner)), self.down))
        mixed = torch.einsum("...iar,iab->...bir", hidden, self.bank)
        return torch.einsum("...bir,irq->...bq", mixed, self.scale * self.up).flatten(-2)

    @property
    def parts(self) -> int:
        return len(self.up)

    def part_delta(self, x: Tensor, index: int) -> Tensor:
        z = (x.index_select(-1, self.index) if self.picks else x).unflatten(-1, self.down.shape[:2])
        low_rank = z @ self.down[index] @ self.up[index]
        added = self.scale * torch.einsum("...ap,ab->...bp", low_rank, self.bank[index]).flatten(-2)
        return torch.zeros_like(x).index_add(-1, self.index, added) if self.puts else added

    def keep_parts(self, kept: Collection[int]) -> None:
        with torch.no_grad():
            for index in set(range(self.parts)) - set(kept):
                self.up[index] = 0


def _width(model: nn.Module) -> int:
    return int(model.num_features)  # type: ignore[arg-type]


def _lay_out(sums: dict[int, Tensor], channels: int, config: SalexConfig) -> Tensor:
    """Return the chosen channels [K] in the order in which the Kronecker blocks read them.

    `index`: ascending. `interleaved`: by falling score, dealt out to the blocks in turn, so that channels that share
    an expert's weights are similarly salient.
    """
    chosen = SCORE_FUNCTIONS[config.score](sums).topk(channels).indices.cpu()
    if config.order == "index":
        return chosen.sort().values
    return chosen.view(-1, config.experts).T.flatten()
