"""Banks of adapters that lie in folders, on the hub or anywhere below one folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visgraft.adapters.directory import read_record
from visgraft.adapters.hub import CONFIG, settled
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import create_backbone
from visgraft.bank.bank import Bank
from visgraft.bank.trees import Compile
from visgraft.data.decode import is_hidden
from visgraft.errors import AdapterError, VisgraftError
from visgraft.measure.precision import make_compute


@settled()
def load_bank(
    adapters: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    weights: str | None = None,
    capacity: int | None = None,
    compile: Compile | None = None,
) -> Bank:
    """Return a bank with adapters of one backbone, on the accelerator where there is one.

    Args:
        adapters: a folder, of which every adapter at any depth is loaded under its path below the folder; or adapters'
            directories or `hf:USER/NAME`, which are called as they are given; or these by the names they shall have.
        weights: where the backbone's weights come from, in place of what the first adapter says.
        capacity: see `Bank`.
        compile: see `Bank`.

    Raises:
        AdapterError: none is found, one is damaged, or two are of different backbones (both are named).
        WeightsError: the backbone's weights cannot be had.
    """
    if isinstance(adapters, str | Path):
        named: Mapping[str, str | Path] = find_adapters(adapters)
    elif isinstance(adapters, Mapping):
        named = adapters
    else:
        named = {str(path): path for path in adapters}
    paths = [Path(path) for path in named.values()]
    if not paths:
        raise VisgraftError("adapters must be at least one")
    check_same_backbone(paths, prepared_alike=False)
    bank = empty_bank(paths[0], weights=weights, capacity=capacity, compile=compile)
    for name, path in named.items():
        bank.add(name, path)
    return bank


@settled()
def empty_bank(
    path: str | Path, *, weights: str | None = None, capacity: int | None = None, compile: Compile | None = None
) -> Bank:
    """Return a bank without adapters on the backbone of an adapter; arguments and errors are those of `load_bank`."""
    record = read_record(path)
    backbone = create_backbone(record.located(Path(path), weights), record.outputs)
    return Bank(backbone.to(make_compute("fp32").device), capacity=capacity, compile=compile)


def find_adapters(folder: str | Path) -> dict[str, Path]:
    """Return the adapters below a folder, at any depth, by their path below it; hidden folders are passed over.

    Links are followed, and a folder that several lead to is looked through once.

    Raises:
        AdapterError: there is no such folder, or no adapter in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise AdapterError(f"{folder} is no folder; give one that holds adapters")
    found, seen = {}, set[str]()
    for here, folders, files in os.walk(root, followlinks=True):
        if CONFIG in files:
            folders.clear()
            found[Path(here).relative_to(root if Path(here) != root else root.parent).as_posix()] = Path(here)
        elif os.path.realpath(here) in seen:
            folders.clear()
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
    if not found:
        raise AdapterError(f"{folder} holds no adapters ({CONFIG} at any depth); train one there with --out")
    return found


def check_same_backbone(paths: Sequence[str | Path], *, prepared_alike: bool = True) -> None:
    """Raise an AdapterError that names two adapters if they are of different backbones, or one is damaged.

    With `prepared_alike` their images must also be prepared in the same way.
    """
    records = [read_record(path) for path in paths]
    for path, record in zip(paths[1:], records[1:], strict=True):
        ours, theirs = _identity(records[0]), _identity(record)
        for what, value in ours.items():
            if theirs[what] != value and (prepared_alike or what != PREPARED):
                raise AdapterError(
                    f"{paths[0]} and {path} are not of one backbone: {what} {value} and {theirs[what]}; run each apart"
                )


PREPARED = "preprocessing"


def _identity(record: AdapterRecord) -> dict[str, Any]:
    """What must be equal for adapters to share a backbone and the images prepared for it."""
    return {
        "name": record.backbone.name,
        "image size": record.backbone.image_size,
        "arguments": dict(record.backbone.arguments),
        "sha256": f"{str(record.digest)[:12]}…",
        PREPARED: record.data_config,
    }
