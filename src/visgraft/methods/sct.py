"""SCT, Salient Channel Tuning (arXiv:2309.08513): one small linear map on the task's K most salient channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from visgraft.config import MethodConfig, TrainConfig, option
from visgraft.method import Batches, Grid, Method, Place, Position
from visgraft.registry import register
from visgraft.salience import SCORES, salient_channels


@dataclass(frozen=True)
class SCTConfig(MethodConfig):
    """Options of SCT.

    `mode` None takes the first place that the backbone has. `form` A is z + s(Wz + b), B is sz + (Wz + b), with one
    fixed `scale` s for all blocks; which of the two the paper's ViT results used is UNVERIFIED.
    """

    channels: int | None = option(None, "channels tuned per block (K); none: an eighth of the width")
    mode: str | None = option(None, "where: attn (stream after attention) or mlp (the MLP's output)", ("attn", "mlp"))
    form: str = option("A", "A: z + s(Wz + b); B: sz + (Wz + b)", ("A", "B"))
    scale: float = option(1.0, "fixed factor s of the form")
    score: str = option("class_aware", "how channels are chosen", SCORES)
    init_std: float = option(0.02, "standard deviation of the truncated normal that W starts from")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("channels", "scale")


PLACES = {"attn": Place.at("stream.mid"), "mlp": Place.at("mlp.out")}
SCORED_AT = {"stream.mid": "stream.mid", "mlp.out": "stream.out"}


@register("sct", paper="arXiv:2309.08513")
class SCT(Method):
    """A K × K linear map with bias on the chosen channels of every token; all others pass untouched.

    In mode attn it rewrites the residual stream between attention and norm2, in mode mlp the MLP's output. Scores
    come from the plain frozen network alone, so earlier modules do not shift later choices.
    """

    Config = SCTConfig
    recipe = TrainConfig(lr=5e-3)

    index: Tensor

    def __init__(self, config: SCTConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        channels = config.channels or position.adds_width // 8
        self.form, self.scale, self.site = config.form, config.scale, position.place.adds_to
        self.linear = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.linear.weight, std=config.init_std)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("index", torch.arange(channels))

    @classmethod
    def placements(cls, config: SCTConfig) -> tuple[tuple[Place, ...], ...]:
        return (PLACES[config.mode],) if config.mode else tuple(PLACES.values())

    @classmethod
    def affine(cls, config: SCTConfig) -> bool:
        return True

    @classmethod
    def starts_as_identity(cls, config: SCTConfig) -> bool:
        return False  # W starts at random, as in the reference

    @classmethod
    def calibrate(cls, config: SCTConfig, model: nn.Module, modules: Sequence["SCT"], batches: Batches | None) -> None:
        site, channels = SCORED_AT[modules[0].site], len(modules[0].index)
        chosen = salient_channels(model, batches, channels, site, config.score)
        for module, index in zip(modules, chosen, strict=True):
            module.index.copy_(index)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the dense form of what is added: zero outside the chosen channels; [B, N, C] -> [B, N, C]."""
        return torch.zeros_like(x).index_add(-1, self.index, self._tuned(x).to(x.dtype))

    def forward(self, x: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return onto.index_add(-1, self.index, self._tuned(x).to(onto.dtype))

    def _tuned(self, x: Tensor) -> Tensor:
        """What is added to the chosen channels: s(Wz + b) in form A, (s - 1)z + Wz + b in form B; [B, N, K]."""
        z = x.index_select(-1, self.index)
        if self.form == "A":
            return self.scale * self.linear(z)
        return cast(Tensor, (self.scale - 1) * z + self.linear(z))
