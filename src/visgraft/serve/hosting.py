"""Which adapters a server answers with: added, replaced and removed while it answers, the same in all its processes."""

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from PIL import Image
from torch import Tensor

from visgraft.adapters.canary import canary_pixels, compare_canary, normalised
from visgraft.adapters.hub import CONFIG, TENSORS, UNLIKE, settled
from visgraft.adapters.record import AdapterRecord
from visgraft.adapters.reference import read_content
from visgraft.bank.bank import Bank
from visgraft.bank.held import BankAdapter
from visgraft.errors import AdapterError, VisgraftError, nearest
from visgraft.serve.engine import Engine
from visgraft.serve.store import LastAdapterError, Store, StoreError, StoreLostError, digest_of

LOG = logging.getLogger(__name__)
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CANARY_SECONDS = 120.0
_HOST = "server"
"""Who asks where the server itself does."""


class NoAdapterError(VisgraftError):
    """There is no adapter of a name."""


class KeptReference(NamedTuple):
    """The content of the file that tells unlike pictures, and of how many validation images it is."""

    content: bytes
    images: int


class HostedAdapter(NamedTuple):
    """An adapter that answers, the sha256 of its files, and what tells unlike pictures, if anything does."""

    adapter: BankAdapter
    digest: str
    reference: KeptReference | None = None

    @property
    def record(self) -> AdapterRecord:
        """All that is known of it."""
        return self.adapter.record


class Hosting:
    """The adapters in the bank of one process, kept as the store says.

    Whoever changes them does so in its own bank first, and then in the store, at which every process looks before it
    answers a request. So a change is seen by all as soon as it has been answered.
    """

    def __init__(
        self,
        bank: Bank,
        engine: Engine,
        store: Store,
        pinned: tuple[str, ...] = (),
        on_removed: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.bank, self.engine, self.store, self.pinned, self._on_removed = bank, engine, store, pinned, on_removed
        self._hosted: dict[str, HostedAdapter] = {}  # never changed, but replaced
        self._seen: Any = None
        self._loading = threading.RLock()

    @property
    def adapters(self) -> Mapping[str, HostedAdapter]:
        """The adapters by name."""
        return self._hosted

    def get(self, name: str) -> HostedAdapter:
        """Return an adapter; it answers also where another takes its name meanwhile.

        Raises:
            NoAdapterError: there is none of this name.
        """
        try:
            return self._hosted[name]
        except KeyError:
            known = nearest(name, self._hosted) or f"; there are {len(self._hosted)}, see GET /adapters"
            raise NoAdapterError(f"there is no adapter {name!r}{known}") from None

    async def is_current(self) -> bool:
        """Whether the store is as it was when it was last read; asked before every request."""
        return await self.store.unchanged(self._seen)

    def refresh(self, *, strict: bool = False) -> None:
        """Follow the store; an adapter that cannot be loaded is left out, or as it was, and logged.

        Where the store itself cannot be read, all stay as they were.

        Raises:
            AdapterError: with `strict`, one cannot be loaded.
            StoreError: with `strict`, the store cannot be read.
        """
        with self._loading:
            mark = self.store.mark()
            try:
                wanted = self.store.read()
            except StoreError as error:
                if strict:
                    raise
                LOG.error("%s; the adapters stay as they were", error)
                if not isinstance(error, StoreLostError):  # a keeper that comes back is asked again
                    self._seen = mark
                return
            for name, facts in wanted.items():
                if name in self._hosted and self._hosted[name].digest == facts["digest"]:
                    continue
                try:
                    self._answer_with(self._opened(name, facts["path"], facts["digest"]))
                except VisgraftError as error:
                    if strict:
                        raise
                    LOG.error("adapter %s: %s", name, error)
            for name in self._hosted.keys() - wanted.keys():
                self._let_go(name)
            self._seen = mark

    def put(self, name: str, path: Path | str, *, keep: bool = False) -> tuple[HostedAdapter, bool]:
        """Load an adapter, check it with its seeded picture, and answer with it under a name from now on.

        Args:
            name: what it is called.
            path: its folder, or `hf:USER/NAME`.
            keep: copy it into the store first, for the folder will not stay.

        Returns:
            The adapter, and whether there was another of this name.

        Raises:
            AdapterError: it is damaged or of another backbone; nothing has changed then.
            VisgraftError: it cannot be called so.
            StoreError: the store cannot be written; nothing has changed then, unless it is a `StoreLostError`.
        """
        check_name(name)
        with self._loading, settled(), self.store.alone():
            self.refresh()
            digest = digest_of(path)
            made = self._opened(name, path, digest)
            before = name in self._hosted
            seen = self.store.put(name, Path(path), digest, keep=keep)
            hosted = self._answer_with(made)
            self._seen = seen
        return hosted, before

    def remove(self, name: str) -> None:
        """Answer with an adapter no more.

        Raises:
            NoAdapterError: there is none of this name.
            VisgraftError: it is the last one.
            StoreError: the store cannot be written; nothing has changed then, unless it is a `StoreLostError`.
        """
        with self._loading, self.store.alone():
            self.refresh()
            self.get(name)
            if len(self._hosted) == 1:
                raise LastAdapterError
            seen = self.store.remove(name)
            self._let_go(name)
            self._seen = seen

    def check(self) -> None:
        """Send seeded pictures through the way of every request.

        Raises:
            AdapterError: an answer is not what it was when the adapter was saved.
            VisgraftError: there is no answer.
        """
        if not self.engine.alive:
            raise VisgraftError("the model's thread has ended; start the server anew")
        for name, hosted in list(self._hosted.items())[:1]:
            pixels = canary_pixels(hosted.record.data_config["input_size"])
            if len(pixels) == 3:
                picture = hosted.adapter.transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
                self._logits(picture, hosted.adapter)
            self._check_canary(hosted.adapter, name)

    def _opened(self, name: str, path: str | Path, digest: str) -> HostedAdapter:
        made = self.bank.open(name, path)
        reference = _reference_of(made, path)
        if digest_of(path) != digest:  # after it was read, so that the digest is that of what was read
            raise AdapterError(f"{path} has changed since it was added; add it again")
        self._check_canary(made, path)
        return HostedAdapter(made, digest, reference)

    def _answer_with(self, hosted: HostedAdapter) -> HostedAdapter:
        made = hosted.adapter
        self.bank.put(made, replace=True, pinned=made.name in self.pinned)
        self._hosted = {**self._hosted, made.name: hosted}
        return hosted

    def _let_go(self, name: str) -> None:
        self._hosted = {other: hosted for other, hosted in self._hosted.items() if other != name}
        self.bank.remove(name)
        self._on_removed(name)

    def _logits(self, x: Tensor, adapter: BankAdapter) -> Tensor:
        with self.engine.admit(_HOST, 1) as ticket:
            try:
                return ticket.put(x, adapter).result(CANARY_SECONDS).logits
            except TimeoutError as error:
                raise VisgraftError(
                    f"the model gave no answer within {CANARY_SECONDS:.0f} s; try again later"
                ) from error

    def _check_canary(self, adapter: BankAdapter, path: str | Path) -> None:
        """Let the adapter answer its seeded picture beside whatever else is being answered."""
        record = adapter.record
        if record.canary is None:
            return
        x = normalised(canary_pixels(record.data_config["input_size"])[None], record.data_config)[0]
        found, allowed = compare_canary(self._logits(x, adapter), record.canary, PRECISIONS[adapter.precision])
        if not found <= allowed:
            raise AdapterError(
                f"{path} answers a seeded picture otherwise than when it was saved: a logit differs by {found:.2g}, "
                f"above {allowed:.2g}; its tensors were changed, or this device or torch computes wrongly"
            )


def _reference_of(made: BankAdapter, path: str | Path) -> KeptReference | None:
    """Return what tells unlike pictures; where it is lost or damaged, the adapter answers without it."""
    if made.record.unlike is None:
        return None
    try:
        content, found = read_content(path, made.record)
    except AdapterError as error:
        LOG.warning("adapter %s cannot tell unlike pictures: %s", made.name, error)
        return None
    return KeptReference(content, len(found.distances))


def check_name(name: str) -> None:
    """Raise a VisgraftError where an adapter cannot be called so."""
    parts = name.split("/")
    if (
        len(name) > 200
        or not name.isprintable()
        or "\\" in name
        or any(not p.strip() or p in (".", "..") for p in parts)
    ):
        raise VisgraftError(
            f"an adapter cannot be called {name!r:.60}; give it a name of printable characters, at most 200"
        )
    if len(parts) > 1 and parts[-1] == "ready":
        raise VisgraftError(
            f"an adapter cannot be called {name!r:.60}: so one asks whether another is ready; rename it"
        )


@contextlib.contextmanager
def uploaded(config: bytes, tensors: bytes, unlike: bytes | None = None) -> Iterator[Path]:
    """Yield a folder with an adapter that somebody sent, which goes again afterwards."""
    with tempfile.TemporaryDirectory(prefix="visgraft-upload-") as folder:
        path = Path(folder)
        try:
            (path / CONFIG).write_bytes(config)
            (path / TENSORS).write_bytes(tensors)
            if unlike is not None:
                (path / UNLIKE).write_bytes(unlike)
        except OSError as error:
            raise StoreError(f"{folder} cannot be written ({error}); make room there") from error
        try:
            with safetensors.safe_open(path / TENSORS, "pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            told = re.sub(r"[^ -~]", "?", str(error))
            raise AdapterError(f"tensors is no safetensors file ({told}); send an adapter_model.safetensors") from error
        yield path


def inside(root: str, path: str) -> Path:
    """Return a path below a folder.

    Raises:
        VisgraftError: it leads elsewhere.
    """
    top = Path(os.path.realpath(root))
    try:
        found = Path(os.path.realpath(top / path))
        found.stat()
    except (OSError, ValueError):
        found = top
    if not found.is_relative_to(top) or found == top:
        raise VisgraftError(f"path {path!r:.60} is nothing below the folder of adapters; give a folder in it")
    return found
