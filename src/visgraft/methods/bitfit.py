"""BitFit (arXiv:2106.10199): the biases of the backbone train, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visgraft.core.method import Method, OwnTensor
from visgraft.core.registry import register
from visgraft.errors import VisgraftError
from visgraft.options import MethodConfig, TrainConfig


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """BitFit has no options."""


@register("bitfit", paper="arXiv:2106.10199")
class BitFit(Method):
    """All bias vectors train: of linear layers, convolutions and norms, as in the paper's section 3.

    The paper also tunes the biases of the query and of the MLP's first layer alone. Where one bias serves query, key
    and value together, as in most of timm, that choice cannot be made by tensor, so it is not offered.
    """

    Config = BitFitConfig
    recipe = TrainConfig(lr=2e-3, weight_decay=0.0)  # decay would pull pretrained biases towards zero
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)}

    @classmethod
    def unfrozen(cls, config: BitFitConfig, tensors: Sequence[OwnTensor]) -> list[str]:
        if not any(tensor.role == "bias" for tensor in tensors):
            raise VisgraftError("bitfit finds no bias in this backbone; use norm, or a method with modules of its own")
        # BatchNorm's statistics move while its bias trains, so they belong to what was trained.
        moving = [tensor for tensor in tensors if tensor.role == "bias" or (tensor.norm and tensor.role == "buffer")]
        return [tensor.name for tensor in moving]
