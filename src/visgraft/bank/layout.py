"""How the tensors of an adapter lie in flat ones, so that those of many adapters are gathered in one step."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

Flats = tuple[Tensor, ...]
"""All tensors of an adapter, one flat tensor [P] for each type; of n adapters [n, P]."""
Slot = tuple[str, dict[str, Any], str]
"""A tensor of a module: its name, and where the module keeps it: the dictionary and the key."""


ALIGNED = 16
"""Each tensor begins at a multiple of so many numbers, 64 bytes in fp32, as tensors of their own do: MKL promises equal
bits only where operands are aligned alike."""


class Layout:
    """Names and shapes of tensors, and where they lie in the flat tensors of each type."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.names: dict[torch.dtype, list[str]] = {}
        for name, tensor in tensors.items():
            self.names.setdefault(tensor.dtype, []).append(name)
        self._sizes = {
            kind: [-(-tensors[name].numel() // ALIGNED) * ALIGNED for name in names]
            for kind, names in self.names.items()
        }

    @property
    def bytes(self) -> int:
        """How many bytes the tensors of one adapter take."""
        return sum(kind.itemsize * sum(sizes) for kind, sizes in self._sizes.items())

    @property
    def starts(self) -> dict[str, int]:
        """Where each tensor begins in the flat tensor of its type."""
        return {
            name: start
            for kind, names in self.names.items()
            for name, start in zip(names, accumulate([0, *self._sizes[kind]]), strict=False)
        }

    def flatten(self, tensors: Mapping[str, Tensor], device: torch.device) -> Flats:
        """Return copies of the tensors, in this layout's types, on a device."""
        found = []
        for kind, names in self.names.items():
            flat = torch.zeros(sum(self._sizes[kind]), dtype=kind, device=device)
            for name, part in zip(names, flat.split(self._sizes[kind]), strict=True):
                part[: tensors[name].numel()].copy_(tensors[name].detach().reshape(-1))
            found.append(flat)
        return tuple(found)

    def views(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the tensors by name, as views: of [P] as they were, of [n, P] with a first axis of n."""
        found = {}
        for (kind, names), flat in zip(self.names.items(), flats, strict=True):
            leading = flat.shape[:-1]
            for name, part in zip(names, flat.split(self._sizes[kind], -1), strict=True):
                shape = self.shapes[name]
                found[name] = part.narrow(-1, 0, math.prod(shape)).view(*leading, *shape)
        return found

    def empty(self) -> dict[str, Tensor]:
        """Return tensors of these shapes and types without data."""
        return {
            name: torch.empty(self.shapes[name], dtype=kind, device="meta")
            for kind, names in self.names.items()
            for name in names
        }


def gathered(flats: Sequence[Flats]) -> Flats:
    """Return the flat tensors of n adapters of one layout as [n, P]."""
    return tuple(torch.stack(kind) for kind in zip(*flats, strict=True))


def slots_of(module: nn.Module, prefix: str = "") -> list[Slot]:
    """Return where a module and those inside keep their parameters and buffers; names begin with `prefix`."""
    found: list[Slot] = []
    for path, inner in module.named_modules():
        stores: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers)
        for store in stores:
            dotted = f"{prefix}{path}{'.' if path else ''}"
            found += [(f"{dotted}{leaf}", store, leaf) for leaf, tensor in store.items() if tensor is not None]
    return found


@contextlib.contextmanager
def substituted(slots: Sequence[Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in place of those of the same names, as long as this lasts; of a module nobody else runs."""
    changed = [(store, leaf, store[leaf]) for name, store, leaf in slots if name in tensors]
    try:
        for name, store, leaf in slots:
            if name in tensors:
                store[leaf] = tensors[name]
        yield
    finally:
        for store, leaf, before in changed:
            store[leaf] = before
