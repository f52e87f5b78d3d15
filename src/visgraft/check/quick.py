"""What can be said about a data set in a second, without decoding an image."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from visgraft.check.counts import class_findings, group_findings, part_findings
from visgraft.check.findings import counted, pictures, readable
from visgraft.data.dataset import Dataset

MOST_READ = 10_000  # files
TAIL = 4096  # bytes


def quick_check(dataset: Dataset) -> list[str]:
    """Return one line for each thing to be warned of before training, with a remedy.

    Counts and groups are looked at in full. Of identical files in several parts only files of one size are compared,
    those of the rarest sizes first and at most 10,000 of them: `check_data` finds all.
    """
    findings = [*class_findings(dataset), *part_findings(dataset)]
    if any(example.group is not None for example in dataset.all):
        findings += group_findings(pictures(dataset), dataset.classes)
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
    sizes: dict[int, list[tuple[Path, str]]] = defaultdict(list)
    for part in ("train", "val", "test"):
        for example in getattr(dataset, part):
            if example.content is None:
                try:
                    sizes[os.stat(example.path).st_size].append((example.path, part))
                except OSError:  # training names what cannot be read
                    continue
    read = 0
    pairs: list[tuple[Path, Path]] = []
    for _, files in sorted(_across(sizes.values()), key=lambda item: item[0]):
        if read + len(files) > MOST_READ:
            return pairs, False
        read += len(files)
        for _, alike in _across(_same(files, TAIL)):
            for _, copies in _across(_same(alike, None)):
                pairs.append((copies[0][0], next(path for path, part in copies if part != copies[0][1])))
    return pairs, True


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
