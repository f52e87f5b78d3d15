"""How published splits are stored: text and JSON files that name images, and folders of classes. Nothing is decoded."""

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from visgraft.data.decode import image_extensions
from visgraft.errors import DataError, nearest

_FEW = 1000  # names that are looked at for one alike


def missing(path: Path, layout: str) -> DataError:
    """Return the error for a file or folder that is not there: its topmost missing folder, or else itself."""
    while not path.parent.is_dir() and path.parent != path:
        path = path.parent
    beside = [other.name for other in islice(path.parent.iterdir(), _FEW)]
    return DataError(f"{path} does not exist; the layout expected is {layout}{nearest(path.name, beside)}")


def read_text(file: Path, layout: str) -> str:
    """Read a UTF-8 file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(file, layout) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; fetch it again") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); repair it or fetch it again") from error


def read_json(file: Path, layout: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing, cannot be read, or holds anything else.
    """
    try:
        found = json.loads(read_text(file, layout))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}, is not JSON ({error.msg}); fetch it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds a JSON {type(found).__name__} instead of an object; fetch it again")
    return found


def place(folder: Path, name: str, where: str) -> Path:
    """Return where an image that a list names lies below `folder`, written in one way only, so that paths compare.

    Raises:
        DataError: it lies outside of it; `where` names the list in the message.
    """
    below = os.path.normpath(name)
    if os.path.isabs(below) or below.split(os.sep, 1)[0] == os.pardir:
        raise DataError(f"{where} names {name}, which is not below {folder}; give paths relative to it")
    return folder / below


def class_folders(folder: Path, labels: Mapping[str, int], what: str, layout: str) -> dict[int, list[str]]:
    """Return the names of the images in each class folder, sorted, by the label of the folder's name.

    Only names are looked at, so that the 1.3 million of ImageNet take seconds. Hidden files, and those with an
    extension that no image has, are passed over.

    Args:
        folder: what holds the class folders.
        labels: the label of each folder's name.
        what: the classes in words, for messages.
        layout: the layout expected, for messages.

    Raises:
        DataError: the folder is missing or cannot be read, holds images outside of class folders, or a folder of
            another name.
    """
    extensions, found = image_extensions(), dict[int, list[str]]()
    if not folder.is_dir():
        raise missing(folder, layout)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir() and not entry.name.startswith("."):
                    if entry.name not in labels:
                        raise DataError(f"{entry.path} is not one of {what}{nearest(entry.name, labels)}; remove it")
                    found[labels[entry.name]] = sorted(_images(os.listdir(entry.path), extensions))
                elif any(_images([entry.name], extensions)):
                    raise DataError(f"{entry.path} is not in a class folder; sort the images into them: {layout}")
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
    return dict(sorted(found.items()))


def _images(names: Iterable[str], extensions: set[str] | frozenset[str]) -> Iterable[str]:
    return (name for name in names if os.path.splitext(name)[1].lower() in extensions and not name.startswith("."))
