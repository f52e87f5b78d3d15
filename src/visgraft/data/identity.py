"""What an image file is: its content, whatever its size, its name or its time of change say."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from visgraft.data.examples import AT_A_TIME, Example, Examples, Texts, names_of
from visgraft.errors import DataError

PIECE = 2**20  # bytes
FILES_IN_A_CALL = 64  # what a thread is asked for at once: small files take less time than the asking
T = TypeVar("T")
R = TypeVar("R")


def mapped_in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what `pool.map` would, while no more than some thousand calls wait: each takes a kilobyte or two."""
    source = iter(items)
    while some := list(islice(source, AT_A_TIME)):
        yield from pool.map(function, some)


def content_digests(examples: Iterable[Example]) -> Sequence[str]:
    """Return a digest of each image's bytes, in order; an empty text where they cannot be read.

    Every file is read once, in threads: sizes and times miss a file that was replaced by one of equal size and time,
    as unpacking an archive does. `benchmarks/identity.py` measures what it costs.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = isinstance(examples, Examples) and examples.columns.contents is None
        sources: Iterator[Any] = iter(names_of(examples) if files else examples)
        batches: Iterator[list[str | Example]] = iter(lambda: list(islice(sources, FILES_IN_A_CALL)), [])
        return Texts(chain.from_iterable(mapped_in_order(pool, _digests, batches)))


def file_digest(path: str | Path) -> str:
    """Return a digest of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        digest = hashlib.sha256()
        while piece := os.read(descriptor, PIECE):
            digest.update(piece)
        return digest.hexdigest()[:32]
    finally:
        os.close(descriptor)


def _digests(sources: Sequence[str | Example]) -> list[str]:
    return [_digest(source) for source in sources]


def _digest(source: str | Example) -> str:
    try:
        if isinstance(source, str):
            return file_digest(source)
        if source.content is not None:
            return hashlib.sha256(source.content()).hexdigest()[:32]
        return file_digest(source.path)
    except (OSError, DataError):  # whoever decodes it says so, or leaves it out where that was asked for
        return ""
