"""The server where requests lie about their size, adapters come and go at once, and its store is lost under it."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import base64
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from predicting import adapters, pictures
from serving import Running, running, scores

import visgraft
from visgraft.adapters.directory import CONFIG, TENSORS
from visgraft.errors import AdapterError, VisgraftError
from visgraft.serve.application import make_app
from visgraft.serve.settings import ServeConfig
from visgraft.serve.store import STATE, UPLOADS, write_state


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    named = {name: adapters[name] for name in ("sct", "lora")}
    with running(tmp_path_factory.mktemp("store"), named, max_images=4, max_queue=16) as found:
        yield found


def infer(served: Running, header: Any, rest: bytes = b"", length: str = "") -> tuple[int, Any]:
    body = json.dumps(header).encode()
    told = {"Inference-Header-Content-Length": length or str(len(body))} if rest or length else {}
    return served.ask("POST", "/v2/models/sct/infer", body + rest, told)[:2]


def pixels(values: list[Any], *shape: int) -> dict[str, Any]:
    return {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [*(shape or (1, 3, 32, 32))], "data": values}]}


def image(*shape: int, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": shape, **more}]}


def test_numbers_that_are_too_large(served: Running) -> None:
    status, found = infer(served, pixels([10**400] * 3072))
    assert status == 422 and "does not hold 3072 numbers" in found["error"]
    status, found = infer(served, pixels([3e38, -3e38] * 1536))
    assert status == 422 and "not finite" in found["error"]
    status, found = infer(served, pixels([0.5] * 3072), length="1" * 5000)
    assert status == 400 and "inference-header-content-length" in found["error"]


def test_requests_that_are_little_to_send_and_much_to_answer(served: Running, pictures: list[Path]) -> None:
    sent = base64.b64encode(pictures[0].read_bytes()).decode()
    begin = time.monotonic()
    status, found = infer(served, image(*[2**31] * 200_000, data=[sent]))
    assert status == 422 and "a shape of whole numbers, at most 8" in found["error"]
    status, found = infer(served, image(9, parameters={"binary_data_size": 20_000_000}), b"\0" * 20_000_000)
    assert status == 413 and "9 pictures are more than the 4" in found["error"]
    status, found = infer(served, image(3, parameters={"binary_data_size": 20_000_000}), b"\0" * 20_000_000)
    assert status == 422 and "has 4 pictures, but the shape [3]" in found["error"]
    status, found = infer(served, image(1, data=[sent]) | {"outputs": [{"name": "logits"}] * 100_000})
    assert status == 422 and "at most 3 objects" in found["error"]
    assert time.monotonic() - begin < 60
    twice = image(1, data=[sent])["inputs"] * 2
    status, found = infer(served, {"inputs": twice})
    assert status == 422 and "two inputs 'image'" in found["error"]
    status, found, _ = served.send("/predict?" + "&".join(["adapter=sct"] * 17), pictures[0])
    assert status == 413 and "name at most 16" in found["error"]


def test_content_types_and_hosts_in_capitals(adapters: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    with running(tmp_path, {"sct": adapters["sct"]}, hosts=("localhost",)) as served:
        form = b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n%s\r\n--x--\r\n"
        told = {"Host": "LOCALHOST", "Content-Type": "Multipart/Form-Data; boundary=x"}
        status, found, _ = served.ask("POST", "/predict", form % pictures[0].read_bytes(), told)
        assert status == 200 and found["answers"][0]["image"] == "a"


def test_a_client_that_leaves_is_no_failure_of_the_server(
    served: Running, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    for path, kind in (("/predict", "image/png"), ("/predict", "multipart/form-data; boundary=x"), ("/models/sct", "")):
        with socket.create_connection(("127.0.0.1", served.port), 60) as raw:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: 999\r\n\r\n--x"
            raw.sendall(head.encode())
            time.sleep(0.2)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until = time.monotonic() + 60
    while served.ask("GET", "/metrics")[1].decode().count('status="499"') < 4 and time.monotonic() < until:
        time.sleep(0.1)
    found = served.ask("GET", "/metrics")[1].decode()
    assert 'status="499"' in found and 'status="500"' not in found
    assert not [record for record in caplog.records if record.exc_info]


def test_an_adapter_is_swapped_and_parked_at_once(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has answered its seeded picture may be parked by others' pictures before it takes its name."""
    expected = {
        name: dict(visgraft.predict(visgraft.load(adapters[name]), pictures[:1], top=3)[0]) for name in ("sct", "lora")
    }
    files = [(adapters["sct"] / file).read_bytes() for file in (CONFIG, TENSORS)]
    with running(tmp_path, {name: adapters[name] for name in expected}, capacity=1) as served:
        hosting, put = served.server.hosting, served.server.bank.put

        def late(*what: Any, **how: Any) -> None:
            hosting._logits(torch.zeros(3, 32, 32), hosting.get("lora").adapter)
            put(*what, **how)

        served.server.bank.put = late  # type: ignore[method-assign]
        assert served.put("new", *files)[0] == 201
        served.server.bank.put = put  # type: ignore[method-assign]
        for name, own in (("lora", "lora"), ("new", "sct"), ("lora", "lora"), ("sct", "sct")):
            assert scores(served.predict(pictures[0], name)[0]) == pytest.approx(expected[own], abs=1e-5)
    assert not [record for record in caplog.records if record.exc_info]


def test_changes_that_cross_each_other(adapters: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    files = [(adapters["sct"] / file).read_bytes() for file in (CONFIG, TENSORS)]
    named = {name: adapters["sct"] for name in ("a", "b")}
    with running(tmp_path, named) as served, ThreadPoolExecutor(2) as pool:
        hosting = served.server.hosting
        put = hosting.put

        def undone(name: str, *what: Any, **how: Any) -> Any:
            found = put(name, *what, **how)
            hosting.remove(name)  # by somebody else, before the answer is written
            return found

        hosting.put = undone  # type: ignore[method-assign]
        status, found, _ = served.put("new", *files)
        assert status == 201 and found["name"] == "new"
        codes = sorted(pool.map(lambda name: served.ask("DELETE", f"/adapters/{name}")[0], ("a", "b")))
        assert codes == [204, 422] and len(served.ask("GET", "/adapters")[1]["adapters"]) == 1
        with pytest.raises(VisgraftError, match="the last adapter"):
            hosting.remove(next(iter(hosting.adapters)))


def test_a_full_queue_refuses_an_upload_for_now_only(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]
    with running(tmp_path, {"sct": adapters["sct"]}, max_queue=1) as served:
        with served.server.engine.admit("a", 1):
            assert served.put("new", *files)[0] == 429
        assert served.put("new", *files)[0] == 201


def test_the_store_is_lost_or_damaged(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visgraft.serve.server.CHECKED_FOR", 0.0)
    store, files = tmp_path / "store", [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]
    with running(store, {name: adapters[name] for name in ("sct", "full")}) as served:
        before = served.predict(pictures[0], "sct")

        def as_before() -> None:
            assert served.predict(pictures[0], "sct") == before
            assert len(served.ask("GET", "/adapters")[1]["adapters"]) == 2
            assert served.ask("GET", "/v2/health/ready")[0] == 200

        def no_change() -> None:
            for status, found, _ in (served.put("new", *files), served.ask("DELETE", "/adapters/full")):
                assert status == 507 and "its store" in found["error"] and str(tmp_path) not in found["error"]

        kept = (store / STATE).read_bytes()
        for damaged in (b"{", b"[]", b'{"sct": 3}'):
            (store / STATE).write_bytes(damaged)
            as_before()
            no_change()
        (store / STATE).write_bytes(kept)
        as_before()

        def full(*what: Any) -> None:
            raise OSError(28, "No space left on device", str(store))

        with monkeypatch.context() as patched:
            patched.setattr("visgraft.serve.store.write_json", full)
            no_change()
            as_before()
        store.rename(tmp_path / "gone")
        as_before()
        no_change()
        (tmp_path / "gone").rename(store)
        assert served.put("new", *files)[0] == 201


def test_uploads_last_as_long_as_their_store(adapters: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    files = [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]
    with running(tmp_path, {name: adapters[name] for name in ("sct", "full")}) as served:
        digests = {served.put(name, *files)[1]["digest"] for name in ("new", "full")}
    with running(tmp_path, {name: adapters[name] for name in ("sct", "full")}) as served:
        found = {one["name"]: one["digest"] for one in served.ask("GET", "/adapters")[1]["adapters"]}
        assert set(found) == {"sct", "full", "new"} and {found["new"], found["full"]} == digests
        for name in ("new", "full"):
            assert served.ask("DELETE", f"/adapters/{name}")[0] == 204
        assert len(list((tmp_path / UPLOADS).iterdir())) == 1
    write_state(tmp_path, {"sct": adapters["sct"]})
    assert not list((tmp_path / UPLOADS).iterdir()), "what no name leads to goes when a server starts"


def test_an_adapter_that_changes_while_it_is_read(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer bears a digest that is not its adapter's."""
    place = shutil.copytree(adapters["sct"], tmp_path / "zoo" / "sct")
    with running(tmp_path / "store", {"lora": adapters["lora"]}, adapters=str(tmp_path / "zoo")) as served:
        opened = served.server.bank.open

        def meanwhile(*what: Any) -> Any:
            for file in (CONFIG, TENSORS):
                shutil.copyfile(adapters["alore"] / file, place / file)
            return opened(*what)

        monkeypatch.setattr(served.server.bank, "open", meanwhile)
        status, found, _ = served.ask("PUT", "/adapters/new", json.dumps({"path": "sct"}))
        assert status == 422 and "has changed" in found["error"] and str(tmp_path) not in found["error"]
        assert served.ask("PUT", "/adapters/new", json.dumps({"path": "sct"}))[0] == 201


def test_another_process_starts_without_what_can_no_longer_be_read(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    for name in ("sct", "lora", "full"):
        shutil.copytree(adapters[name], tmp_path / "zoo" / name)
    zoo = {name: tmp_path / "zoo" / name for name in ("sct", "lora", "full")}
    write_state(tmp_path / "store", zoo)
    config = ServeConfig(str(tmp_path / "store"))
    shutil.rmtree(zoo["sct"])
    (zoo["lora"] / CONFIG).write_text((zoo["lora"] / CONFIG).read_text() + " ")
    with pytest.raises(AdapterError):
        make_app(config)
    server = make_app(config, strict=False).state.server
    assert list(server.hosting.adapters) == ["full"]
    server.close()
    shutil.rmtree(zoo["full"])
    with pytest.raises(VisgraftError, match="none of the adapters"):
        make_app(config, strict=False)


def test_a_full_disk_while_pictures_arrive(
    served: Running, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("starlette.datastructures.UploadFile.write", full)
        status, found, _ = served.send("/predict?adapter=sct", pictures[0])
        assert status == 507 and "no room" in found["error"]
    assert served.send("/predict?adapter=sct", pictures[0])[0] == 200


def test_no_program_is_run_for_a_picture(served: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
    status, found, _ = served.send("/predict?adapter=sct", ("x.eps", eps))
    assert status == 422 and "not a readable image" in found["error"]
    assert not (tmp_path / "ran").exists()
