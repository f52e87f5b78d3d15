"""Folders of images at an address, copied once into a machine's cache folder and verified there.

Every machine of a cluster has its own copy. The command that plans the work makes one first, and its digest, over the
names and contents of its files, goes with the work: a copy that differs is made anew, and refused if it still differs.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visgraft.data.urls import open_url, reason_of
from visgraft.errors import DataError
from visgraft.files import COPIES, cache_folder, one_at_a_time, write_json

LOG = logging.getLogger(__name__)


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

    A copy is made anew where other files, or files of other sizes, are at the address now.

    Raises:
        DataError: they cannot be read, are no folders or hold no files, or the cache folder cannot be written.
    """
    found = {folder: _copied(url, folder, compared=True) for folder in folders}
    digests = {folder: digest for folder, (_, digest) in found.items()}
    return next(root for root, _ in found.values()), Mirror(url, digests)


def _copied(url: str, folder: str, *, anew: bool = False, compared: bool = False) -> tuple[Path, str]:
    """Return the root of the copy, and the digest of a folder in it."""
    place, name = cache_folder() / COPIES / _hash(url.rstrip("/"))[:16], _name(url)
    facts, target = place / f"{_hash(folder)[:16]}.json", place / name / folder
    source = url.rstrip("/") if folder == "." else f"{url.rstrip('/')}/{folder}"
    listing = _listing(source) if compared else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(place):
            known = _known(facts, target)
            if anew or known is None or (compared and known["listing"] != _digest_of(listing or {})):
                facts.unlink(missing_ok=True)
                for left in place.glob(".copy.*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=place, prefix=".copy.") as temporary:
                    listing = _listing(source) if listing is None else listing
                    _fetch(source, listing, Path(temporary, "new"))
                    known = {"url": url, "digest": _digest(Path(temporary, "new")), "listing": _digest_of(listing)}
                    shutil.rmtree(target, ignore_errors=True)
                    os.rename(Path(temporary, "new"), target)
                write_json(facts, known)
            LOG.info("%s: its copy in %s is read", source, target)
            return place / name, str(known["digest"])
    except OSError as error:
        raise DataError(
            f"{url} cannot be copied to {place} ({error.strerror or error}); make room, or point VISGRAFT_CACHE "
            "elsewhere"
        ) from error


def _name(url: str) -> str:
    """Return what a folder at an address is called.

    Raises:
        DataError: it has no name of its own, or lies where folders have none.
    """
    name = url.rstrip("/").rpartition("/")[2]
    if url.partition(":")[0].lower() in ("http", "https"):
        raise DataError(f"{url} cannot be copied, as nobody can list what is below it; give the address of a bucket")
    if name in ("", ".", "..") or name.endswith(":") or "\0" in name:
        raise DataError(f"{url} has no folder's name at its end; give the address of the folder itself")
    return name


def _known(facts: Path, target: Path) -> dict[str, Any] | None:
    """Return what is known of a copy; None where there is none, or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        whole = isinstance(found, dict) and {"digest", "listing"} <= found.keys() and target.is_dir()
    except (OSError, ValueError):
        return None
    return found if whole else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _digest_of(listing: Mapping[str, int]) -> str:
    return _hash("\n".join(f"{name}\0{size}" for name, size in sorted(listing.items())))


def _listing(url: str) -> dict[str, int]:
    """Return the files below a folder at an address, and their sizes."""
    system, path = open_url(url)
    try:
        if not system.isdir(path):
            raise DataError(f"{url} is no folder; check the address")
        found = {name: int(facts.get("size") or 0) for name, facts in system.find(path, detail=True).items()}
    except DataError:
        raise
    except Exception as error:  # every service raises kinds of its own
        raise DataError(
            f"{url} cannot be listed ({reason_of(error)}); check the address, and that it may be read"
        ) from error
    if not found:
        raise DataError(f"{url} holds no files; put images there, or check the address")
    return found


def _fetch(url: str, listing: Mapping[str, int], target: Path) -> None:
    """Copy files from an address."""
    system, path = open_url(url)
    above = path.rstrip("/") + "/"
    try:
        names = sorted(listing)
        inside = [name.removeprefix(above) for name in names]
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in inside):
            raise DataError(f"{url} lists files outside of itself; check the address")
        for folder in {(target / name).parent for name in inside}:
            folder.mkdir(parents=True, exist_ok=True)
        system.get(names, [str(target / name) for name in inside])
    except DataError:
        raise
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
