"""SSF, Scaling and Shifting Your Features (arXiv:2210.08823): a scale and a shift per channel after every operation."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visgraft.core.method import Grid, Method, Place, Position
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option

# For each kind of operation, the sites behind its layers, in order of preference, as families lack some of them. SwiGLU
# has no single first layer, so there the hidden features are scaled where they enter the last one.
SITES: dict[str, tuple[tuple[str, ...], ...]] = {
    "embed": (("patch.out",),),
    "attn": (("attn.qkv", "attn.out"), ("attn.q", "attn.k", "attn.v", "attn.out"), ("attn.out",)),
    "mlp": (("mlp.hidden", "mlp.out"), ("mlp.act", "mlp.out"), ("mlp.out",)),
    "norm": (
        ("norm1.out", "norm2.out", "norm.out"),
        ("norm1.out", "norm2.out"),
        ("norm2.out", "norm.out"),
        ("norm2.out",),
    ),
}

MOST_WIDE = 2**18
"""How many numbers are held at once in a wider precision than the features', so that they stay in a CPU's cache."""


@dataclass(frozen=True)
class SSFConfig(MethodConfig):
    """Options of SSF.

    `init` normal is the authors' program: scale ~ N(1, 0.02²), shift ~ N(0, 0.02²), so the model does not start
    unchanged; identity starts at 1 and 0 exactly. `operations` None takes every operation that the backbone has sites
    for; named ones must be there.
    """

    terms: str = option("both", "which of the two to learn", ("both", "scale", "shift"))
    operations: tuple[str, ...] | None = option(None, "operations to scale and shift behind; none: all", tuple(SITES))
    init: str = option("identity", "start: scale 1 and shift 0, or around them with std 0.02", ("identity", "normal"))

    affine = diagonal = additive = True

    @property
    def shifts(self) -> bool:
        return self.terms != "scale"

    @property
    def starts_as_identity(self) -> bool:
        return self.init == "identity"


@register("ssf", paper="arXiv:2210.08823")
class SSF(Method):
    """γ ⊙ x + β behind the patch embedding, every norm, qkv, the attention's projection and both MLP layers.

    Source: section 3.2 of the paper. `gain` [C] holds γ - 1 and `shift` [C] holds β. The authors exempt both from
    weight decay; decay of the gain rather than of γ pulls towards the frozen model, not towards zero. Layers between
    stages and ConvNeXt's depth-wise convolution, which the authors' programs scale too, have no sites here.
    """

    Config = SSFConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (1e-3, 2e-3, 5e-3, 1e-2), "init": ("identity", "normal")}

    def __init__(self, config: SSFConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        width = position.adds_width
        self.gain = nn.Parameter(torch.zeros(width)) if config.terms != "shift" else None
        self.shift = nn.Parameter(torch.zeros(width)) if config.terms != "scale" else None
        if config.init == "normal":
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def placements(cls, config: SSFConfig) -> tuple[tuple[Place, ...], ...]:
        if config.operations is None:
            choices = [(*SITES[name], ()) if name != "mlp" else SITES[name] for name in SITES]
        else:
            choices = [SITES[name] for name in SITES if name in config.operations]
        # The product counts its last factor up first, so the first set that a backbone has is best in every factor.
        return tuple(Place.at(*itertools.chain(*sites)) for sites in itertools.product(*choices))

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return (γ - 1) ⊙ x + β: [B, N, C] -> [B, N, C]."""
        if self.gain is None:
            assert self.shift is not None
            return self.shift.expand_as(x)
        scaled = self.gain * x
        return scaled if self.shift is None else scaled + self.shift

    def forward(self, x: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        if x is not onto:
            return super().forward(x, onto, grid)
        # In one pass over the features, where x + ((γ - 1) ⊙ x + β) takes three; at the start it is as exact.
        factor = torch.ones_like(x[0, 0]) if self.gain is None else 1 + self.gain
        if not x.is_contiguous():
            moved = x * factor if self.shift is None else torch.addcmul(self.shift, x, factor)
            return moved.to(onto.dtype)
        # Batch normalisation that normalises by mean 0 and variance 1: torch has a fused backward pass for it. The
        # operator itself, because the function in front of it refuses an eps of 0 in some versions.
        zero, one = torch.zeros_like(factor), torch.ones_like(factor)
        shift = zero if self.shift is None else self.shift
        flat, training, momentum, eps, cudnn = x.flatten(0, -2), False, 0.0, 0.0, False
        return torch.batch_norm(flat, factor, shift, zero, one, training, momentum, eps, cudnn).view(x.shape)

    def by_rows(self, tensors: Mapping[str, Tensor], x: Tensor, onto: Tensor, in_place: bool = False) -> Tensor:
        """As `forward`, with factors and shifts [B, C] of each image."""
        gain, shift = (None if t is None else t.unsqueeze(1) for t in map(tensors.get, ("gain", "shift")))
        if x is not onto:
            added = shift if gain is None else gain * x if shift is None else torch.addcmul(shift, gain, x)
            assert added is not None
            return onto + added.to(onto.dtype)
        compiling = torch.compiler.is_compiling()  # which takes no part of a tensor to write to, and fuses passes
        out = None if compiling else onto if in_place else torch.empty_like(onto)
        factor = None if gain is None else 1 + gain
        if out is not None and x.device.type == "cpu" and x.dtype != tensors_dtype(factor, shift):
            return _scaled_apart(x, factor, shift, out)
        if factor is None:
            assert shift is not None
            return torch.add(x, shift, out=out).to(onto.dtype)
        moved = torch.mul(x, factor, out=out) if shift is None else torch.addcmul(shift, x, factor, out=out)
        return moved.to(onto.dtype)


def tensors_dtype(factor: Tensor | None, shift: Tensor | None) -> torch.dtype:
    """Return the precision of what a feature is scaled and shifted by."""
    one = shift if factor is None else factor
    assert one is not None
    return one.dtype


def _scaled_apart(x: Tensor, factor: Tensor | None, shift: Tensor | None, out: Tensor) -> Tensor:
    """Scale and shift some images at a time in the wider precision, which on a CPU takes a fraction of a mixed pass."""
    dtype = tensors_dtype(factor, shift)
    images = max(MOST_WIDE // x[0].numel(), 1) if len(x) else 1
    for start in range(0, len(x), images):
        some = slice(start, start + images)
        wide = x[some].to(dtype)
        if factor is not None and shift is not None:
            torch.addcmul(shift[some], wide, factor[some], out=wide)
        elif factor is not None:
            wide.mul_(factor[some])
        elif shift is not None:
            wide.add_(shift[some])
        out[some].copy_(wide)
    return out
