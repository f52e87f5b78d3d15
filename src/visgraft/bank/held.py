"""The tensors of the adapters in a bank: beside the backbone, or parked until they are asked for."""

import logging
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import image_transform
from visgraft.bank.configuration import Configuration
from visgraft.bank.ground import HeadKind
from visgraft.bank.layout import Flats

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class BankAdapter:
    """An adapter in a bank; nothing of it changes, but that its tensors may be parked.

    `path` is its folder, where it comes from one.
    """

    name: str
    record: AdapterRecord
    configuration: Configuration
    head: HeadKind
    precision: str
    held: "Held"
    path: Path | None = None

    @cached_property
    def transform(self) -> Any:
        """The image transform of its training: PIL image -> float [3, H, W]."""
        return image_transform(self.record.data_config)


class Held:
    """The flat tensors of one adapter, its method's first, then its head's (`split` says how many are which)."""

    def __init__(self, rows: Flats, heads: Flats) -> None:
        self.split = len(rows)
        self.here: Flats | None = (*rows, *heads)
        self.parked: Flats | Path | None = None
        self.dropped = self.pinned = False

    @property
    def bytes(self) -> tuple[int, int]:
        """The bytes of the method's tensors and of the head's where they are held beside the backbone, else 0."""
        flats = self.here
        if flats is None:
            return 0, 0
        return sum(t.nbytes for t in flats[: self.split]), sum(t.nbytes for t in flats[self.split :])


class Shelf:
    """Keeps the tensors of at most `capacity` adapters beside the backbone, and parks those used longest ago.

    Pinned ones stay. The others are parked in host memory where the backbone is on an accelerator, else in files of a
    folder that goes with the bank. Whoever has taken an adapter's tensors keeps them, parked or not.
    """

    def __init__(self, capacity: int | None, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self._lock = threading.Lock()
        self._here: dict[Held, None] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def put(self, held: Held) -> None:
        """Take in the tensors of an adapter."""
        with self._lock:
            self._brought(held)  # it may have answered before, and been parked since
            self._touch([held])
            self._make_room()

    def drop(self, held: Held) -> None:
        """Forget an adapter; its file goes with the last one that may still ask for it."""
        with self._lock:
            self._here.pop(held, None)
            held.dropped = True

    def take(self, wanted: Iterable[Held]) -> list[Flats]:
        """Return the tensors of adapters, parked ones brought back."""
        wanted = list(wanted)
        if self.capacity is None:
            return [held.here for held in wanted if held.here is not None]
        with self._lock:
            found = [self._brought(held) for held in wanted]
            self._touch(wanted)
            self._make_room()
        return found

    def _brought(self, held: Held) -> Flats:
        if held.here is None:
            parked = held.parked
            assert parked is not None
            if isinstance(parked, Path):
                stored = safetensors.torch.load_file(parked)
                held.here = tuple(stored[str(number)] for number in range(len(stored)))
            else:
                held.here = tuple(tensor.to(self.device) for tensor in parked)
        return held.here

    def _touch(self, used: Sequence[Held]) -> None:
        for held in used:
            self._here.pop(held, None)
            if not held.dropped:
                self._here[held] = None  # the last one in the order of use

    def _make_room(self) -> None:
        above = len(self._here) - self.capacity if self.capacity is not None else 0
        for held in [held for held in self._here if not held.pinned][: max(above, 0)]:
            try:
                self._park(held)
            except (OSError, safetensors.SafetensorError) as error:  # the latter is how a full disk is reported
                LOG.warning("an adapter could not be parked (%s), so more than %s are held", error, self.capacity)
                return
            del self._here[held]

    def _park(self, held: Held) -> None:
        assert held.here is not None
        if held.parked is None and self.device.type != "cpu":
            held.parked = tuple(tensor.cpu() for tensor in held.here)
        elif held.parked is None:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="visgraft-bank-")
            self._files += 1
            file = Path(self._folder.name) / f"{self._files}.safetensors"
            weakref.finalize(held, file.unlink, missing_ok=True)
            safetensors.torch.save_file({str(number): t for number, t in enumerate(held.here)}, file)
            held.parked = file
        held.here = None
