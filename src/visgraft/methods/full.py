"""Full fine-tuning: every tensor of the backbone trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visgraft.core.method import Method, OwnTensor
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """Full fine-tuning has no options."""


@register("full", paper="baseline: full fine-tuning")
class Full(Method):
    """All parameters train; the adapter then holds the whole backbone, its buffers included."""

    Config = FullConfig
    recipe = TrainConfig(lr=1e-4, weight_decay=0.05, drop_path=0.1)
    knobs: ClassVar = {"lr": (1e-5, 3e-5, 1e-4, 3e-4)}

    @classmethod
    def unfrozen(cls, config: FullConfig, tensors: Sequence[OwnTensor]) -> list[str]:
        return [tensor.name for tensor in tensors]
