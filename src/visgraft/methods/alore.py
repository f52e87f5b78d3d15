"""ALoRE, Aggregating Low Rank Experts (arXiv:2412.08341): a Kronecker sum of low-rank experts, purely linear."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.errors import SiteError
from visgraft.options import MethodConfig, TrainConfig, option

SITES = ("attn.in", "attn.out", "mlp.in", "mlp.out")


@dataclass(frozen=True)
class ALoREConfig(MethodConfig):
    """Options of ALoRE.

    The number of experts, the places, the scale, the dropout and both initialisations are UNVERIFIED readings of the
    paper; its formula, the shapes and the published count of 0.15 M on ViT-B fix the rest.
    """

    rank: int = option(4, "inner width of each expert (r)")
    experts: int = option(4, "number of experts and order of the Kronecker product (n); must divide the width")
    places: tuple[str, ...] | None = option(None, "sites to adapt; none: attn.in and mlp.in", SITES)
    scale: float = option(5.0, "fixed factor s of the adapter: x + s x W'")
    dropout: float = option(0.1, "dropout on the experts' hidden features while training")
    bank: str = option("one", "W_s: one bank for the whole model, or one per place", ("one", "per_place"))
    init: str = option("xavier", "how W_s starts: xavier uniform, or normal with std 0.01", ("xavier", "normal"))

    affine = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rank", "experts", "scale")
        self.check_rates("dropout")


class KroneckerFactors(nn.Module):
    """The experts' shared Kronecker factors W_s: `weight` [n, n, n], expert i's slice being n × n."""

    def __init__(self, experts: int, init: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, experts, experts))
        for expert in self.weight:
            if init == "xavier":
                nn.init.xavier_uniform_(expert)
            else:
                nn.init.normal_(expert, std=0.01)


@register("alore", paper="arXiv:2412.08341")
class ALoRE(Method):
    """x + s x W' with W' = Σ_i W_s^i ⊗ (W_d^i W_u^i), computed by its factors and never formed.

    W_d [n, C/n, r] starts Xavier-uniform and W_u [n, r, C/n] at zero, so the model starts unchanged. There is no
    bias. The adapter acts on all tokens, the class token included.
    """

    Config = ALoREConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "scale": (0.1, 0.5, 1.0, 5.0, 10.0)}
    part_name: ClassVar = "expert"

    def __init__(self, config: ALoREConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        n, rank, width = config.experts, config.rank, position.adds_width
        if width % n:
            raise SiteError(
                f"{position.place.reads} has {width} channels, which {n} experts do not divide; change experts"
            )
        bank = shared[_bank_name(config, position)]
        self._bank = (bank,)  # in a tuple, so that the shared module is registered only once, where it belongs
        self.scale = config.scale
        self.down = nn.Parameter(torch.empty(n, width // n, rank))
        self.up = nn.Parameter(torch.zeros(n, rank, width // n))
        self.dropout = nn.Dropout(config.dropout)
        for expert in self.down:
            nn.init.xavier_uniform_(expert)

    @classmethod
    def placements(cls, config: ALoREConfig) -> tuple[tuple[Place, ...], ...]:
        if config.places:
            return (Place.at(*config.places),)
        return Place.at("attn.in", "mlp.in"), Place.at("mlp.in", "mlp.out")

    @classmethod
    def shared(cls, config: ALoREConfig, positions: Sequence[Position]) -> dict[str, nn.Module]:
        names = dict.fromkeys(_bank_name(config, position) for position in positions)
        return {name: KroneckerFactors(config.experts, config.init) for name in names}

    @property
    def bank(self) -> Tensor:
        """W_s [n, n, n], shared with all other positions (or with those at the same place)."""
        return cast(Tensor, self._bank[0].weight)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return s x W' [..., C]: down per expert and block, mix blocks by W_s, up, and sum over the experts."""
        n, inner, _ = self.down.shape
        blocks = x.unflatten(-1, (n, inner))
        hidden = self.dropout(torch.einsum("...ap,ipr->...iar", blocks, self.down))
        mixed = torch.einsum("...iar,iab->...bir", hidden, self.bank)
        # The scale goes to the small factor: on the result it would cost a pass over a tensor of the features' size.
        return torch.einsum("...bir,irq->...bq", mixed, self.scale * self.up).flatten(-2)

    def low_rank(self) -> LowRank:
        """All experts at once: D [C/n, n r], M [n n r, n n r] with the entries of W_s and zeros, U [n r, C/n]."""
        n, inner, rank = self.down.shape
        same = torch.eye(n * rank, dtype=self.down.dtype, device=self.down.device).view(1, n, rank, 1, n, rank)
        mix = (self.bank.permute(1, 0, 2)[:, :, None, :, None, None] * same).reshape(n * n * rank, -1)
        down, up = self.down.permute(1, 0, 2).reshape(inner, n * rank), self.up.view(n * rank, inner)
        return LowRank(down, up, mix, scale=self.scale, dropout=self.dropout.p if self.training else 0.0)

    @property
    def parts(self) -> int:
        return len(self.up)

    def part_delta(self, x: Tensor, index: int) -> Tensor:
        return self.expert(x, index)

    def keep_parts(self, kept: Collection[int]) -> None:
        with torch.no_grad():
            for index in set(range(self.parts)) - set(kept):
                self.up[index] = 0  # W_s, the other factor, may be shared with other places

    def expert(self, x: Tensor, index: int) -> Tensor:
        """Return what one expert adds, s x E_i [..., C]; the sum over all experts is `delta` without dropout."""
        blocks = x.unflatten(-1, self.down.shape[:2])
        low_rank = blocks @ self.down[index] @ self.up[index]
        return self.scale * torch.einsum("...ap,ab->...bp", low_rank, self.bank[index]).flatten(-2)


def _bank_name(config: ALoREConfig, position: Position) -> str:
    return "bank" if config.bank == "one" else f"bank_{position.place.reads.replace('.', '_')}"
