"""The server under broken, hostile and too many requests: each refused by itself, and the adapters untouched."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import io
import json
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from predicting import BACKBONE, adapters, make, pictures
from safetensors.torch import load_file, save
from serving import Running, running, scores

from visgraft import Backbone
from visgraft.adapters.directory import CONFIG, TENSORS
from visgraft.bank.bank import Bank
from visgraft.bank.opening import load_bank
from visgraft.errors import VisgraftError
from visgraft.serve.engine import Answered, Engine, QueueFullError
from visgraft.serve.run import PromptH11

BODY = 400_000


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    named = {name: adapters[name] for name in ("sct", "lora")}
    options: dict[str, Any] = {"max_body": BODY, "max_images": 4, "max_pixels": 250_000, "body_seconds": 1.0}
    zoo = tmp_path_factory.mktemp("zoo")
    with running(tmp_path_factory.mktemp("store"), named, adapters=str(zoo), **options) as found:
        yield found


@pytest.fixture
def unharmed(served: Running, pictures: list[Path]) -> Iterator[None]:
    """Whatever happens meanwhile, the answers and the adapters stay as they were."""

    def state() -> tuple[Any, Any]:
        return served.predict(pictures[0], "sct", "lora"), served.ask("GET", "/adapters")[1]

    before = state()
    yield
    assert state() == before
    assert served.ask("GET", "/v2/health/ready")[0] == 200


def png(width: int, height: int) -> bytes:
    """A picture of one colour, whose file is tiny, or whose header only claims its size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_a_body_that_is_too_large_is_not_read(served: Running, unharmed: None) -> None:
    status, found, headers = served.send("/predict?adapter=sct", ("x.png", b"x" * (BODY + 1)))
    assert status == 413 and f"{BODY:,} bytes" in found["error"] and headers["connection"] == "close"
    with socket.create_connection(("127.0.0.1", served.port), 60) as raw:  # of unknown length, in pieces, endless
        raw.sendall(b"POST /predict?adapter=sct HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 300 * BODY:
                raw.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent += 4096
        except OSError:
            pass
        assert sent < 300 * BODY, "the server hangs up"
        assert raw.recv(100).startswith(b"HTTP/1.1 413") or sent


def test_slow_clients_are_told_to_hurry_and_silent_ones_dropped(
    served: Running, unharmed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 60) as raw:
        raw.sendall(b"POST /predict?adapter=sct HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nfew")
        reply = raw.recv(1000)
        assert reply.startswith(b"HTTP/1.1 408") and b"connection: close" in reply.lower()
    monkeypatch.setattr(PromptH11, "header_seconds", 0.3)
    for begun in (b"", b"GET /adapters HTTP/1.1\r\nHost: 127", b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /v"):
        with socket.create_connection(("127.0.0.1", served.port), 60) as raw:
            raw.sendall(begun)
            begin = time.monotonic()
            while raw.recv(1000):
                pass
            assert time.monotonic() - begin < 25, "long before the default of 30 s"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(60_000, 60_000), "pixels"),  # 3.6 thousand million pixels in 100 bytes
        (png(600, 600), "360,000 pixels, more than the 250,000"),
        (png(1000, 1), "500 times as long as wide"),
        (b"", "not a readable image"),
        (b"GIF89a", "not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image"),
        (b"%PDF-1.7", "not a readable image"),
        (pickle.dumps({"a": 1}), "not a readable image"),
        (encoded(Image.new("RGB", (40, 40), "red"), "JPEG")[:-100], "not a readable image"),
    ],
)
def test_pictures_that_are_none(content: bytes, words: str, served: Running, unharmed: None) -> None:
    status, found, _ = served.send("/predict?adapter=sct", ("x.png", content))
    assert status == 422 and words in found["error"] and "x.png" in found["error"]
    assert "Traceback" not in found["error"] and "/" not in found["error"].replace("x.png", "")


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (500, 1), (3, 300), (500, 500)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "I;16"])
def test_odd_pictures_are_answered(size: tuple[int, int], mode: str, served: Running, unharmed: None) -> None:
    (answer,) = served.predict(("x.png", encoded(Image.new(mode, size), "PNG")), "lora")
    assert sum(scores(answer).values()) == pytest.approx(1, abs=1e-5)


def test_requests_of_too_many_images_or_none(served: Running, pictures: list[Path], unharmed: None) -> None:
    assert served.send("/predict?adapter=sct", *pictures[:5])[0] in (400, 413)
    status, found, _ = served.send("/predict?adapter=sct")
    assert status == 400 and "no picture was sent" in found["error"]
    broken = b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
    status, found, _ = served.ask(
        "POST", "/predict?adapter=sct", broken, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert 400 <= status < 500 and found["error"]
    status, found, _ = served.ask("POST", "/predict?adapter=sct", broken, {"Content-Type": "multipart/form-data"})
    assert 400 <= status < 500 and found["error"]


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", b"\0" * 10_000_000)
    return file.getvalue()


class Evil:
    """Executed by whoever unpickles it."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


def longer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}


def infinite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + torch.inf if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def test_uploads_that_are_no_adapters(
    served: Running, adapters: dict[str, Path], unharmed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = (adapters["sct"] / CONFIG).read_bytes(), (adapters["sct"] / TENSORS).read_bytes()
    held = load_file(adapters["sct"] / TENSORS)
    huge = struct.pack("<Q", 2**40) + b"{}"
    for sent, words in (
        ((config, pickle.dumps(Evil())), "no safetensors file"),
        ((config, bomb()), "no safetensors file"),
        ((config, tensors[:-10]), "no safetensors file"),
        ((config, b""), "no safetensors file"),
        ((config, huge), "no safetensors file"),
        ((b"{", tensors), "is damaged"),
        ((b"[]", tensors), "adapter_config.json"),
        ((b"[" * 50_000, tensors), "is damaged"),
        ((config.replace(b'"sct"', b'"skt"'), tensors), "skt"),
        ((config, save(longer(held))), "does not fit its config"),
        ((config, save(infinite(held))), "not finite"),
        ((config, save(changed(held))), "answers a seeded picture otherwise"),
        ((config, save({"other": torch.zeros(3)})), "does not fit its config"),
    ):
        status, found, _ = served.put("new", *sent)
        assert status == 422 and words in found["error"], (words, found)
        assert "/tmp" not in found["error"] and "Traceback" not in found["error"]
    assert "executed" not in capsys.readouterr().out
    facts = json.loads(config)
    facts["record"]["metrics"] = {"val_top1": float("nan"), "half of a pair": "\ud800"}
    assert served.put("new", json.dumps(facts).encode(), tensors)[0] == 201
    assert served.ask("GET", "/adapters/new")[1]["figures"]["val_top1"] is None
    assert served.ask("DELETE", "/adapters/new")[0] == 204


def test_adapters_of_another_backbone_are_refused(served: Running, unharmed: None, tmp_path: Path) -> None:
    for number, backbone in enumerate((Backbone("test_vit2", "none", 32), Backbone("test_vit", "none", 64))):
        other = make(tmp_path / str(number), "lora", backbone)
        status, found, _ = served.put("new", (other / CONFIG).read_bytes(), (other / TENSORS).read_bytes())
        assert status == 422 and ("another backbone" in found["error"] or "64 pixels" in found["error"]), found


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "%2e%2e",
        "..%2f..%2fetc",
        "a/../b",
        "a//b",
        "a%00b",
        "%0a",
        "x" * 201,
        "%5c",
        "%20",
        "a/./b",
        "%e2%80%ae",
        "a/ready",
    ],
)
def test_names_that_lead_elsewhere(name: str, served: Running, adapters: dict[str, Path], unharmed: None) -> None:
    body = json.dumps({"path": "x"})
    status, found, _ = served.ask("PUT", f"/adapters/{name}", body)
    assert 400 <= status < 500 and found["error"]


@pytest.mark.parametrize(
    "path", ["..", "../..", "/etc", "/", "", ".", "none", "link", "a\0b", "x" * 5000, 3, None, ["a"]]
)
def test_paths_that_lead_elsewhere(path: Any, served: Running, adapters: dict[str, Path], unharmed: None) -> None:
    link = Path(served.server.config.adapters or "") / "link"
    if not link.is_symlink():
        link.symlink_to(adapters["sct"])
    status, found, _ = served.ask("PUT", "/adapters/new", json.dumps({"path": path}))
    assert status == 422 and "/tmp" not in found["error"] and "root" not in found["error"]


def test_tokens_and_hosts(adapters: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    with running(tmp_path, {"sct": adapters["sct"]}, tokens=("right", "other"), hosts=("127.0.0.1",)) as served:
        for path in ("/adapters", "/metrics", "/v2", "/models/x", "/predict"):
            for given in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "right"},
                {"Authorization": "Basic right"},
            ):
                status, _, headers = served.ask("GET", path, headers=given)
                assert status == 401 and headers["www-authenticate"] == "Bearer", path
        assert served.send("/predict?adapter=sct", pictures[0], Authorization="Bearer right")[0] == 200
        assert served.send("/predict?adapter=sct", pictures[0], Authorization="bearer other")[0] == 200
        for path in ("/", "/v2/health/ready", "/page/page.js"):
            assert served.ask("GET", path)[0] == 200
        assert served.ask("GET", "/", headers={"Host": "evil.example"})[0] == 421
        headers = served.ask("OPTIONS", "/predict", headers={"Origin": "http://a.b", "Authorization": "Bearer right"})[
            2
        ]
        assert not [name for name in headers if name.startswith("access-control")]


# The engine by itself


@pytest.fixture
def bank(adapters: dict[str, Path]) -> Bank:
    return load_bank({name: adapters[name] for name in ("sct", "lora")})


def blocked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[str]], Any]:
    """Hold the engine's forwards back until the returned lock is released; note whose images were in each."""
    import threading

    batches, gate, compute = list[list[str]](), threading.Semaphore(0), engine._compute

    def slowly(batch: Any, begin: float) -> None:
        gate.acquire()
        batches.append([item.owner for item in batch])
        compute(batch, begin)

    monkeypatch.setattr(engine, "_compute", slowly)
    return batches, gate


def test_owners_take_turns_and_none_fills_the_queue(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(bank, max_batch=4, max_queue=12, max_delay=0)
    batches, gate = blocked(engine, monkeypatch)
    sct, x = bank.adapter("sct"), torch.randn(3, 32, 32)
    with engine.admit("greedy", 12) as ticket:
        found = [ticket.put(x, sct) for _ in range(12)]
        with pytest.raises(QueueFullError, match="try again"), engine.admit("greedy", 1):
            pass
        with engine.admit("modest", 2) as other:
            found += [other.put(x, sct) for _ in range(2)]
            with pytest.raises(QueueFullError) as full, engine.admit("modest", 5):
                pass
            assert full.value.seconds >= 1
            gate.release(20)
            assert {round(float(one.result(120).logits.sum()), 3) for one in found}.__len__() == 1
    assert batches[0][:1] == ["greedy"] and "modest" in batches[0] + batches[1], "it does not wait behind all others"
    assert engine.under_way == 0
    engine.close()
    with pytest.raises(QueueFullError), engine.admit("greedy", 1):
        pass


def test_only_the_models_thread_computes_with_several(adapters: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, as it is about what torch keeps for each thread."""
    code = f"""
import torch
from visgraft.serve.store import write_state
from visgraft.serve.server import Server
from visgraft.serve.settings import ServeConfig
write_state(__import__("pathlib").Path({str(tmp_path)!r}), {{"sct": {str(adapters["sct"])!r}}})
server = Server(ServeConfig({str(tmp_path)!r}, threads=3))
server.hosting.refresh(strict=True)
compute, found = server.engine._compute, []
server.engine._compute = lambda *what: (found.append(torch.get_num_threads()), compute(*what))
server.hosting.check()
pools = server.answerer.decoders, server.loader, server.checker
print(found[0], torch.get_num_threads(), *(pool.submit(torch.get_num_threads).result() for pool in pools))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "1", "1", "1", "1"], done.stderr


def test_one_image_does_not_take_a_batch_with_it(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(bank, max_batch=8)
    sct, lora, good, bad = bank.adapter("sct"), bank.adapter("lora"), torch.randn(3, 32, 32), torch.randn(3, 31, 31)
    expected = [answer.logits for answer in bank([good, good], ["sct", "lora"])]
    with engine.admit("a", 3) as ticket:
        batches, gate = blocked(engine, monkeypatch)
        found: list[Future[Answered]] = [ticket.put(good, sct), ticket.put(bad, sct), ticket.put(good, lora)]
        gate.release(20)
        for one, logits in zip((found[0], found[2]), expected, strict=True):
            torch.testing.assert_close(one.result(120).logits, logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(VisgraftError, match="31"):
            found[1].result(120)
    assert max(map(len, batches)) == 3
    engine.close()


def test_an_idle_model_starts_at_once_and_waits_only_for_what_is_announced(bank: Bank) -> None:
    engine = Engine(bank, max_batch=4, max_delay=600.0)
    sct, x = bank.adapter("sct"), torch.randn(3, 32, 32)
    with engine.admit("a", 1) as ticket:
        ticket.put(x, sct).result(120)
    with engine.admit("a", 3) as ticket:
        found = [ticket.put(x, sct) for _ in range(3)]
        assert {one.result(120).batch for one in found} == {3}, "the first has waited for the others"
    engine.close()


def test_what_nobody_waits_for_is_not_computed(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(bank, max_batch=1, max_delay=0)
    batches, gate = blocked(engine, monkeypatch)
    sct, x = bank.adapter("sct"), torch.randn(3, 32, 32)
    with engine.admit("a", 3) as ticket:
        first, second, third = [ticket.put(x, sct) for _ in range(3)]
        assert second.cancel()
        gate.release(5)
        third.result(120)
    assert first.done() and len(batches) == 2
    engine.close()
