"""How far apart two adapters of one backbone are: by their maps, block by block, and by what they do to images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from visgraft.adapters.hub import settled
from visgraft.algebra.agreement import Agreement, find_agreement, load_pictures
from visgraft.algebra.apart import Apart, Sums, sums_of_changes
from visgraft.algebra.changes import block_paths, tensor_changes, why_not_linear
from visgraft.algebra.features import FeaturesCompared, compare_features
from visgraft.bank.bank import Bank
from visgraft.bank.opening import check_same_backbone, load_bank
from visgraft.core.attached import get_attached
from visgraft.errors import AdapterError

FIRST, SECOND = "first", "second"
ELSEWHERE = "elsewhere"
"""What lies outside of the blocks."""


class _Compared(NamedTuple):
    """The changes of one tensor, in a block or outside (None)."""

    block: int | None
    sums: Sums


@dataclass(frozen=True)
class PartDiff:
    """A part of the backbone: `maps` compares what the adapters change of it, `features` what it gives for images.

    Either is None where it was not compared.
    """

    name: str
    maps: Apart | None
    features: Apart | None


@dataclass(frozen=True)
class AdapterDiff:
    """How far apart two adapters are.

    `parts` are the blocks, in order, and what lies outside of them. `total` compares the maps of all of them,
    `tensors` those of each tensor, by name; a position's key stands for a map that no layer takes over. `no_maps` says
    why maps were not compared. `pooled` compares the features that enter the head on `images` images; `agreement` says
    how often their answers are alike, and is None where their classes, or tasks, differ.
    """

    first: str
    second: str
    parts: tuple[PartDiff, ...]
    total: Apart | None
    tensors: dict[str, Apart] = field(default_factory=dict)
    no_maps: str | None = None
    images: int = 0
    pooled: Apart | None = None
    agreement: Agreement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        told: dict[str, Any] = asdict(self)
        for name in ("total", "pooled"):
            told[name] = _plain(getattr(self, name))
        told["parts"] = [
            {"name": part.name, "maps": _plain(part.maps), "features": _plain(part.features)} for part in self.parts
        ]
        return told | {"tensors": {name: _plain(apart) for name, apart in self.tensors.items()}}


def _plain(apart: Apart | None) -> dict[str, Any] | None:
    return None if apart is None else apart._asdict()


@settled()
def diff_adapters(
    first: str | Path, second: str | Path, *, images: Sequence[str | Path] | None = None, weights: str | None = None
) -> AdapterDiff:
    """Compare two adapters of one backbone, of any methods.

    Maps are compared where both adapters are linear, by what they make of each tensor of the backbone. With images,
    features are compared too, or alone where a method is not linear. The heads are left out of both.

    Args:
        first: an adapter's directory, or `hf:USER/NAME`.
        second: the other's.
        images: paths of pictures on which to compare what the adapters do.
        weights: where the backbone's weights come from, in place of what the first adapter says.

    Raises:
        AdapterError: one is damaged, they are of different backbones, or there are no maps to compare and no images.
        DataError: a file is no image.
    """
    paths = (Path(first), Path(second))
    check_same_backbone(paths, prepared_alike=images is not None)
    bank = load_bank({FIRST: paths[0], SECOND: paths[1]}, weights=weights)
    records = bank.record(FIRST), bank.record(SECOND)
    no_maps, maps = _compare_maps(bank, paths)
    if no_maps is not None and images is None:
        raise AdapterError(f"{no_maps}; add --images DIR (images= in Python) to compare what they do to pictures")
    with bank.lent(None) as plain:
        blocks = len(block_paths(plain))
    found = AdapterDiff(str(first), str(second), (), _total(maps.values()) if maps else None, no_maps=no_maps)
    found = replace(found, tensors={name: one.sums.apart for name, one in maps.items()})
    compared = None
    if images is not None:
        loaded = load_pictures(images, records[0])
        compared = compare_features(bank, FIRST, SECOND, loaded)
        agreement = find_agreement(compared.logits, records)
        found = replace(found, images=len(loaded), pooled=compared.pooled.apart, agreement=agreement)
    return replace(found, parts=_parts(maps, compared, blocks))


def _compare_maps(bank: Bank, paths: Sequence[Path]) -> tuple[str | None, dict[str, _Compared]]:
    """Return the sums of each tensor that one of the adapters changes; or why there are none to compare."""
    with bank.lent(None) as plain, bank.lent(FIRST) as one, bank.lent(SECOND) as two:
        for path, model in zip(paths, (one, two), strict=True):
            attached = get_attached(model)
            if reason := why_not_linear(attached):
                return f"{path}: {attached.config.method} {reason}, so it has no maps whose distance could be told", {}
        ours = {change.name: change for change in tensor_changes(plain, one)}
        found, common, theirs = dict[str, _Compared](), 0, 0
        for change in tensor_changes(plain, two):  # of the second adapter, one tensor's at a time
            mine = ours.pop(change.name, None)
            common, theirs = common + (mine is not None), theirs + 1
            found[change.name] = _Compared(change.block, sums_of_changes(mine, change))
    if not common and ours and theirs:
        return (
            f"{paths[0]} and {paths[1]} change no tensor of the backbone in common, so their maps have no distance",
            {},
        )
    found |= {name: _Compared(change.block, sums_of_changes(change, None)) for name, change in ours.items()}
    return None, found


def _total(compared: Iterable[_Compared]) -> Apart:
    return reduce(Sums.plus, (one.sums for one in compared), Sums()).apart


def _parts(maps: Mapping[str, _Compared], images: FeaturesCompared | None, blocks: int) -> tuple[PartDiff, ...]:
    """Return every block, and what lies outside of them where a map does."""
    by_block: dict[int | None, list[_Compared]] = {}
    for one in maps.values():
        by_block.setdefault(one.block, []).append(one)
    features = [None] * blocks if images is None else [sums.apart for sums in images.blocks]
    parts = [
        PartDiff(f"block {number}", _total(by_block.get(number, ())) if maps else None, features[number])
        for number in range(blocks)
    ]
    return (*parts, *([PartDiff(ELSEWHERE, _total(by_block[None]), None)] if None in by_block else []))
