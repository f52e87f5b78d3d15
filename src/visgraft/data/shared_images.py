"""Images that several data sets have which are learned together: in the same part of each, so that none leaks."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from visgraft.data.dataset import PARTS, Dataset, check_train
from visgraft.data.examples import chosen, groups_of, names_of
from visgraft.errors import DataError


def in_same_parts(found: Mapping[str, Dataset], measured: bool = False) -> dict[str, Dataset]:
    """Return data sets, by the names of their tasks, that have an image which several share in the same part.

    Files are the same where their paths lead to the same place. What a source says of its parts decides before what
    was drawn, and of several drawn ones the first by name. Those that move are told in `notes`.

    Args:
        found: the data sets.
        measured: a model is measured on them, so that no class needs a training image.

    Raises:
        DataError: two sources put one image into different parts, a group is torn, or a class loses its last image to
            train on.
    """
    order = sorted(found, key=lambda name: (_freedom(found[name]), name))
    decided = dict[int, tuple[int, int]]()  # by the hash of a path: the number of the source, and of the part
    folders = dict[str, str]()
    made = {}
    for source, name in enumerate(order):
        one = found[name]
        codes = np.repeat(np.arange(len(PARTS)), [len(getattr(one, part)) for part in PARTS])
        moved = codes.copy()
        for row, (path, own) in enumerate(zip(names_of(one.all), codes.tolist(), strict=True)):
            there, part = decided.setdefault(hash(_real(path, folders)), (source, own))
            if there != source and part != own:
                if not _may_move(one, own, part):
                    raise DataError(
                        f"{path} is in {PARTS[own]} for --task {name} and in {PARTS[part]} for --task {order[there]}, "
                        "so that one would be measured on what the other learned from; put it into one part of both"
                    )
                moved[row] = part
        made[name] = one if (moved == codes).all() else _divided(name, one, codes, moved, measured)
    return {name: made[name] for name in found}


def with_shared(members: np.ndarray, paths: Iterable[str]) -> np.ndarray:
    """Return clusters of images, int64 [N], of which those with the same file are one; `paths` are the images'."""
    first, folders, alike = dict[int, int](), dict[str, str](), list[tuple[int, int]]()
    for row, path in enumerate(paths):
        other = first.setdefault(hash(_real(path, folders)), row)
        if other != row:
            alike.append((int(members[other]), int(members[row])))
    if not alike:
        return members
    count = int(members.max()) + 1
    graph = coo_matrix((np.ones(len(alike)), np.array(alike).T), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)[members]


def _freedom(one: Dataset) -> int:
    """Return how much of the parts was drawn: nothing, the validation part, or all."""
    return 2 if one.layout == "flat" else int(one.split is not None)


def _may_move(one: Dataset, part: int, other: int) -> bool:
    """Return whether an image was drawn into a part from those among which the other is."""
    return _freedom(one) == 2 or (_freedom(one) == 1 and PARTS.index("test") not in (part, other))


def _real(path: str, folders: dict[str, str]) -> str:
    """Return where a path leads, links followed; each folder is looked at once."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    place = os.path.join(folders[folder], name)
    return os.path.realpath(place) if os.path.islink(place) else place


def _divided(name: str, one: Dataset, codes: np.ndarray, moved: np.ndarray, measured: bool) -> Dataset:
    """Return a data set whose images are in the parts `moved` [N] in place of `codes`, in the order of `one.all`."""
    everything, where, groups = one.all, f"--task {name}={one.root}", groups_of(one.all)
    if groups is not None:
        pairs = np.unique(np.stack([groups.codes, moved]), axis=1)
        codes_of, times = np.unique(pairs[0], return_counts=True)
        torn = [name for code in codes_of[times > 1].tolist() if (name := groups.values[code]) is not None]
        if torn:
            raise DataError(
                f"{where}: group {torn[0]} would be in two parts, as another task has some of its images in a part of "
                "its own; give all tables a column split"
            )
    parts: dict[str, Any] = {
        part: chosen(everything, np.flatnonzero(moved == number)) for number, part in enumerate(PARTS)
    }
    if not measured:
        check_train(parts["train"], one.classes, where)
    count = int((moved != codes).sum())
    note = f"{count:,} images are in the part in which another task has them"
    return replace(one, **parts, notes=(*one.notes, note))
