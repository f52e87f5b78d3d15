"""Headless Chromium over its DevTools pipe: two file descriptors, messages of JSON that end in a zero byte."""

import base64
import contextlib
import functools
import http.server
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
COMMAND = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "about:blank",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing, self.numbers, self.rest = reading, writing, itertools.count(1), b""
        self.session: str | None = None
        self.said: list[str] = []
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        made = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = made["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, wait: float = 120, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + wait
        while True:
            found = self._next(end, method)
            if found.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Network.requestWillBeSent"):
                self.said.append(json.dumps(found["params"]))
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return dict(found["result"])

    def _next(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.reading], [], [], max(0.0, end - time.monotonic()))[0], f"{method}: no answer"
            self.rest += os.read(self.reading, 1 << 20)
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def evaluate(self, code: str) -> Any:
        """Return the value of an expression, of a promise where it is one."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, address: str, seconds: float = 120) -> str:
        """Open the page of an export; returns `ready` or `failed`."""
        self.call("Page.navigate", url=address)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = self.evaluate("document.documentElement?.dataset.state ?? ''")
            if state in ("ready", "failed"):
                return str(state)
            time.sleep(0.1)
        raise AssertionError((self.evaluate("document.body.innerText"), self.said[-5:]))

    def choose(self, file: Path, selector: str = "#file") -> dict[str, Any]:
        """Put a file into the page's input, as a user does; returns the answer that the page tells."""
        self.evaluate(
            "window.told = new Promise((done) => document.addEventListener('visgraft-answer', (event) => "
            "done(event.detail), {once: true})); 0"
        )
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
        return dict(self.evaluate("window.told"))

    def picture(self, file: Path, width: int, dark: bool, height: int = 900) -> None:
        """Write what the page looks like at a width."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 800
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(*flags: str) -> Iterator[Page]:
    """Yield a tab of a new Chromium with a profile of its own."""
    assert CHROMIUM
    to_read, to_write = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{to_write[0]} 4>&{to_read[1]}'
        command = ["bash", "-c", script, CHROMIUM, f"--user-data-dir={profile}", *flags, *COMMAND]
        with subprocess.Popen(
            command, pass_fds=(to_write[0], to_read[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            os.close(to_write[0])
            os.close(to_read[1])
            try:
                yield Page(to_read[0], to_write[1])
            finally:
                process.terminate()
                os.close(to_write[1])
                os.close(to_read[0])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    isolated = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@contextlib.contextmanager
def served(folder: Path, isolated: bool = False) -> Iterator[str]:
    """Serve a folder as any static server does, or with the headers that give a page threads; yields its address."""
    kind = type("Handler", (_Quiet,), {"isolated": isolated})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
