"""What an image file is: its content, whatever its size, its name or its time of change say."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from visgraft.data.examples import AT_A_TIME, Example, Texts
from visgraft.errors import DataError

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
        return Texts(mapped_in_order(pool, _digest, examples))


def file_digest(path: Path) -> str:
    """Return a digest of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _digest(example: Example) -> str:
    try:
        if example.content is not None:
            return hashlib.sha256(example.content()).hexdigest()[:32]
        return file_digest(example.path)
    except (OSError, DataError):  # whoever decodes it says so, or leaves it out where that was asked for
        return ""
