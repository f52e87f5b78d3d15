"""Which adapters a server has, kept where all its processes see it."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from visgraft.adapters.hub import CONFIG, TENSORS, UNLIKE, remedy, resolve
from visgraft.errors import AdapterError, VisgraftError
from visgraft.files import one_at_a_time, write_json

STATE, UPLOADS = "adapters.json", "uploads"


class StoreError(VisgraftError):
    """The store cannot be read or written; the message names files, and so is for the log alone."""


class StoreLostError(StoreError):
    """Who keeps the adapters gave no answer, so nobody knows whether a change was made; later it may answer again."""


class LastAdapterError(VisgraftError):
    """A server keeps its last adapter."""

    def __init__(self) -> None:
        super().__init__("the last adapter cannot be removed; add another first")


class Store(Protocol):
    """Path and digest of adapters by name, the same for all processes; a mark stands for one state of them."""

    def mark(self) -> Any:
        """Return what changes whenever an adapter does."""

    async def unchanged(self, mark: Any) -> bool:
        """Whether all is as it was at a mark, or nobody can say."""

    def read(self) -> dict[str, dict[str, str]]:
        """Return path and digest by name.

        Raises:
            StoreError: it cannot be read.
        """

    def alone(self) -> AbstractContextManager[None]:
        """Let no other process change the store meanwhile, where that is not so anyway.

        Raises:
            StoreError: it cannot be used.
        """

    def put(self, name: str, path: Path, digest: str, *, keep: bool) -> Any:
        """Note an adapter under a name, with `keep` a copy of it; return the mark up to which the caller knows all.

        Raises:
            StoreError: it cannot be written; nothing has changed then.
            StoreLostError: nobody knows whether it was.
        """

    def remove(self, name: str) -> Any:
        """Forget a name; return the mark up to which the caller knows all.

        Raises:
            LastAdapterError: it is the last one.
            StoreError: it cannot be written; nothing has changed then.
            StoreLostError: nobody knows whether it was.
        """


@dataclass(frozen=True)
class FolderStore:
    """A folder that all processes of one machine see, with a file of the names and the adapters that were uploaded."""

    folder: Path

    def mark(self) -> Any:
        """See `Store`."""
        return _mark(self.folder / STATE)

    async def unchanged(self, mark: Any) -> bool:
        """See `Store`."""
        return bool(mark == self.mark())

    def read(self) -> dict[str, dict[str, str]]:
        """See `Store`."""
        return read_state(self.folder)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """See `Store`."""
        try:
            with one_at_a_time(self.folder):
                self.read()
                yield
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be written ({error}); repair it, or start the server anew"
            ) from error

    def put(self, name: str, path: Path, digest: str, *, keep: bool) -> Any:
        """See `Store`."""
        place = path
        if keep:
            place = self.folder / UPLOADS / digest
            write_files(place, files_of(path))
        write_json(self.folder / STATE, self.read() | {name: {"path": str(place), "digest": digest}})
        return self.mark()

    def remove(self, name: str) -> Any:
        """See `Store`."""
        left = {other: facts for other, facts in self.read().items() if other != name}
        if not left:
            raise LastAdapterError
        write_json(self.folder / STATE, left)
        return self.mark()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter that a server answers with, by name."""
    kept = (UNLIKE,) if (folder / UNLIKE).is_file() else ()
    return {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS, *kept)}


def digest_of(path: str | Path) -> str:
    """Return the sha256 over an adapter's two files, and the one that tells unlike pictures, where it is there.

    Raises:
        AdapterError: there is none.
    """
    from visgraft.adapters.directory import read_record  # brings torch, which whoever only keeps files does without

    read_record(path)
    return files_digest(path)


def files_digest(path: str | Path) -> str:
    """Return the sha256 over an adapter's two files, whatever they hold.

    Raises:
        AdapterError: one is not there.
    """
    found = hashlib.sha256()
    for name in (CONFIG, TENSORS, *((UNLIKE,) if (resolve(path) / UNLIKE).is_file() else ())):
        try:
            with open(resolve(path) / name, "rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            told = f"{Path(path) / name} is missing or damaged ({error.strerror})"
            raise AdapterError(f"{told}; {remedy(path)}") from error
    return found.hexdigest()


def write_state(store: Path, adapters: Mapping[str, str | Path]) -> None:
    """Write which adapters there are, by name, into a store; what was uploaded to it earlier stays under its name.

    Uploads that have no name any more go, as no process reads them now.

    Raises:
        AdapterError: one is damaged.
        StoreError: the store cannot be read or written.
    """
    begin_state(store, {name: {"path": _absolute(path), "digest": digest_of(path)} for name, path in adapters.items()})


def begin_state(store: Path, facts: Mapping[str, Mapping[str, str]]) -> None:
    """Do what `write_state` does, where paths and digests are known.

    Raises:
        StoreError: the store cannot be read or written.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        before = read_state(store) if (store / STATE).exists() else {}
        kept = {name: one for name, one in before.items() if Path(one["path"]).parent == store / UPLOADS}
        write_json(store / STATE, {**facts, **kept})
        for folder in (store / UPLOADS).glob("*"):  # replaced or removed since, and now surely read by nobody
            if str(folder) not in {one["path"] for one in kept.values()}:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StoreError(f"{store} cannot be written ({error.strerror}); choose another --store") from error


def read_state(store: Path) -> dict[str, dict[str, str]]:
    """Return path and digest of the adapters in a store, by name.

    Raises:
        StoreError: they cannot be read.
    """
    try:
        found = json.loads((store / STATE).read_text(encoding="utf-8"))
        return {name: {"path": facts["path"], "digest": facts["digest"]} for name, facts in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{store / STATE} cannot be read ({error}); start the server anew") from error


def _absolute(path: str | Path) -> str:
    text = str(path)
    return text if text.startswith("hf:") else os.path.abspath(text)


def write_files(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder with files, whole or not at all; one that is there stays."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "made"
        made.mkdir()
        for name, content in files.items():
            (made / name).write_bytes(content)
        os.replace(made, target)


def _mark(file: Path) -> tuple[int, int, int] | None:
    """Return what changes whenever a file is written anew."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino, facts.st_size
