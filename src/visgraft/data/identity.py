"""What an image file is: its content, whatever its size, its name or its time of change say."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from visgraft.data.dataset import Example
from visgraft.errors import DataError


def content_digests(examples: Sequence[Example]) -> list[str]:
    """Return a digest of each image's bytes, in order; an empty text where they cannot be read.

    Every file is read once, in threads: sizes and times miss a file that was replaced by one of equal size and time,
    as unpacking an archive does. `benchmarks/identity.py` measures what it costs.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_digest, examples))


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
