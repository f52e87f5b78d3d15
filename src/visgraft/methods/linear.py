"""Linear probing: only the head trains."""

from dataclasses import dataclass

from visgraft.config import MethodConfig, TrainConfig
from visgraft.method import Method
from visgraft.registry import register


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """Linear probing has no options."""


@register("linear", paper="baseline: linear probing")
class Linear(Method):
    """A new linear head on the frozen backbone's features; the reference that every method should leave behind."""

    Config = LinearConfig
    recipe = TrainConfig(epochs=100, warmup_epochs=10.0, lr=1e-2, weight_decay=1e-4)
