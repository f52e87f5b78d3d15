"""Bottleneck adapters (arXiv:1902.00751 by Houlsby et al., arXiv:2005.00247 by Pfeiffer et al.) behind the branches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.core.low_rank import add_by_rows, linear_by_rows
from visgraft.core.method import Grid, Method, OwnTensor, Place, Position
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option

SITES = ("attn.out", "mlp.out")
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "none": nn.Identity}


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Options of the adapter.

    `places`: after the MLP alone is what the search of arXiv:2005.00247 settles on and what vision papers compare with;
    arXiv:1902.00751 stands after both branches, with GELU, and trains the norms too. `init_std` None keeps the model
    unchanged at the start; 0.01 draws both projections as arXiv:1902.00751 does (section 3.6 varies that number).
    """

    bottleneck: int = option(8, "inner width of each adapter")
    places: tuple[str, ...] = option(("mlp.out",), "branches whose output gets an adapter", SITES)
    activation: str = option("gelu", "between the projections; none: the adapter is linear", tuple(ACTIVATIONS))
    dropout: float = option(0.0, "dropout on the hidden features while training")
    scale: float = option(1.0, "fixed factor s of the adapter: x + s x up(act(down(x)))")
    init_std: float | None = option(
        None, "standard deviation that both projections start from; none: the up-projection starts at zero"
    )
    norms: bool = option(False, "also train the backbone's normalisation layers")

    shifts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("bottleneck", "scale", "init_std")
        self.check_rates("dropout")

    @property
    def affine(self) -> bool:
        return self.activation == "none"

    @property
    def starts_as_identity(self) -> bool:
        return self.init_std is None


@register("adapter", paper="arXiv:1902.00751")
class Adapter(Method):
    """x + s (act(x W_d + b_d) W_u + b_u) on a branch's output, before the block adds it to the stream.

    Source: arXiv:1902.00751, section 2.1 and figure 2. W_d [C, r] starts Kaiming-uniform and W_u [r, C] at zero, both
    biases at zero. Setting W_d to zero as well would leave nothing but b_u with a gradient.
    """

    Config = AdapterConfig
    recipe = TrainConfig()
    knobs: ClassVar = {"lr": (5e-4, 1e-3, 2e-3, 5e-3), "bottleneck": (4, 8, 16, 32), "scale": (0.1, 0.5, 1.0, 5.0)}

    def __init__(self, config: AdapterConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        self.scale = config.scale
        self.down = nn.Linear(position.reads_width, config.bottleneck)
        self.activation = ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, position.adds_width)
        if config.init_std is None:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        else:
            for weight in (self.down.weight, self.up.weight):
                nn.init.trunc_normal_(weight, std=config.init_std, a=-2 * config.init_std, b=2 * config.init_std)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    @classmethod
    def placements(cls, config: AdapterConfig) -> tuple[tuple[Place, ...], ...]:
        return (Place.at(*config.places),)

    @classmethod
    def unfrozen(cls, config: AdapterConfig, tensors: Sequence[OwnTensor]) -> list[str]:
        return [tensor.name for tensor in tensors if tensor.norm] if config.norms else []

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return s (act(x W_d + b_d) W_u + b_u): [B, N, C] -> [B, N, C]."""
        hidden = self.dropout(self.activation(self.down(x)))
        return F.linear(hidden, self.scale * self.up.weight, self.scale * self.up.bias)

    def by_rows(self, tensors: Mapping[str, Tensor], x: Tensor, onto: Tensor, in_place: bool = False) -> Tensor:
        """As `forward`, with both projections of each image."""
        hidden = self.activation(linear_by_rows(x, tensors["down.weight"], tensors["down.bias"]))
        up, bias = self.scale * tensors["up.weight"].mT, self.scale * tensors["up.bias"]
        return add_by_rows(onto, hidden, up, bias, in_place)
