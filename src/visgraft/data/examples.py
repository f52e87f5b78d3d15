"""Labelled images as columns: names in one block of bytes, labels as numbers, an `Example` made when one is asked for.

An `Example` with its path takes some 500 bytes; in columns an image takes those of its name and some 30 more.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from visgraft.data.tasks import LabelTask, TaskLabels

Label = int | tuple[int, ...] | TaskLabels
AT_A_TIME = 8192  # rows that are turned into Python objects before the next are


class Example(NamedTuple):
    """One image and what is known of it.

    `path` is its file, or, where `content` reads its bytes from inside a data set, a name that tells which it is.
    `label` is the index of its class; in a multi-label data set, the indices of all classes it has, in order; with
    several tasks, what is known for each.
    `group` names what it shares with others that must stay in one part.
    """

    path: Path
    label: Label
    group: str | None = None
    content: Callable[[], bytes] | None = None


class Texts(Sequence[str]):
    """Texts in one block of UTF-8, 8 bytes each beside their own; of file names, bytes that are no UTF-8 stay."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        block, lengths, source = bytearray(), [np.zeros(1, np.int64)], iter(texts)
        while some := list(islice(source, AT_A_TIME)):
            joined = "".join(some)
            if joined.isascii():
                lengths.append(np.fromiter(map(len, some), np.int64, len(some)))
                block += joined.encode()
            else:
                encoded = [text.encode("utf-8", "surrogateescape") for text in some]
                lengths.append(np.fromiter(map(len, encoded), np.int64, len(some)))
                block += b"".join(encoded)
        self.block, self.ends = bytes(block), np.cumsum(np.concatenate(lengths))

    @classmethod
    def kept(cls, block: np.ndarray, ends: np.ndarray) -> "Texts":
        """Return texts from their bytes, uint8, and where each ends, int64 [N + 1] with a 0 first."""
        texts = cls()
        texts.block, texts.ends = block.tobytes(), ends
        return texts

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """Return the texts of all parts one after the other."""
        texts = cls()
        texts.block = b"".join(part.block for part in parts)
        starts = np.cumsum([0, *(len(part.block) for part in parts)])
        texts.ends = np.concatenate(
            [texts.ends, *(part.ends[1:] + start for part, start in zip(parts, starts[:-1], strict=True))]
        )
        return texts

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), AT_A_TIME):
            ends = self.ends[first : first + AT_A_TIME + 1].tolist()
            for start, end in pairwise(ends):
                yield self.block[start:end].decode("utf-8", "surrogateescape")

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.block[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Coded:
    """One value per image out of a few: image i has `values[codes[i]]`; `codes` int32 [N]."""

    codes: np.ndarray
    values: Sequence[Any]

    @classmethod
    def of(cls, values: Iterable[Any]) -> "Coded":
        """Number the values in the order in which they first come."""
        number: dict[Any, int] = {}
        codes = np.fromiter((number.setdefault(value, len(number)) for value in values), np.int32)
        return cls(codes, tuple(number))

    def __getitem__(self, rows: np.ndarray) -> "Coded":
        return Coded(self.codes[rows], self.values)


@dataclass(frozen=True)
class Columns:
    """What is known of N images: paths as text, labels, and perhaps groups, sizes in bytes and what reads them."""

    names: Sequence[str]
    labels: Coded
    groups: Coded | None = None
    sizes: np.ndarray | None = None
    contents: Sequence[Callable[[], bytes]] | None = None


class Examples(Sequence[Example]):
    """Rows of columns; a slice, a choice or a sum of some shares the columns with them.

    Equal to any sequence of equal examples.
    """

    def __init__(self, columns: Columns, rows: np.ndarray | None = None) -> None:
        self.columns = columns
        self.rows = np.arange(len(columns.names)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self.columns, self.rows[index])
        return self._example(int(self.rows[index]))

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), AT_A_TIME):
            yield from map(self._example, self.rows[start : start + AT_A_TIME].tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    def __add__(self, other: Iterable[Example]) -> tuple[Example, ...]:
        return (*self, *other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} examples>"

    def take(self, chosen: np.ndarray) -> "Examples":
        """Return the examples of these numbers, int [M]."""
        return Examples(self.columns, self.rows[chosen])

    @property
    def labels(self) -> Coded:
        """The labels in order."""
        return self.columns.labels[self.rows]

    @property
    def groups(self) -> Coded | None:
        """The groups in order; None where no image has one."""
        return None if self.columns.groups is None else self.columns.groups[self.rows]

    def names(self) -> Iterator[str]:
        """Yield the paths as text."""
        names = self.columns.names
        for start in range(0, len(self), AT_A_TIME):
            yield from (names[row] for row in self.rows[start : start + AT_A_TIME].tolist())

    def _example(self, row: int) -> Example:
        known = self.columns
        return Example(
            Path(known.names[row]),
            known.labels.values[known.labels.codes[row]],
            None if known.groups is None else known.groups.values[known.groups.codes[row]],
            None if known.contents is None else known.contents[row],
        )


class Paths(Sequence[Path]):
    """Rows of names as paths, each made when it is asked for; equal to any sequence of equal paths."""

    def __init__(self, names: Sequence[str], rows: np.ndarray) -> None:
        self.names, self.rows = names, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "Paths": ...
    def __getitem__(self, index: Any) -> Any:
        rows = self.rows[index]
        return Paths(self.names, rows) if isinstance(index, slice) else Path(self.names[int(rows)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def paths_of(examples: Sequence[Example]) -> Sequence[Path]:
    """Return the path of each example."""
    if isinstance(examples, Examples):
        return Paths(examples.columns.names, examples.rows)
    return tuple(example.path for example in examples)


def joined(*parts: Sequence[Example]) -> Sequence[Example]:
    """Return the examples of all parts one after the other; as columns where all share them."""
    full = [part for part in parts if len(part)]
    first = full[0] if full else ()
    if len(full) == 1:
        return first
    if isinstance(first, Examples) and all(isinstance(p, Examples) and p.columns is first.columns for p in full):
        return Examples(first.columns, np.concatenate([part.rows for part in full]))  # type: ignore[attr-defined]
    return tuple(example for part in full for example in part)


def chosen(examples: Sequence[Example], numbers: Iterable[int] | np.ndarray) -> Sequence[Example]:
    """Return the examples of these numbers."""
    if isinstance(examples, Examples):
        return examples.take(numbers if isinstance(numbers, np.ndarray) else np.fromiter(numbers, np.int64))
    return tuple(examples[number] for number in numbers)


def labels_of(examples: Iterable[Example]) -> Coded:
    """Return the label of each example."""
    return examples.labels if isinstance(examples, Examples) else Coded.of(example.label for example in examples)


def groups_of(examples: Iterable[Example]) -> Coded | None:
    """Return the group of each example, or None where none has one."""
    found = examples.groups if isinstance(examples, Examples) else Coded.of(example.group for example in examples)
    if found is None or all(found.values[code] is None for code in np.unique(found.codes)):
        return None
    return found


def names_of(examples: Iterable[Example]) -> Iterator[str]:
    """Yield the path of each example as text."""
    return examples.names() if isinstance(examples, Examples) else (str(example.path) for example in examples)


def tasks_of(examples: Sequence[Example]) -> tuple[LabelTask, ...]:
    """Return what several labels of each image answer; nothing where an image has one label."""
    label = examples[0].label if len(examples) else None
    return label.tasks if isinstance(label, TaskLabels) else ()


def classes_of(label: Label) -> tuple[int, ...]:
    """Return the numbers of an image's classes, or, with several tasks, of the outputs of its classes."""
    if isinstance(label, TaskLabels):
        return tuple(label.known_outputs())
    return label if isinstance(label, tuple) else (label,)


def counts_by_class(examples: Iterable[Example], classes: int) -> list[int]:
    """Return how many of the images have each class, or, with several tasks, that of each output; of numbers none."""
    labels, found = labels_of(examples), Counter[int]()
    for code, count in enumerate(np.bincount(labels.codes, minlength=len(labels.values)).tolist()):
        label = labels.values[code]
        found.update(dict.fromkeys(classes_of(label), count))
    return [found[number] for number in range(classes)]
