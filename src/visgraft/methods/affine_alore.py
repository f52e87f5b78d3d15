"""Affine ALoRE: ALoRE's experts, and beside them the biases and norms of the backbone, at a pace of their own."""

from dataclasses import dataclass
from typing import ClassVar

from visgraft.core.configure import COLOURS
from visgraft.core.registry import register
from visgraft.errors import VisgraftError
from visgraft.methods.alore import ALoRE, ALoREConfig
from visgraft.options import ALSO_TRAINED, TrainConfig, option


@dataclass(frozen=True)
class AffineALoREConfig(ALoREConfig):
    """Options of ALoRE, with `also_train` on by default."""

    also_train: str | None = option(
        "biases+norms", "tensors of the backbone itself that train too", ALSO_TRAINED, kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.also_train is None:
            raise VisgraftError("affine_alore without tensors of the backbone is alore; name that, or leave it out")


@register("affine_alore", paper="arXiv:2412.08341")
class AffineALoRE(ALoRE):
    """ALoRE with trained biases and norms: visgraft's own combination, measured in `docs/recipes.md`.

    Low-rank maps alone learn the training images of a counting task and carry little over; biases and scales carry
    over, but lack capacity elsewhere. Together they need different steps: the experts a quarter of ALoRE's, the
    backbone's own tensors ten times that. Both fold away, so the deployed model is a plain one.
    """

    Config = AffineALoREConfig
    recipe = TrainConfig(lr=5e-4, backbone_lr=5e-3, rand_augment=COLOURS)
    knobs: ClassVar = {"lr": (2e-4, 5e-4, 1e-3), "backbone_lr": (2e-3, 5e-3, 1e-2)}
