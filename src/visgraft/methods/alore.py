"""ALoRE, Aggregating Low Rank Experts (arXiv:2412.08341): a Kronecker sum of low-rank experts, purely linear."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.errors import SiteError, VisgraftError
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
    share: str = option(
        "all",
        "with several labels: all, one set of experts; experts, W_s alone and factors per task; none, nothing. The "
        "latter two answer each task in a pass of its own",
        ("all", "experts", "none"),
        younger=True,
    )
    tasks: tuple[int, ...] | None = option(
        None, "outputs of each task that has factors of its own", younger=True, typed=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rank", "experts", "scale")
        self.check_rates("dropout")
        if self.tasks is not None and (self.share == "all" or min(self.tasks, default=0) < 1):
            raise VisgraftError(f"tasks is {self.tasks}, but must be outputs of tasks that share={self.share!r} parts")

    @property
    def affine(self) -> bool:
        return not self.passes

    @property
    def passes(self) -> tuple[int, ...]:
        return self.tasks or ()

    def for_tasks(self, outputs: tuple[int, ...]) -> Self:
        if self.share == "all":
            return self
        if len(outputs) < 2:
            raise VisgraftError(
                f"share={self.share!r} has no effect on images with one label; leave it out (--share), or name several "
                "columns with --label"
            )
        return replace(self, tasks=outputs)


class KroneckerFactors(nn.Module):
    """The experts' shared Kronecker factors W_s: `weight` [n, n, n], expert i's slice being n × n.

    Where `tasks` share nothing, [tasks, n, n, n].
    """

    def __init__(self, experts: int, init: str, tasks: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*(() if tasks is None else (tasks,)), experts, experts, experts))
        for expert in self.weight.flatten(0, -3):
            if init == "xavier":
                nn.init.xavier_uniform_(expert)
            else:
                nn.init.normal_(expert, std=0.01)


@register("alore", paper="arXiv:2412.08341")
class ALoRE(Method):
    """x + s x W' with W' = Σ_i W_s^i ⊗ (W_d^i W_u^i), computed by its factors and never formed.

    W_d [n, C/n, r] starts Xavier-uniform and W_u [n, r, C/n] at zero, so the model starts unchanged. There is no
    bias. The adapter acts on all tokens, the class token included.

    With `share` other than "all", W_d and W_u have a first axis of tasks, and x that of every task's copies of the
    images, one task's behind the other's: the multi-task learning that the paper's outlook names, not its text.
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
        if config.share != "all" and not config.tasks:
            raise VisgraftError(
                f"share={config.share!r} needs the outputs of each task; train on images with several labels, or pass "
                "tasks=(2, 3, ...)"
            )
        tasks = (len(config.tasks),) if config.tasks else ()
        self.down = nn.Parameter(torch.empty(*tasks, n, width // n, rank))
        self.up = nn.Parameter(torch.zeros(*tasks, n, rank, width // n))
        self.dropout = nn.Dropout(config.dropout)
        for expert in self.down.flatten(0, -3):
            nn.init.xavier_uniform_(expert)

    @classmethod
    def placements(cls, config: ALoREConfig) -> tuple[tuple[Place, ...], ...]:
        if config.places:
            return (Place.at(*config.places),)
        return Place.at("attn.in", "mlp.in"), Place.at("mlp.in", "mlp.out")

    @classmethod
    def shared(cls, config: ALoREConfig, positions: Sequence[Position]) -> dict[str, nn.Module]:
        names = dict.fromkeys(_bank_name(config, position) for position in positions)
        tasks = len(config.passes) if config.share == "none" else None
        return {name: KroneckerFactors(config.experts, config.init, tasks) for name in names}

    @property
    def bank(self) -> Tensor:
        """W_s [n, n, n], shared with all other positions (or with those at the same place); or [tasks, n, n, n]."""
        return cast(Tensor, self._bank[0].weight)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return s x W' [..., C]: down per expert and block, mix blocks by W_s, up, and sum over the experts."""
        if self.down.ndim == 4:
            return self._by_tasks(x)
        n, inner, _ = self.down.shape
        blocks = x.unflatten(-1, (n, inner))
        hidden = self.dropout(torch.einsum("...ap,ipr->...iar", blocks, self.down))
        mixed = torch.einsum("...iar,iab->...bir", hidden, self.bank)
        # The scale goes to the small factor: on the result it would cost a pass over a tensor of the features' size.
        return torch.einsum("...bir,irq->...bq", mixed, self.scale * self.up).flatten(-2)

    def _by_tasks(self, x: Tensor) -> Tensor:
        """`delta` of copies [tasks × B, N, C], each by the factors of its task."""
        tasks, n, inner, _ = self.down.shape
        blocks = x.unflatten(0, (tasks, -1)).unflatten(-1, (n, inner))
        hidden = self.dropout(torch.einsum("tmlap,tipr->tmliar", blocks, self.down))
        bank = self.bank if self.bank.ndim == 4 else self.bank.expand(tasks, n, n, n)
        mixed = torch.einsum("tmliar,tiab->tmlbir", hidden, bank)
        return torch.einsum("tmlbir,tirq->tmlbq", mixed, self.scale * self.up).flatten(-2).flatten(0, 1)

    def low_rank(self) -> LowRank | None:
        """All experts at once: D [C/n, n r], M [n n r, n n r] with the entries of W_s and zeros, U [n r, C/n]."""
        if self.down.ndim == 4:
            return None
        n, inner, rank = self.down.shape
        same = torch.eye(n * rank, dtype=self.down.dtype, device=self.down.device).view(1, n, rank, 1, n, rank)
        mix = (self.bank.permute(1, 0, 2)[:, :, None, :, None, None] * same).reshape(n * n * rank, -1)
        down, up = self.down.permute(1, 0, 2).reshape(inner, n * rank), self.up.view(n * rank, inner)
        return LowRank(down, up, mix, scale=self.scale, dropout=self.dropout.p if self.training else 0.0)

    @property
    def parts(self) -> int:
        return self.up.shape[-3]

    def part_delta(self, x: Tensor, index: int) -> Tensor:
        return self.expert(x, index)

    def keep_parts(self, kept: Collection[int]) -> None:
        with torch.no_grad():
            for index in set(range(self.parts)) - set(kept):
                self.up[..., index, :, :] = 0  # W_s, the other factor, may be shared with other places

    def expert(self, x: Tensor, index: int) -> Tensor:
        """Return what one expert adds, s x E_i [..., C]; the sum over all experts is `delta` without dropout."""
        down, up, bank = (t[..., index, :, :] for t in (self.down, self.up, self.bank))
        tasks = self.down.shape[:-3]
        blocks = x.unflatten(0, (*tasks, -1)) if tasks else x
        blocks = blocks.unflatten(-1, self.down.shape[-3:-1])
        # Where tasks have factors of their own, they are multiplied with all images and tokens of the task's copies.
        between = (1,) * (blocks.ndim - 3) if tasks else ()
        down, up = (t.view(*tasks, *between, *t.shape[-2:]) for t in (down, up))
        low_rank = blocks @ down @ up
        if bank.ndim == 3:
            bank = bank.view(*tasks, *between, *bank.shape[-2:])
        added = self.scale * (bank.mT @ low_rank).flatten(-2)
        return added.flatten(0, 1) if tasks else added


def _bank_name(config: ALoREConfig, position: Position) -> str:
    return "bank" if config.bank == "one" else f"bank_{position.place.reads.replace('.', '_')}"
