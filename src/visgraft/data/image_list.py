"""Images by name, as many as there are: numbered in the order given, and held outside of memory."""

import contextlib
import hashlib
import json
import os
import sqlite3
import tempfile
from array import array
from collections.abc import Iterable, Iterator

from visgraft.data.urls import from_folder
from visgraft.errors import DataError

HELD_IN_MEMORY = 4 * 2**20  # bytes of names; more go to a temporary file

Named = tuple[str, str]
"""An image's path or address, and the adapter that is to answer it, "" for all."""


class ImageList:
    """Images in parts of one size, the last one of what is left; their names are read once, and lie in a file then.

    Args:
        named: the images, read to their end at once.
        part_size: images of each part.

    Attributes:
        digest: of all names in their order; relative ones are taken from the current folder.

    Raises:
        DataError: the temporary folder has no room for the names.
    """

    def __init__(self, named: Iterable[Named], part_size: int = 10_000) -> None:
        self.part_size, self._count, self._starts = part_size, 0, array("Q")
        self._file = tempfile.SpooledTemporaryFile(HELD_IN_MEMORY)  # noqa: SIM115  (as long as this list)
        here, names = os.getcwd(), hashlib.sha256()
        try:
            for image, adapter in named:
                if self._count % part_size == 0:
                    self._starts.append(self._file.tell())
                line = json.dumps((image, adapter)).encode()  # of any name one line of plain ASCII
                self._file.write(line + b"\n")
                names.update(line if os.path.isabs(image) else json.dumps((from_folder(here, image), adapter)).encode())
                self._count += 1
        except OSError as error:
            folder = tempfile.gettempdir()
            raise DataError(f"{folder} cannot hold the names of the images ({error.strerror}); set TMPDIR") from error
        self.digest = names.hexdigest()

    def __len__(self) -> int:
        return self._count

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self._starts)

    def size(self, number: int) -> int:
        """Return how many images a part has."""
        return min(self.part_size, self._count - number * self.part_size)

    def part(self, number: int) -> list[Named]:
        """Return the images of a part, from 0."""
        self._file.seek(self._starts[number])
        rows = (json.loads(self._file.readline()) for _ in range(self.size(number)))
        return [(image, adapter) for image, adapter in rows]

    def __iter__(self) -> Iterator[Named]:
        for number in range(self.parts):
            yield from self.part(number)


def in_order(entries: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield the entries of a folder, or of none, sorted by name; millions of them lie in a temporary file."""
    with contextlib.closing(sqlite3.connect("")) as names:
        names.execute("CREATE TABLE entry (name BLOB, folder INTEGER)")
        names.executemany("INSERT INTO entry VALUES (?, ?)", ((os.fsencode(name), folder) for name, folder in entries))
        for name, folder in names.execute("SELECT name, folder FROM entry ORDER BY name"):
            yield os.fsdecode(name), bool(folder)
