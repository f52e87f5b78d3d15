"""Starting and ending a server: its socket, its processes, and connections that never ask."""

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from visgraft.serve.application import make_app
from visgraft.serve.metrics import MANY, log_to_stderr
from visgraft.serve.settings import ServeConfig
from visgraft.serve.store import write_state

STORE = "VISGRAFT_SERVE_STORE"
"""Tells a further process where the store is, in which the options lie."""

OPTIONS = "options.json"
LONGEST_HEADERS = 64 * 2**10  # bytes
DRAIN_SECONDS = 30
START_SECONDS = 30  # in which a process must say that it lives; one that dies as it is asked is missed for as long


class PromptH11(H11Protocol):
    """HTTP/1.1 in which a request's headers must arrive in some seconds, or the connection is closed."""

    header_seconds = 30.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Go on waiting where headers are not whole yet."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def application() -> FastAPI:
    """Return the application of a further process, with those of the adapters that can still be read."""
    log_to_stderr()
    text = (Path(os.environ[STORE]) / OPTIONS).read_text(encoding="utf-8")
    return make_app(ServeConfig.from_json(text), strict=False)


def serve(
    adapters: Mapping[str, str | Path], options: Mapping[str, Any], listening: socket.socket, workers: int = 1
) -> None:
    """Answer until a signal ends it; then what is under way is answered first.

    Args:
        adapters: at least one, by name.
        options: of `ServeConfig`; without `store`, one in a temporary folder goes with the server.
        listening: what `listen` returned.
        workers: processes, each with a backbone of its own.

    Raises:
        VisgraftError: an adapter cannot be loaded, or all processes ended.
    """
    with tempfile.TemporaryDirectory(prefix="visgraft-serve-") as folder:
        config = ServeConfig(**{"store": folder, **options})
        store = Path(config.store)
        write_state(store, adapters)
        log_to_stderr()
        with _private(store / OPTIONS) as file:
            file.write(config.to_json())
        settings: dict[str, Any] = {
            "http": f"{__name__}:{PromptH11.__name__}",  # as text, so that a new process lives before it imports torch
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "timeout_graceful_shutdown": DRAIN_SECONDS,
            "timeout_worker_healthcheck": START_SECONDS,
            "h11_max_incomplete_event_size": LONGEST_HEADERS,
        }
        if workers == 1:
            with contextlib.suppress(KeyboardInterrupt):  # what uvicorn makes of SIGINT and SIGTERM once it has ended
                uvicorn.Server(uvicorn.Config(make_app(config), **settings)).run(sockets=[listening])
            return
        make_app(config).state.server.close()  # says what is wrong once, and not in each process again and again
        figures = Path(folder) / "figures"
        figures.mkdir()
        os.environ |= {STORE: str(store), MANY: str(figures)}
        host, port = listening.getsockname()[:2]
        listening.close()  # each process takes its share of what the parent listens on
        uvicorn.run("visgraft.serve.run:application", factory=True, workers=workers, host=host, port=port, **settings)


def _private(path: Path) -> Any:
    """Open a new file that only its owner can read, for it may hold tokens."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8")
