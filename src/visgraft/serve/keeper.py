"""A store for workers that share no folder: one actor of Ray keeps the adapters' files, and each worker a copy."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from visgraft.errors import VisgraftError
from visgraft.serve.sockets import listen
from visgraft.serve.store import (
    UPLOADS,
    FolderStore,
    StoreError,
    StoreLostError,
    begin_state,
    files_of,
    write_files,
)

GIVEN = "given"
ANSWER_SECONDS = 30.0
"""In which the actor must answer."""
LOOK_SECONDS = 2.0
"""For which a request waits to learn whether an adapter has changed."""
FIGURES_SECONDS = 60.0
"""After which the figures of a worker that told none go."""


class Sent(NamedTuple):
    """An adapter on its way to another machine: the digest of its files, and what is in them by name."""

    digest: str
    files: dict[str, bytes]

    @classmethod
    def of(cls, folder: Path, digest: str) -> "Sent":
        """Return an adapter in a folder."""
        return cls(digest, files_of(folder))


class Keeper:
    """The actor. It imports no torch, and answers one question after another, so that changes have an order."""

    def __init__(self, folder: str | None) -> None:
        """Begin, or go on where the actor was lost.

        Args:
            folder: where it keeps the adapters, which outlasts it; None: a temporary one, which does not.
        """
        import ray

        self.temporary = folder is None
        own = f"visgraft-serve-{ray.get_runtime_context().get_node_id()[:12]}"
        self.folder = Path(folder or Path(tempfile.gettempdir()) / own)
        self.store = FolderStore(self.folder)
        self.figures: dict[str, tuple[float, bytes]] = {}
        self.failed: str | None = None

    def begin(self, given: Mapping[str, Sent]) -> None:
        """Take the adapters that the command names.

        Raises:
            StoreError: the folder cannot be read or written.
        """
        self.end()  # what one that was killed has left
        shutil.rmtree(self.folder / GIVEN, ignore_errors=True)
        facts = {}
        for name, sent in given.items():
            place = self.folder / GIVEN / sent.digest
            with _writing(self.folder):
                write_files(place, sent.files)
            facts[name] = {"path": str(place), "digest": sent.digest}
        begin_state(self.folder, facts)

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """Return this machine's address, and the port, or one that is free, on which a server here can listen now.

        Raises:
            VisgraftError: there is none.
        """
        import ray

        with listen(host, port) as listening:
            return ray.util.get_node_ip_address(), listening.getsockname()[1]

    def mark(self) -> Any:
        """See `Store`."""
        return self.store.mark()

    def read(self) -> dict[str, str]:
        """Return the digests by name."""
        return {name: facts["digest"] for name, facts in self.store.read().items()}

    def sent(self, digest: str) -> Sent:
        """Return the files of an adapter."""
        for facts in self.store.read().values():
            if facts["digest"] == digest:
                return Sent.of(Path(facts["path"]), digest)
        raise StoreError(f"{self.folder} holds no adapter of the digest {digest}")

    def put(self, name: str, sent: Sent) -> tuple[Any, Any]:
        """Keep an adapter under a name; return the marks before and after."""
        before, place = self.store.mark(), self.folder / UPLOADS / sent.digest
        with _writing(self.folder):
            write_files(place, sent.files)
            return before, self.store.put(name, place, sent.digest, keep=False)

    def remove(self, name: str) -> tuple[Any, Any]:
        """Forget a name; return the marks before and after."""
        before = self.store.mark()
        with _writing(self.folder):
            return before, self.store.remove(name)

    def tell(self, worker: str, figures: bytes) -> None:
        """Take the figures of a worker."""
        self.figures[worker] = time.monotonic(), figures

    def told(self) -> dict[str, bytes]:
        """Return the figures of all workers that told any of late."""
        late = time.monotonic() - FIGURES_SECONDS
        self.figures = {worker: one for worker, one in self.figures.items() if one[0] > late}
        return {worker: text for worker, (_, text) in self.figures.items()}

    def fail(self, error: str) -> None:
        """Take why a worker cannot begin."""
        self.failed = error

    def failure(self) -> str | None:
        """Return once why a worker could not begin."""
        found, self.failed = self.failed, None
        return found

    def end(self) -> None:
        """Leave nothing behind that was temporary."""
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error.strerror}); make room there") from error


class KeptStore:
    """A worker's view of the keeper: a `Store`."""

    def __init__(self, keeper: Any, folder: Path) -> None:
        """Begin.

        Args:
            keeper: handle of the actor.
            folder: where this worker puts the adapters' files.
        """
        self.keeper, self.folder, self._known = keeper, folder, None

    def mark(self) -> Any:
        """See `Store`."""
        with contextlib.suppress(StoreError):
            self._known = answer_of(self.keeper.mark.remote())
        return self._known

    async def unchanged(self, mark: Any) -> bool:
        """See `Store`; where the keeper is lost, the adapters stay as they were."""
        import ray

        try:
            return bool(mark == await asyncio.wait_for(self.keeper.mark.remote(), LOOK_SECONDS))
        except (TimeoutError, ray.exceptions.RayError):
            return True

    def read(self) -> dict[str, dict[str, str]]:
        """See `Store`; what is not here yet is fetched."""
        found = {}
        for name, digest in answer_of(self.keeper.read.remote()).items():
            place = self.folder / digest
            if not place.exists():
                files = answer_of(self.keeper.sent.remote(digest)).files
                with _writing(self.folder):
                    write_files(place, files)
            found[name] = {"path": str(place), "digest": digest}
        return found

    def alone(self) -> AbstractContextManager[None]:
        """See `Store`: the keeper does one thing after another."""
        return contextlib.nullcontext()

    def put(self, name: str, path: Path, digest: str, *, keep: bool) -> Any:
        """See `Store`; all are kept, for no other machine sees the folder."""
        return self._seen(answer_of(self.keeper.put.remote(name, Sent.of(path, digest))))

    def remove(self, name: str) -> Any:
        """See `Store`."""
        return self._seen(answer_of(self.keeper.remove.remote(name)))

    def _seen(self, marks: tuple[Any, Any]) -> Any:
        """Return the mark after a change of ours, or the one before where somebody else's came between."""
        before, after = marks
        if before == self._known:
            self._known = after
        return self._known


def answer_of(reference: Any, seconds: float = ANSWER_SECONDS) -> Any:
    """Return what an actor answered.

    Raises:
        VisgraftError: what it raised.
        StoreError: it failed.
        StoreLostError: it is lost, or does not answer.
    """
    import ray

    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VisgraftError):
            raise error.cause from None
        raise StoreError(f"the keeper of the adapters failed ({error.cause!r}); start the server anew") from error
    except (ray.exceptions.RayError, ConnectionError) as error:  # the latter is how Ray's client is cut off
        lost = f"the keeper of the adapters does not answer ({type(error).__name__})"
        raise StoreLostError(f"{lost}; try again, or start the server anew") from error
