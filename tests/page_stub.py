"""A stand-in for the server, with canned answers, so that the page can be tested apart from the models."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from importlib import resources
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

KINDS = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}
LIMITS = {"body_bytes": 33_554_432, "pixels": 50_000_000, "images": 64, "answers": 512, "top": 1000}


def about(name: str, classes: list[str], several: bool = False, unlike_from: float | None = None) -> dict[str, Any]:
    """Return an adapter as the server lists it, with `unlike_from` where it marks pictures unlike its training's."""
    figures = {"val_top1": 0.875, "val_top1_ci95": [0.77, 0.94], "val_mean_average_precision": None, "val_images": 80}
    return {
        "name": name, "digest": "0123456789abcdef" * 4, "classes": classes, "outputs": len(classes),
        "multi_label": several, "method": "alore", "figures": figures, "pinned": False,
        "unlike": unlike_from is not None, **({} if unlike_from is None else {"unlike_from": unlike_from}),
    }  # fmt: skip


class Stub(http.server.BaseHTTPRequestHandler):
    """What is asked is noted; `busy` is how often it first says that it has too much to do.

    `marks` False: it leaves out the mark that is asked for. Those in `replaced` mark no more, as it lists then.
    """

    adapters: ClassVar[list[dict[str, Any]]] = []
    token: str | None = None
    busy = 0
    marks = True
    replaced: ClassVar[list[str]] = []
    asked: ClassVar[list[tuple[str, list[str], list[str]]]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def tell(self, status: int, told: Any, **headers: str) -> None:
        self.reply(status, json.dumps(told).encode(), **headers)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        name = "page.html" if path == "/" else path.removeprefix("/page/")
        file = resources.files("visgraft.serve") / name
        if "/" not in name and file.is_file():
            self.reply(200, file.read_bytes(), KINDS[name.rpartition(".")[2]])
        elif path != "/adapters":
            self.tell(404, {"error": "there is nothing here"})
        elif self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self.tell(401, {"error": "a token is needed"})
        else:
            self.tell(200, {"backbone": "vit_small_patch14_dinov2", "limits": LIMITS, "adapters": self.adapters})

    def do_POST(self) -> None:
        kind = type(self)
        body = self.rfile.read(int(self.headers["Content-Length"])).split(b"\r\n")
        images = [line.decode().split('filename="')[1].rstrip('"') for line in body if b"filename=" in line]
        query = parse_qs(urlsplit(self.path).query)
        names = query.get("adapter", [])
        if kind.busy:
            kind.busy -= 1
            return self.tell(429, {"error": "too many pictures are under way; come again"}, Retry_After="1")
        kind.asked.append((self.path, names, images))
        for name in names:
            if "unlike" in query and name in kind.replaced:
                kind.adapters[:] = [about(one["name"], one["classes"]) for one in kind.adapters]
                return self.tell(422, {"error": f"{name} cannot tell unlike pictures"})
        classes = {one["name"]: one["classes"] for one in kind.adapters}
        answers: list[dict[str, Any]] = []
        for image in images:
            if image.startswith("broken"):
                answers.append({"image": image, "error": f"{image} is not a readable image (<b>no</b> header)"})
                continue
            for name in names:
                found = [{"label": label, "score": 0.9 / 2**i} for i, label in enumerate(classes[name])]
                answer = {"image": image, "adapter": name, "digest": "0123456789abcdef" * 4, "classes": found}
                marked = kind.marks and "unlike" in query
                answers.append(answer | ({"as_far": 0.012, "unlike": True} if marked else {}))
        milliseconds = {"decode": 12.1, "wait": 1.0, "forward": 40.2}
        if all("error" in one for one in answers):
            return self.tell(422, {"error": answers[0]["error"], "answers": answers})
        return self.tell(200, {"answers": answers, "milliseconds": milliseconds})


@contextlib.contextmanager
def stub(adapters: list[dict[str, Any]], **options: Any) -> Iterator[tuple[str, type[Stub]]]:
    """Serve the page with such adapters; yields its address and what was asked."""
    kind = type("Handler", (Stub,), {"adapters": adapters, "asked": [], **options})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", kind
        finally:
            server.shutdown()
