"""How far apart two changes of the same thing are: of tensors, by their factors, or of features."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from visgraft.algebra.changes import TensorChange


class Apart(NamedTuple):
    """Two changes a and b of the same thing, by their Frobenius norms ‖·‖.

    `first` and `second` are ‖a‖ and ‖b‖, as parts of the norm of what is changed.
    `distance` is ‖a - b‖ / √(‖a‖² + ‖b‖²): 0 where they are equal, 1 where they have nothing to do with each other or
    one of them is zero, √2 where they are opposite. `cosine` is ⟨a, b⟩ / (‖a‖ ‖b‖). Both are None where nothing
    changes, and the cosine where one of them does not.

    `reads` and `writes` say how much of the smaller subspace lies in the larger one, between 0 and 1: of the directions
    that the changes of matrices read, and those that they add (LoRA's φ, arXiv:2106.09685, section 7.2). `chance`
    has what random subspaces of these sizes share. None where no matrix changes in both.
    """

    first: float
    second: float
    distance: float | None
    cosine: float | None
    reads: float | None = None
    writes: float | None = None
    chance: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sums:
    """What `Apart` is made of, and adds up over tensors and batches: squares of norms, a product, and overlaps."""

    first: float = 0.0
    second: float = 0.0
    difference: float = 0.0
    product: float = 0.0
    before: float = 0.0
    smaller: int = 0
    reads: float = 0.0
    writes: float = 0.0
    reads_chance: float = 0.0
    writes_chance: float = 0.0

    def plus(self, other: "Sums") -> "Sums":
        """Return the sum of both."""
        return Sums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def apart(self) -> Apart:
        """How far apart the two are."""
        whole = self.before**0.5 or 1.0
        both, each = self.first + self.second, self.first * self.second
        found = Apart(
            self.first**0.5 / whole,
            self.second**0.5 / whole,
            (self.difference / both) ** 0.5 if both else None,
            min(max(self.product / each**0.5, -1.0), 1.0) if each else None,
        )
        if not self.smaller:
            return found
        chance = self.reads_chance / self.smaller, self.writes_chance / self.smaller
        return found._replace(reads=self.reads / self.smaller, writes=self.writes / self.smaller, chance=chance)


def sums_of_features(before: Tensor, first: Tensor, second: Tensor) -> Sums:
    """Return the sums of two changes of features, of tensors alike in shape."""
    plain = before.cpu().double()
    a, b = first.cpu().double() - plain, second.cpu().double() - plain
    pairs = (a, a), (b, b), (a - b, a - b), (a, b), (plain, plain)
    first_, second_, difference, product, whole = (float((x * y).sum()) for x, y in pairs)
    return Sums(first_, second_, difference, product, whole)


def sums_of_changes(first: TensorChange | None, second: TensorChange | None) -> Sums:
    """Return the sums of two changes of one tensor; None stands for no change. No product of factors is formed."""
    one = first or second
    assert one is not None
    squares = tuple(0.0 if change is None else change.norm**2 for change in (first, second))
    if first is None or second is None:
        return Sums(squares[0], squares[1], sum(squares), 0.0, one.before**2)
    # The difference is the product of both pairs of factors side by side; as triangles it is small, and what cancels
    # does so before it is squared.
    left = torch.linalg.qr(torch.cat([first.left * first.values, -second.left * second.values], 1)).R
    right = torch.linalg.qr(torch.cat([first.right, second.right]).T).R
    written, read = first.left.T @ second.left, first.right @ second.right.T
    product = (first.values[:, None] * written * second.values * read).sum().item()
    found = Sums(squares[0], squares[1], (left @ right.T).norm().item() ** 2, product, one.before**2)
    if first.right.shape[1] == 1:
        return found
    ranks = len(first.values), len(second.values)
    reads_chance, writes_chance = (ranks[0] * ranks[1] / width for width in (first.right.shape[1], len(first.left)))
    return replace(
        found,
        smaller=min(ranks),
        reads=read.square().sum().item(),
        writes=written.square().sum().item(),
        reads_chance=reads_chance,
        writes_chance=writes_chance,
    )
