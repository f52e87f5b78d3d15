"""LN-Tune (arXiv:2304.01917): the normalisation layers of the backbone train, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visgraft.core.method import Method, OwnTensor
from visgraft.core.registry import register
from visgraft.errors import VisgraftError
from visgraft.options import MethodConfig, TrainConfig


@dataclass(frozen=True)
class NormConfig(MethodConfig):
    """LN-Tune has no options."""


@register("norm", paper="arXiv:2304.01917")
class Norm(Method):
    """Scales and shifts of all normalisation layers train; of BatchNorm also the running statistics.

    Source: the paper names it LN-Tune and applies it to few-shot classification with vision transformers.
    """

    Config = NormConfig
    recipe = TrainConfig(weight_decay=0.0)  # decay would pull scales near one towards zero
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)}

    @classmethod
    def unfrozen(cls, config: NormConfig, tensors: Sequence[OwnTensor]) -> list[str]:
        names = [tensor.name for tensor in tensors if tensor.norm]
        if not names:
            raise VisgraftError("norm finds no normalisation layer with parameters in this backbone; use bitfit")
        return names
