"""What pictures like those of the training look like to the frozen backbone, as a file of an adapter's folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from visgraft.adapters.hub import UNLIKE, remedy, resolve
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.weights import parse_safetensors
from visgraft.errors import AdapterError

SHAPES = {"mean": 1, "directions": 2, "scales": 1, "noise": 0, "distances": 1}


@dataclass(frozen=True, eq=False)
class Reference:
    """The features of training images, and how far from them others like them lie (see `measure.unlike`).

    Attributes:
        mean: [F].
        directions: along which they differ most, orthonormal [K, F].
        scales: their standard deviation along each [K].
        noise: their standard deviation along every other direction.
        distances: of validation images, ascending [M].
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]
    scales: NDArray[np.float64]
    noise: float
    distances: NDArray[np.float64]

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file, the directions in half precision and the rest in single."""
        values = {name: torch.as_tensor(getattr(self, name), dtype=torch.float32).contiguous() for name in SHAPES}
        values["directions"] = values["directions"].half()
        return safetensors.torch.save(values)


def digest_of_reference(content: bytes) -> str:
    """Return what the adapter's record says of the file."""
    return hashlib.sha256(content).hexdigest()


def parse_reference(stored: bytes) -> Reference:
    """Return what `to_bytes` wrote, as it is used: rounded.

    Raises:
        ValueError: tensors are missing, do not fit each other or are not finite.
        SafetensorError: it is no safetensors file that torch can read.
    """
    content = parse_safetensors(stored)
    if content.keys() != SHAPES.keys():
        raise ValueError(f"it holds {', '.join(sorted(content)) or 'nothing'}")
    if not all(tensor.is_floating_point() for tensor in content.values()):
        raise ValueError("its numbers are of another type")
    found = {name: tensor.double() for name, tensor in content.items()}
    fit = [found[name].ndim == number for name, number in SHAPES.items()]
    if not all(fit) or found["directions"].shape != (len(found["scales"]), len(found["mean"])):
        raise ValueError("its tensors do not fit each other")
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()) or not len(found["distances"]):
        raise ValueError("it is not finite")
    if not bool((found["scales"] > 0).all()) or not found["noise"] > 0:
        raise ValueError("a standard deviation is not above 0")
    mean, directions, scales = (found[name].numpy() for name in ("mean", "directions", "scales"))
    return Reference(mean, directions, scales, float(found["noise"]), found["distances"].sort().values.numpy())


def read_reference(path: str | Path, record: AdapterRecord) -> Reference:
    """Return the reference of an adapter.

    Raises:
        AdapterError: it has none, or the file is missing, damaged or another adapter's.
    """
    return read_content(path, record)[1]


def check_kept(name: str, kept: bool) -> None:
    """Raise an AdapterError unless an adapter of this name keeps a reference."""
    if not kept:
        raise AdapterError(
            f"{name} cannot tell unlike pictures: it was made without validation images, by train --no-unlike, by an "
            "earlier version, or changed since; train it anew with a validation part"
        )


def read_content(path: str | Path, record: AdapterRecord) -> tuple[bytes, Reference]:
    """Return the file of an adapter's reference, and what is in it; the errors are those of `read_reference`."""
    check_kept(str(path), record.unlike is not None)
    file, opened = Path(path) / UNLIKE, resolve(path) / UNLIKE
    try:
        content = opened.read_bytes()
        if digest_of_reference(content) != record.unlike:
            raise ValueError("it is not the file that was saved with this adapter")
        return content, parse_reference(content)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{file} is missing or damaged ({error}); {remedy(path)}") from error
