"""The files that a table's paths lead to, and their sizes."""

import os
import stat
import unicodedata
from pathlib import Path

from visgraft.data.table_lines import at_line
from visgraft.errors import DataError


def as_stored(path: str, folders: dict[str, dict[str, str]]) -> str:
    """Return a path as the disk writes it, where Unicode can write its accents in another way; else as it is.

    `folders` keeps, for each folder looked into, its names by their composed form.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    parent, name = os.path.split(path)
    parent = as_stored(parent, folders) if parent and parent != path else parent
    if parent not in folders:
        try:
            folders[parent] = {unicodedata.normalize("NFC", other): other for other in os.listdir(parent or ".")}
        except (OSError, ValueError):
            folders[parent] = {}
    return os.path.join(parent, folders[parent].get(unicodedata.normalize("NFC", name), name))


def file_size(path: str, table: Path, line: int) -> int | None:
    """Return the size of a file in bytes, or None where there is none."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(
            f"{at_line(table, line)}: {path!r} cannot be read ({reason}); repair the path or the file"
        ) from error
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{at_line(table, line)}: {path} is no file; give the path of an image")
    return facts.st_size
