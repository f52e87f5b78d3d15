"""Folders of images at an address, copied once into a machine's cache folder and verified there.

Every machine of a cluster has its own copy. The command that plans the work makes one first, and its digest, over the
names and contents of its files, goes with the work: a copy that differs is made anew, and refused if it still differs.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visgraft.data.urls import open_url, reason_of
from visgraft.errors import DataError
from visgraft.files import cache_folder, one_at_a_time, write_json


@dataclass(frozen=True)
class Mirror:
    """A folder at an address as it was found; of each copied folder in it ("." for all), the digest of its files."""

    url: str
    digests: Mapping[str, str]

    def local(self, folder: str = ".") -> Path:
        """Return this machine's copy of the whole after copying a folder in it, unless that was done here before.

        Raises:
            DataError: it cannot be copied, or other files are there now.
        """
        root, digest = _copied(self.url, folder)
        if digest != self.digests[folder]:
            root, digest = _copied(self.url, folder, anew=True)
        if digest != self.digests[folder]:
            raise DataError(f"{self.url} holds other files in {folder} than when the command began; start it again")
        return root


def mirrored(url: str, folders: Sequence[str] = (".",)) -> tuple[Path, Mirror]:
    """Copy folders in a folder at an address into the cache folder, unless they are there; return where, and what.

    A copy is not compared with the address again: remove it to have it made anew.

    Raises:
        DataError: they cannot be read, are no folders, or the cache folder cannot be written.
    """
    found = {folder: _copied(url, folder) for folder in folders}
    return next(root for root, _ in found.values()), Mirror(
        url, {folder: digest for folder, (_, digest) in found.items()}
    )


def _copied(url: str, folder: str, anew: bool = False) -> tuple[Path, str]:
    """Return the root of the copy, and the digest of a folder in it."""
    url = url.rstrip("/")
    place, name = cache_folder() / "copies" / _hash(url)[:16], url.rpartition("/")[2]
    facts, target = place / f"{_hash(folder)[:16]}.json", place / name / folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(place):
            if anew or not facts.is_file():
                facts.unlink(missing_ok=True)
                with tempfile.TemporaryDirectory(dir=place, prefix=".copy.") as temporary:
                    _fetch(url if folder == "." else f"{url}/{folder}", Path(temporary, "new"))
                    digest = _digest(Path(temporary, "new"))
                    shutil.rmtree(target, ignore_errors=True)
                    os.rename(Path(temporary, "new"), target)
                write_json(facts, {"url": url, "folder": folder, "digest": digest})
            return place / name, str(json.loads(facts.read_text(encoding="utf-8"))["digest"])
    except OSError as error:
        raise DataError(
            f"{url} cannot be copied to {place} ({error.strerror or error}); make room, or point VISGRAFT_CACHE "
            "elsewhere"
        ) from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _fetch(url: str, target: Path) -> None:
    system, path = open_url(url)
    try:
        if not system.isdir(path):
            raise FileNotFoundError(path)
        system.get(f"{path.rstrip('/')}/", f"{target}/", recursive=True)
    except FileNotFoundError as error:
        raise DataError(f"{url} is no folder; check the address") from error
    except Exception as error:  # every service raises kinds of its own
        raise DataError(
            f"{url} cannot be copied ({reason_of(error)}); check the address, and that it may be read"
        ) from error


def _digest(folder: Path) -> str:
    """Return a SHA-256 over the names and contents of all files below a folder."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder).as_posix()}\0{found}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()
