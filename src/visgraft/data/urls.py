"""Files at any address that fsspec opens, such as s3://, gs://, hf://, https:// or file://."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from visgraft.errors import DataError, VisgraftError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # a single letter is a drive of Windows
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_NO_FOLDERS = ("http", "https")  # a page's links are no listing


def is_url(place: object) -> TypeGuard[str]:
    """Whether a text is an address rather than a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def path_or_url(place: str | os.PathLike[str]) -> str | Path:
    """Return an address as it is, for `Path` would take its slashes; and anything else as a path."""
    return place if is_url(place) else Path(place)


def from_folder(folder: str | Path, place: str) -> str:
    """Return a path as it is from outside of the folder that it starts from; an address as it is."""
    return place if is_url(place) else os.path.join(folder, place)


def read_url(url: str) -> bytes:
    """Return what is at an address.

    Raises:
        DataError: nothing can be had from there; its message says why.
        VisgraftError: nothing of this kind can be opened here, which no other file of its kind can either.
    """
    system, path = open_url(url)
    try:
        content: bytes = system.cat_file(path)
    except Exception as error:  # every service raises kinds of its own
        raise DataError(
            f"{url} cannot be read ({reason_of(error)}); check the address, and that it may be read"
        ) from error
    return content


def is_folder_url(url: str) -> bool:
    """Whether an address is a folder's.

    Raises:
        DataError: nothing is there, or it cannot be looked at.
        VisgraftError: nothing of this kind can be opened here.
    """
    system, path = open_url(url)
    if url.partition(":")[0].lower() in _NO_FOLDERS:
        return False
    try:
        found: str = system.info(path)["type"]
    except Exception as error:
        raise DataError(
            f"{url} cannot be read ({reason_of(error)}); check the address, and that it may be read"
        ) from error
    return found == "directory"


def list_url(url: str) -> Iterator[tuple[str, bool]]:
    """Yield the name of each entry of a folder, and whether it is a folder, as its file system lists them.

    Raises:
        DataError: it cannot be listed.
    """
    system, path = open_url(url)
    try:
        entries = system.ls(path, detail=True, refresh=True)
    except Exception as error:
        raise DataError(
            f"{url} cannot be listed ({reason_of(error)}); check the address, and that it may be read"
        ) from error
    for entry in entries:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if name and entry["name"].strip("/") != str(path).strip("/"):  # an object store may list the folder itself
            yield name, entry["type"] == "directory"


def in_small(url: str) -> str:
    """Return an address whose kind is in small letters, which fsspec knows only so."""
    kind, colon, rest = url.partition("://")
    return f"{kind.lower()}{colon}{rest}"


def open_url(url: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    kind = url.partition(":")[0].lower()
    try:
        system, path = url_to_fs(in_small(url))
    except ImportError as error:
        package = f"; run pip install {_PACKAGES[kind]}" if kind in _PACKAGES else f" ({reason_of(error)}); install it"
        raise VisgraftError(f"{url} needs one more package to be read{package}") from error
    except Exception as error:
        raise VisgraftError(f"{url} cannot be opened ({reason_of(error)}); check what stands before ://") from error
    return system, path


def reason_of(error: Exception) -> str:
    """Return an error of a file system in a few words."""
    if isinstance(error, FileNotFoundError):
        return "No such file or folder"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__
