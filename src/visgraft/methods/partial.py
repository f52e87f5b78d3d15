"""Partial-k (as in arXiv:2203.12119): the last k blocks and the norm behind them train."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visgraft.core.method import Method, OwnTensor
from visgraft.core.registry import register
from visgraft.errors import VisgraftError
from visgraft.options import MethodConfig, TrainConfig, option


@dataclass(frozen=True)
class PartialConfig(MethodConfig):
    """Options of Partial-k.

    Raises:
        VisgraftError: `blocks` is not above zero; on attaching, it exceeds what the backbone has.
    """

    blocks: int = option(1, "how many of the last blocks train (k)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("blocks")


@register("partial", paper="arXiv:2203.12119")
class Partial(Method):
    """The last k blocks train, and the final norm with them; the embedding and the blocks before stay frozen.

    Source: a baseline of arXiv:2203.12119 (section 4.1), whose program unfreezes the final norm too. Blocks are counted
    as timm groups a model by depth; a layer between two stages trains with the block behind it.
    """

    Config = PartialConfig
    recipe = TrainConfig(lr=1e-4, weight_decay=0.05)
    knobs: ClassVar = {"lr": (3e-5, 1e-4, 3e-4), "blocks": (1, 2, 4)}

    @classmethod
    def unfrozen(cls, config: PartialConfig, tensors: Sequence[OwnTensor]) -> list[str]:
        layers = tensors[0].layers
        if config.blocks >= layers:
            raise VisgraftError(
                f"blocks is {config.blocks}, but timm counts {layers - 1} in this backbone; take fewer, or method full"
            )
        return [tensor.name for tensor in tensors if tensor.layer >= layers - config.blocks]
