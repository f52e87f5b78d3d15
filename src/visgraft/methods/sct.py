"""SCT, Salient Channel Tuning (arXiv:2309.08513): one small linear map on the task's K most salient channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visgraft.core.method import Batches, ChosenChannels, Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.errors import VisgraftError
from visgraft.methods.salience import SCORES, salient_channels_at
from visgraft.options import MethodConfig, TrainConfig, option

FORMS = ("A", "B")


@dataclass(frozen=True)
class SCTConfig(MethodConfig):
    """Options of SCT.

    `mode` None takes attn, or mlp where the backbone has no such place. `form` A is z + s(Wz + b), B is sz + (Wz + b),
    with one fixed `scale` s for all blocks; which of the two the paper's ViT results used is UNVERIFIED. Mode qkv is
    z + Wz + b without either, so there both are None; elsewhere None stands for A and 1.

    Raises:
        VisgraftError: `form` or `scale` is given for mode qkv, or a number is not above zero.
    """

    channels: int | None = option(None, "channels tuned per module (K); none: an eighth of the width")
    mode: str | None = option(
        None, "where: the stream after attention, the MLP's output, or queries and values", ("attn", "mlp", "qkv")
    )
    form: str | None = option(None, "A: z + s(Wz + b); B: sz + (Wz + b); none: A, and no form in mode qkv", FORMS)
    scale: float | None = option(None, "fixed factor s of the form; none: 1, and no factor in mode qkv")
    blocks: str = option(
        "late", "of a backbone with stages: the last half of the third and all of the fourth, or all", ("late", "all")
    )
    score: str = option("class_aware", "how channels are chosen", SCORES)
    init_std: float = option(0.02, "standard deviation of the truncated normal that W starts from")

    affine = shifts = True
    starts_as_identity = False  # W starts at random, as in the reference

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("channels", "scale")
        for name, default in (("form", "A"), ("scale", 1.0)):
            if self.mode == "qkv" and getattr(self, name) is not None:
                raise VisgraftError(
                    f"{name} is {getattr(self, name)}, but mode qkv adds Wz + b as it is; leave {name} out, or use "
                    "mode attn or mlp"
                )
            if self.mode != "qkv" and getattr(self, name) is None:
                object.__setattr__(self, name, default)

    @property
    def additive(self) -> bool:
        return self.form != "B"  # which adds (s - 1)z besides


PLACES = {"attn": Place.at("stream.mid"), "mlp": Place.at("mlp.out"), "qkv": Place.at("attn.q", "attn.v")}
SCORED_AT = {"stream.mid": "stream.mid", "mlp.out": "stream.out", "attn.q": "attn.q", "attn.v": "attn.v"}


@register("sct", paper="arXiv:2309.08513")
class SCT(Method):
    """A K × K linear map with bias on the chosen channels of every token; all others pass untouched.

    In mode attn it rewrites the residual stream between attention and norm2, in mode mlp the MLP's output, in mode qkv
    the queries and the values, with channels of their own. Scores come from the plain frozen network alone, so earlier
    modules do not shift later choices.
    """

    Config = SCTConfig
    recipe = TrainConfig(lr=5e-3)
    knobs: ClassVar = {"lr": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2), "scale": (0.1, 0.25, 0.5, 1.0)}

    index: Tensor

    def __init__(self, config: SCTConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        channels = config.channels or position.adds_width // 8
        self.form, self.scale, self.score = config.form, config.scale, config.score
        self.site, self.block = position.place.adds_to, position.block
        self.linear = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.linear.weight, std=config.init_std)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("index", torch.arange(channels))

    @classmethod
    def placements(cls, config: SCTConfig) -> tuple[tuple[Place, ...], ...]:
        return (PLACES[config.mode],) if config.mode else (PLACES["attn"], PLACES["mlp"])

    @classmethod
    def spans(cls, config: SCTConfig, stages: Sequence[int]) -> list[tuple[int, int]]:
        """All blocks, or in four stages the last half of the third, rounded up, and all of the fourth."""
        every = super().spans(config, stages)
        if config.blocks == "all" or len(set(stages)) < 4:
            return every
        third = stages.count(2)
        return every[stages.index(3) - (third + 1) // 2 :]

    @classmethod
    def calibrate(cls, config: SCTConfig, model: nn.Module, modules: Sequence["SCT"], batches: Batches | None) -> None:
        sites = dict.fromkeys(SCORED_AT[module.site] for module in modules)
        blocks = {module.block for module in modules if module.block is not None}
        chosen = salient_channels_at(model, batches, config.channels, list(sites), config.score, blocks)
        for module in modules:
            assert module.block is not None
            module.index.copy_(chosen[SCORED_AT[module.site]][module.block])

    def chosen_channels(self) -> ChosenChannels:
        return ChosenChannels(SCORED_AT[self.site], self.index, self.score)

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the dense form of what is added: zero outside the chosen channels; [B, N, C] -> [B, N, C]."""
        return torch.zeros_like(x).index_add(-1, self.index, self._tuned(x).to(x.dtype))

    def forward(self, x: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return onto.index_add(-1, self.index, self._tuned(x).to(onto.dtype))

    def by_rows(self, tensors: Mapping[str, Tensor], x: Tensor, onto: Tensor, in_place: bool = False) -> Tensor:
        """As `forward`, with channels [B, K], weights [B, K, K] and biases [B, K] of each image."""
        index = tensors["index"].unsqueeze(1).expand(-1, x.shape[1], -1)
        z = x.gather(-1, index)
        bias = tensors["linear.bias"].unsqueeze(1)
        tuned = self._formed(z, z @ tensors["linear.weight"].transpose(1, 2) + bias)
        add = onto.scatter_add_ if in_place else onto.scatter_add
        return add(-1, index, tuned.to(onto.dtype))

    def _tuned(self, x: Tensor) -> Tensor:
        """What is added to the chosen channels [B, N, K]: s(Wz + b) in form A, (s - 1)z + Wz + b in form B.

        Without a form it is Wz + b.
        """
        z = x.index_select(-1, self.index)
        return self._formed(z, self.linear(z))

    def _formed(self, z: Tensor, mapped: Tensor) -> Tensor:
        if self.scale is None:
            return mapped
        return self.scale * mapped if self.form == "A" else (self.scale - 1) * z + mapped
