"""A server on a socket in this process, and requests to it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from urllib3.filepost import encode_multipart_formdata

from visgraft.serve.application import make_app
from visgraft.serve.run import PromptH11
from visgraft.serve.server import Server
from visgraft.serve.settings import ServeConfig
from visgraft.serve.sockets import listen
from visgraft.serve.store import write_state


class Running:
    """A running server: its port, and the objects behind it."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON or bytes, and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        told = {name.lower(): value for name, value in reply.getheaders()}
        found = json.loads(content) if content and told.get("content-type") == "application/json" else content
        return reply.status, found, told

    def send(
        self, path: str, *files: Path | tuple[str, bytes], method: str = "POST", **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Send files as parts called `image` of a form."""
        named = [(one.name, one.read_bytes()) if isinstance(one, Path) else one for one in files]
        body, kind = encode_multipart_formdata([("image", (name, data, "image/png")) for name, data in named])
        return self.ask(method, path, body, {"Content-Type": kind, **headers})

    def put(self, name: str, config: bytes, tensors: bytes) -> tuple[int, Any, dict[str, str]]:
        """Upload an adapter."""
        body, kind = encode_multipart_formdata({"config": ("c", config), "tensors": ("t", tensors)})
        return self.ask("PUT", f"/adapters/{quote(name)}", body, {"Content-Type": kind})

    def predict(self, picture: Path | tuple[str, bytes], *adapters: str, top: int = 3) -> list[Any]:
        """Return the answers to one picture."""
        words = "&".join(f"adapter={quote(name)}" for name in adapters)
        status, found, _ = self.send(f"/predict?top={top}&{words}", picture)
        assert status == 200, found
        return list(found["answers"])


@contextlib.contextmanager
def running(store: Path, named: dict[str, Path], **options: Any) -> Iterator[Running]:
    """Run a server in a thread."""
    write_state(store, named)
    app = make_app(ServeConfig(str(store), **options))
    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(
            app, http=PromptH11, log_config=None, timeout_graceful_shutdown=20, timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Running(app.state.server, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "it ends"


def scores(answer: Any) -> dict[str, float]:
    """Return the classes of an answer with their probabilities."""
    return {one["label"]: one["score"] for one in answer["classes"]}
