"""The contract of a method: where it reads, where it adds, what it adds, and how it likes to be trained."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank
from visgraft.options import MethodConfig, TrainConfig

Batches = Iterable[tuple[Tensor, Tensor]]
"""Batches of (images [B, 3, H, W], labels [B])."""


class Grid(NamedTuple):
    """How a site's tokens lie: `height` × `width` patches after `prefix_tokens` others (class token, registers).

    Inside windowed attention it is one window, and the windows lie along the batch.
    """

    height: int
    width: int
    prefix_tokens: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split tokens [B, P + H W, C] into the prefix [B, P, C] and the patches as an image [B, C, H, W]."""
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        return prefix, patches.transpose(1, 2).unflatten(2, (self.height, self.width))

    def join(self, prefix: Tensor, image: Tensor) -> Tensor:
        """Undo `split`: [B, P, C] and [B, C, H, W] -> [B, P + H W, C]."""
        return torch.cat((prefix, image.flatten(2).transpose(1, 2)), dim=1)


class Place(NamedTuple):
    """A pair of site names: the method reads the tensor at `reads` and adds to the one at `adds_to`."""

    reads: str
    adds_to: str

    @classmethod
    def at(cls, *names: str) -> tuple["Place", ...]:
        """Return places that read and rewrite one site each."""
        return tuple(cls(name, name) for name in names)


class Position(NamedTuple):
    """One place in one block, with the channels of the tensors read and added to.

    `block` counts from 0 over all stages; None: the place belongs to no block (`patch.out`, `norm.out`). `last` is the
    block in which it adds, where that is a later one.
    """

    block: int | None
    place: Place
    reads_width: int
    adds_width: int
    last: int | None = None

    @property
    def key(self) -> str:
        """The name under which the module at this position is registered and stored, e.g. `3_attn_in`."""
        reads, adds_to = (name.replace(".", "_") for name in self.place)
        where = reads if reads == adds_to else f"{reads}_to_{adds_to}"
        return where if self.block is None else f"{self.block}_{where}"


@dataclass(frozen=True)
class OwnTensor:
    """A tensor of the backbone itself, the head's left out: its name in the state dict and what it is.

    `norm` says whether its owner is a normalisation layer. `layer` counts from 0 (what comes before the blocks) to
    `layers - 1` (the last block and the norm behind it), as timm groups the model's layers by depth.
    """

    name: str
    role: Literal["weight", "bias", "buffer"]
    norm: bool
    layer: int
    layers: int


class FrozenLayer:
    """The frozen linear layer whose output a method adds to, to be read: some or all rows of its weight.

    The layer stays the backbone's: it is neither registered, counted nor stored with the method, and moves with the
    model.
    """

    def __init__(self, layer: nn.Module, rows: tuple[int, int] | None = None) -> None:
        self.layer, self.rows = layer, rows

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] as it is now."""
        weight: Any = self.layer.weight
        whole: Tensor = weight.flatten(1)  # a convolution of 1 × 1 is linear as well
        return whole if self.rows is None else whole[slice(*self.rows)]


class Method(nn.Module):
    """Base of every method; one instance stands at each position of the backbone.

    A subclass sets `Config` and `recipe`, says its `placements`, and computes `delta`. It knows nothing of timm,
    files or the command line. What follows from its options alone, such as whether it is affine, its config answers.
    Methods that only unfreeze existing parameters list them in `unfrozen` instead; `TokenMethod` is the base of those
    that insert tokens. Further abilities are protocols, met by defining their functions: `ReadsLayer`, `ActsByRows`,
    `ChoosesChannels`, `MadeOfParts`, `HoldsLowRank`. Every tensor that a method sees is [B, N, C], however the backbone
    lays its features out.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    recipe: ClassVar[TrainConfig]
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """What a search may change: a field of `Config` or of the recipe -> the values to try, the default among them."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "Config" in cls.__dict__:  # the options must know it before a model is there
            cls.Config.has_places = cls.placements.__func__ is not Method.placements.__func__  # type: ignore[attr-defined]
            unfreezes = cls.unfrozen.__func__ is not Method.unfrozen.__func__  # type: ignore[attr-defined]
            cls.Config.head_only = not (cls.Config.has_places or unfreezes)

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
    def spans(cls, config: Any, stages: Sequence[int]) -> list[tuple[int, int]]:
        """Return pairs of block numbers: where a module reads, and where it adds; by default each block with itself.

        `stages` holds each block's stage, counted from 0; a backbone without stages has one. Places outside the
        blocks are not concerned. Where only the last blocks are adapted, pairs that add before them are left out, and
        one that reads before them reads in the first of them.
        """
        return [(block, block) for block in range(len(stages))]

    @classmethod
    def unfrozen(cls, config: Any, tensors: Sequence[OwnTensor]) -> list[str]:
        """Return the names of those of the backbone's own tensors that train."""
        return []

    @classmethod
    def calibrate(cls, config: Any, model: nn.Module, modules: Sequence[Any], batches: Batches | None) -> None:
        """Set what the modules take from the task's data; called once by `attach`, on the plain frozen model."""

    def delta(self, x: Tensor, grid: Grid) -> Tensor:
        """Return what is added at `adds_to` for the tensor `x` [B, N, reads_width] read: [B, N, adds_width]."""
        raise TypeError(f"{type(self).__name__} must define delta(x, grid)")

    def low_rank(self) -> LowRank | None:
        """Return `delta` as factors where it is a low-rank map, so that it costs few passes over the features.

        `delta` stays the plain form: what compiled models run, and what the other is tested against.
        """
        return None

    def forward(self, x: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        """Return `onto` [B, N, adds_width] plus `delta(x)`; override where a cheaper way to add exists."""
        return onto + self.delta(x, grid).to(onto.dtype)


class TokenMethod(Method):
    """Base of methods that insert tokens at `reads` and take them out again at `adds_to`."""

    def tokens(self) -> int:
        """Return how many tokens `insert` inserts."""
        raise TypeError(f"{type(self).__name__} must define tokens()")

    def insert(self, x: Tensor, grid: Grid) -> Tensor:
        """Return `x` [B, N, C] with `tokens()` further ones behind its `grid.prefix_tokens`: [B, N + T, C]."""
        raise TypeError(f"{type(self).__name__} must define insert(x, grid)")

    def remove(self, x: Tensor, grid: Grid) -> Tensor:
        """Return `x` [B, N + T, C] without the tokens that `insert` inserted: [B, N, C]."""
        raise TypeError(f"{type(self).__name__} must define remove(x, grid)")


@runtime_checkable
class ReadsLayer(Protocol):
    """A method whose modules need the frozen layer that makes what they add to."""

    def beside(self, layer: FrozenLayer) -> None:
        """Take the layer; called once by `attach`, before any forward."""


@runtime_checkable
class ActsByRows(Protocol):
    """A method that says how many images are computed at once, each with tensors of its own.

    Without it a bank computes the factors of `low_rank`, or maps `forward` over the images.
    """

    def by_rows(self, tensors: Mapping[str, Tensor], x: Tensor, onto: Tensor, in_place: bool = False) -> Tensor:
        """Return what `forward` returns in eval mode, image by image: `x` [B, N, R] and `onto` [B, N, C] -> [B, N, C].

        `tensors` holds the module's own by name, each with a first axis of B; N counts all tokens of an image, in
        whatever windows they lie. `x` and `onto` may be one tensor. With `in_place`, `onto` is nobody else's, and may
        be rewritten and returned.
        """
        ...


@runtime_checkable
class InsertsByRows(Protocol):
    """A method that inserts tokens into many images at once, each with tensors of its own; its `remove` needs none.

    Without it a bank maps both over the images.
    """

    def insert_by_rows(self, tensors: Mapping[str, Tensor], x: Tensor, grid: Grid) -> Tensor:
        """Return what `insert` returns in eval mode, image by image: [B, N, C] -> [B, N + T, C].

        `tensors` holds the module's own by name, each with a first axis of B.
        """
        ...


class ChosenChannels(NamedTuple):
    """The `channels` a module works on, int64 [K], chosen by the salience `score` of a tensor at `site`."""

    site: str
    channels: Tensor
    score: str


@runtime_checkable
class ChoosesChannels(Protocol):
    """A method whose modules work on chosen channels only, which reports and results then show."""

    def chosen_channels(self) -> ChosenChannels:
        """Return this module's choice."""
        ...


@runtime_checkable
class MadeOfParts(Protocol):
    """A method whose `delta` is a sum of `parts` parts, each called a `part_name`, which reports then show."""

    part_name: ClassVar[str]

    @property
    def parts(self) -> int:
        """Of how many parts `delta` is the sum."""
        ...

    def part_delta(self, x: Tensor, index: int) -> Tensor:
        """Return what one part adds, like `delta`; the sum over all parts is `delta` in eval mode."""
        ...

    def keep_parts(self, kept: Collection[int]) -> None:
        """Set the parameters in place so that all parts but those in `kept` add nothing."""


@runtime_checkable
class HoldsLowRank(Protocol):
    """A method whose modules can be any map of a rank, so that a truncated map of another method's becomes one."""

    @classmethod
    def holding(cls, places: Collection[Place], rank: int, shifts: bool) -> MethodConfig | None:
        """Return options with which modules of this rank stand at these places; None: the method has none.

        `shifts`: the maps have a constant. A place that adds to a part of a given one's tensor stands for it there.
        """
        ...

    def hold(self, down: Tensor, up: Tensor, shift: Tensor) -> None:
        """Become x ↦ x D U + a in place: `down` D [reads_width, r], `up` U [r, adds_width], `shift` a [adds_width].

        Where r is below the module's rank, the rest stays as it starts, adding nothing.
        """
        ...
