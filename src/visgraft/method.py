"""The contract of a method: where it reads, where it adds, what it adds, and how it likes to be trained."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from visgraft.config import MethodConfig, TrainConfig

Batches = Iterable[tuple[Tensor, Tensor]]
"""Batches of (images [B, 3, H, W], labels [B])."""


class Grid(NamedTuple):
    """How a block's tokens lie: `height` × `width` patches after `prefix_tokens` others (class token, registers)."""

    height: int
    width: int
    prefix_tokens: int


class Place(NamedTuple):
    """A pair of site names: the method reads the tensor at `reads` and adds to the one at `adds_to`."""

    reads: str
    adds_to: str

    @classmethod
    def at(cls, *names: str) -> tuple["Place", ...]:
        """Return places that read and rewrite one site each."""
        return tuple(cls(name, name) for name in names)


class Position(NamedTuple):
    """One place in one block, with the channels of the tensors read and added to."""

    block: int
    place: Place
    reads_width: int
    adds_width: int

    @property
    def key(self) -> str:
        """The name under which the module at this position is registered and stored, e.g. `3_attn_in`."""
        reads, adds_to = (name.replace(".", "_") for name in self.place)
        return f"{self.block}_{reads}" if reads == adds_to else f"{self.block}_{reads}_to_{adds_to}"


class Method(nn.Module):
    """Base of every method; one instance stands at each position of the backbone.

    A subclass sets `Config` and `recipe`, says its `placements`, and computes `delta`. It knows nothing of timm,
    files or the command line. Methods that only unfreeze existing parameters list them in `unfrozen` instead.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    recipe: ClassVar[TrainConfig]
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """What a search may change: a field of `Config` or of the recipe -> the values to try, the default among them."""
    part_name: ClassVar[str] = "part"

    def __init__(self, config: Any, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__()

    @classmethod
    def placements(cls, config: Any) -> tuple[tuple[Place, ...], ...]:
        """Return sets of places in order of preference; the first that the backbone has is used. Empty: no module."""
        return ()

    @classmethod
    def shared(cls, config: Any, positions: Sequence[Position]) -> dict[str, nn.Module]:
        """Return modules that all positions share, by name. They are registered, counted and stored once."""
        return {}

    @classmethod
    def unfrozen(cls, config: Any, tensor_names: Sequence[str]) -> list[str]:
        """Return which of the backbone's own tensors (parameters and buffers, by state-dict name) train."""
        return []

    @classmethod
    def affine(cls, config: Any) -> bool:
        """Whether `delta` is an affine map of each token, so that it may fold into a neighbouring linear layer."""
        return False

    @classmethod
    def starts_as_identity(cls, config: Any) -> bool:
        """Whether the model answers exactly as before right after `attach`."""
        return True

    @classmethod
    def calibrate(cls, config: Any, model: nn.Module, modules: Sequence[Any], batches: Batches | None) -> None:
        """Set what the modules take from the task's data; called once by `attach`, on the plain frozen model."""

    @classmethod
    def channel_score(cls, config: Any) -> str | None:
        """Return the salience score that chose the channels which the modules work on; None: they work on all."""
        return None

    def chosen_channels(self) -> tuple[str, Tensor]:
        """Return the site where this module's channels were scored, and the chosen ones: int64 [K]."""
        raise TypeError(f"{type(self).__name__} must define chosen_channels()")

    @classmethod
    def parts(cls, config: Any) -> int:
        """Return of how many parts, each called a `part_name`, `delta` is the sum; 0: it is not made of parts."""
        return 0

    def part_delta(self, x: Tensor, index: int) -> Tensor:
        """Return what one part adds, like `delta`; the sum over all parts is `delta` in eval mode."""
        raise TypeError(f"{type(self).__name__} must define part_delta(x, index)")

    def keep_parts(self, kept: Collection[int]) -> None:
        """Set the parameters in place so that all parts but those in `kept` add nothing."""
        raise TypeError(f"{type(self).__name__} must define keep_parts(kept)")

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return what is added at `adds_to` for the tensor `x` [..., reads_width] read: [..., adds_width]."""
        raise TypeError(f"{type(self).__name__} must define delta(x, grid)")

    def forward(self, x: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        """Return `onto` [..., adds_width] plus `delta(x)`; override where a cheaper way to add exists."""
        return onto + self.delta(x, grid).to(onto.dtype)
