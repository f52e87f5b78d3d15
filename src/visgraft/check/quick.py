"""What can be said about a data set in a second, without decoding an image."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from visgraft.check.counts import class_findings, group_findings, part_findings
from visgraft.check.findings import counted, pictures, readable
from visgraft.check.labels import label_findings, number_findings
from visgraft.data.dataset import PARTS, Dataset
from visgraft.data.examples import Example, Examples, groups_of

MOST_READ = 10_000  # files
TAIL = 4096  # bytes


def quick_check(dataset: Dataset) -> list[str]:
    """Return one line for each thing to be warned of before training, with a remedy.

    Counts and groups are looked at in full. Of identical files in several parts only files of one size are compared,
    those of the rarest sizes first and at most 10,000 of them: `check_data` finds all.
    """
    findings = [*class_findings(dataset), *part_findings(dataset), *label_findings(dataset)]
    numbers = any(task.kind == "number" for task in dataset.tasks)
    everything = pictures(dataset) if numbers or groups_of(dataset.all) is not None else []
    findings += [*group_findings(everything, dataset), *number_findings(everything, dataset.tasks)]
    lines = [f"{finding.title}; {finding.remedy}" for finding in findings if finding.severity != "note"]
    copies, complete = _copies_across_parts(dataset)
    if copies:
        one, other = copies[0]
        lines.insert(
            0,
            f"{'' if complete else 'at least '}{counted(len(copies), 'file')} in more than one part, such as "
            f"{readable(str(one))} and {readable(str(other))}; "
            f"delete the copies, which make the figures too good; `visgraft check` lists all",
        )
    return lines


def _copies_across_parts(dataset: Dataset) -> tuple[list[tuple[Path, Path]], bool]:
    """Return a pair of paths for each file found in two parts or more, and whether all candidates were compared."""
    everything = dataset.all
    sizes = np.concatenate([_sizes(getattr(dataset, part)) for part in PARTS])
    part_of = np.repeat(np.arange(len(PARTS)), [len(getattr(dataset, part)) for part in PARTS])
    order = np.argsort(sizes, kind="stable")
    _, starts, counts = np.unique(sizes[order], return_index=True, return_counts=True)
    read = 0
    pairs: list[tuple[Path, Path]] = []
    sets = zip(counts.tolist(), order[starts].tolist(), starts.tolist(), strict=True)
    for count, _, start in sorted(sets):
        members = order[start : start + count]
        if sizes[members[0]] < 0 or len(set(part_of[members].tolist())) < 2:
            continue
        if read + count > MOST_READ:
            return pairs, False
        read += count
        files = [(everything[number].path, PARTS[part_of[number]]) for number in members.tolist()]
        for _, alike in _across(_same(files, TAIL)):
            for _, copies in _across(_same(alike, None)):
                pairs.append((copies[0][0], next(path for path, part in copies if part != copies[0][1])))
    return pairs, True


def _sizes(examples: Sequence[Example]) -> np.ndarray:
    """Return the size of each file in bytes, -1 where there is none, or where an image lies inside a data set."""
    if isinstance(examples, Examples) and examples.columns.sizes is not None:
        return (
            examples.columns.sizes[examples.rows] if examples.columns.contents is None else np.full(len(examples), -1)
        )
    return np.array([_size(example) for example in examples], np.int64)


def _size(example: Example) -> int:
    if example.content is not None:
        return -1
    try:
        return os.stat(example.path).st_size
    except OSError:  # training names what cannot be read
        return -1


def _across(sets: Iterable[Sequence[tuple[Path, str]]]) -> list[tuple[int, Sequence[tuple[Path, str]]]]:
    """Return the sets of files that lie in several parts, each after its length."""
    return [(len(files), files) for files in sets if len(files) > 1 and len({part for _, part in files}) > 1]


def _same(files: Sequence[tuple[Path, str]], tail: int | None) -> list[list[tuple[Path, str]]]:
    """Sort files by their last bytes, or by all of them."""
    found: dict[bytes, list[tuple[Path, str]]] = defaultdict(list)
    for path, part in files:
        try:
            with path.open("rb") as file:
                if tail is None:
                    found[hashlib.file_digest(file, "sha256").digest()].append((path, part))
                else:
                    file.seek(-min(tail, os.fstat(file.fileno()).st_size), os.SEEK_END)
                    found[file.read()].append((path, part))
        except OSError:
            continue
    return list(found.values())
