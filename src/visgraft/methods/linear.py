"""Linear probing: only the head trains."""

from dataclasses import dataclass
from typing import ClassVar

from visgraft.core.method import Method
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """Linear probing has no options."""


@register("linear", paper="baseline: linear probing")
class Linear(Method):
    """A new linear head on the frozen backbone's features; the reference that every method should leave behind."""

    Config = LinearConfig
    recipe = TrainConfig(epochs=100, warmup_epochs=10.0, lr=1e-2, weight_decay=1e-4)
    knobs: ClassVar = {"lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (1e-4, 1e-2, 1.0)}
