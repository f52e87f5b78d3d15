"""Marks pictures unlike any of an adapter's training, beside its answers, by one more pass of the plain backbone."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visgraft.adapters.directory import read_record
from visgraft.adapters.hub import UNLIKE
from visgraft.adapters.reference import Reference, read_reference
from visgraft.bank.bank import Bank
from visgraft.errors import AdapterError, VisgraftError
from visgraft.measure.precision import Compute
from visgraft.measure.unlike import MOST_IMAGES, FrozenFeatures, share_as_far


class Far(NamedTuple):
    """How far a picture lies from an adapter's training: the share of validation images at least as far, and the mark.

    Of pictures like those of the training no more than the level that is asked for are marked.
    """

    as_far: float | None = None
    unlike: bool | None = None


Look = Callable[[Tensor, Sequence[str]], list[list[Far]]]
"""Returns, for each image of a batch [B, 3, H, W], how far it lies from the training of each adapter that is named."""


class Distances:
    """Tells how far pictures lie, adapter by adapter.

    Raises:
        AdapterError: an adapter has nothing to tell it by, or too few validation images for this level.
        VisgraftError: the level is none.
    """

    def __init__(self, bank: Bank | None, names: Sequence[str], level: float) -> None:
        check_share(level)
        self.level, self.bank, self.references = level, bank, {}
        for name in names:
            adapter = bank.adapter(name) if bank is not None and name in bank else None
            if adapter is None or adapter.path is None:
                raise AdapterError(f"{name} is a loaded model, of which unlike (--unlike) is not told; give its folder")
            self.references[name] = read_reference(adapter.path, adapter.record)
            check_level(level, name, len(self.references[name].distances))

    @contextlib.contextmanager
    def looking(self) -> Iterator[Look]:
        """Lend the plain backbone, which looks at each batch once for all adapters of a precision."""
        assert self.bank is not None
        bank: Bank = self.bank
        with bank.lent(None) as model:
            look, device = FrozenFeatures(model), next(model.parameters()).device

            def tell(x: Tensor, names: Sequence[str]) -> list[list[Far]]:
                seen, found = dict[str, NDArray[np.float64]](), []
                for name in names:
                    precision = bank.adapter(name).precision
                    if precision not in seen:
                        seen[precision] = look(x, Compute(device, precision)).double().numpy()
                    shares = shares_as_far(name, self.references[name], seen[precision])
                    found.append([Far(share, share <= self.level) for share in shares])
                return [list(row) for row in zip(*found, strict=True)]

            yield tell


def apart(look: Look, images: Sequence[Tensor], names: Sequence[str]) -> list[Far]:
    """Return how far each image [3, H, W] lies from the training of its own adapter; those of one are one batch."""
    found = [Far()] * len(images)
    if look is _nothing:
        return found
    for name in dict.fromkeys(names):
        rows = [row for row, own in enumerate(names) if own == name]
        for row, far in zip(rows, look(torch.stack([images[row] for row in rows]), [name]), strict=True):
            (found[row],) = far
    return found


def no_distances() -> contextlib.AbstractContextManager[Look]:
    """Return what tells nothing, where nobody asked."""
    return contextlib.nullcontext(_nothing)


def _nothing(x: Tensor | Sequence[Tensor], names: Sequence[str]) -> list[list[Far]]:
    return [[Far()] * len(names)] * len(x)


def check_references(adapters: Mapping[str, str], level: float | None, ensemble: bool = False) -> None:
    """Raise what `Distances` would for adapters that are given by name and path, before anything is loaded."""
    if level is None:
        return
    check_share(level)
    check_alone(ensemble)
    for name, path in adapters.items():
        check_level(level, name, len(read_reference(path, read_record(path)).distances))


def shares_as_far(name: str, reference: Reference, features: NDArray[np.float64]) -> list[float]:
    """Return `share_as_far` of features [N, F] by the reference of the adapter of this name.

    Raises:
        AdapterError: the reference is of other features than the backbone's.
    """
    known, found = len(reference.mean), features.shape[1]
    if known != found:
        raise AdapterError(
            f"{name} cannot tell unlike pictures: its {UNLIKE} is of {known:,} features, but the backbone gives "
            f"{found:,}; restore it, or train again"
        )
    return [float(share) for share in share_as_far(reference, features)]


def check_alone(ensemble: bool) -> None:
    """Raise a VisgraftError where one answer of several adapters would have to be marked."""
    if ensemble:
        raise VisgraftError("unlike (--unlike) is told by each adapter alone; leave out ensemble (--ensemble)")


def check_share(level: float) -> None:
    """Raise a VisgraftError unless a level lies between 0 and 1."""
    if not 0 < level < 1:
        raise VisgraftError(f"unlike is {level}, but must be above 0 and below 1, such as 0.05")


def lowest_level(images: int) -> float:
    """Return the lowest level that so many validation images allow, rounded up to a millionth."""
    return math.ceil(1e6 / (images + 1)) / 1e6


def check_level(level: float, name: str, images: int) -> None:
    """Raise an AdapterError where an adapter had too few validation images to mark pictures at a level."""
    needed = math.ceil(1 / Fraction(str(level)) - 1)  # the level as it is written, not its binary form
    if needed > MOST_IMAGES:
        raise AdapterError(
            f"{name} cannot mark pictures at {level}: no more than {MOST_IMAGES:,} validation images are looked at, "
            f"which takes a level of {lowest_level(MOST_IMAGES):g} or more"
        )
    if images < needed:
        raise AdapterError(
            f"{name} had {images} validation images, but to mark pictures at {level} takes {needed}; ask for a higher "
            "level, or train with a larger validation part"
        )
