"""The server: the answers of `predict` over HTTP, in every protocol, however they come and while adapters change."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import asyncio
import base64
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from predicting import CLASSES, adapters, make, pictures
from serving import Running, running, scores

import visgraft
from visgraft.adapters.directory import CONFIG, TENSORS

NAMES = {"sct": "sct", "alore": "deep/al ö", "lora": "lora", "linear": "linear"}


@pytest.fixture(scope="module")
def expected(adapters: dict[str, Path], pictures: list[Path]) -> dict[str, list[dict[str, float]]]:
    """What each adapter says of each picture by `predict`, by the name it is served under."""
    return {
        name: [dict(found) for found in visgraft.predict(visgraft.load(adapters[method]), pictures, top=3)]
        for method, name in NAMES.items()
    }


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    zoo = tmp_path_factory.mktemp("zoo")
    shutil.copytree(adapters["full"], zoo / "sub" / "full")
    named = {name: adapters[method] for method, name in NAMES.items()}
    with running(tmp_path_factory.mktemp("store"), named, adapters=str(zoo), max_batch=8) as found:
        yield found


def close(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found == pytest.approx(wanted, abs=1e-5)


def test_the_answers_are_those_of_predict(served: Running, expected: Any, pictures: list[Path]) -> None:
    status, found, _ = served.send("/predict?adapter=lora&adapter=deep/al%20%C3%B6&top=3", *pictures)
    assert status == 200 and set(found["milliseconds"]) == {"decode", "wait", "forward"}
    order = [(answer["image"], answer["adapter"]) for answer in found["answers"]]
    assert order == [(picture.name, name) for picture in pictures for name in ("lora", "deep/al ö")]
    for number, answer in enumerate(found["answers"]):
        close(scores(answer), expected[answer["adapter"]][number // 2])
        assert list(scores(answer).values()) == sorted(scores(answer).values(), reverse=True)
    assert len({answer["digest"] for answer in found["answers"]}) == 2


def test_many_at_once_each_with_its_own_adapter(served: Running, expected: Any, pictures: list[Path]) -> None:
    def one(number: int) -> None:
        name = list(NAMES.values())[number % 4]
        (answer,) = served.predict(pictures[number % 10], name)
        assert answer["adapter"] == name
        close(scores(answer), expected[name][number % 10])

    batches: list[int] = []
    observe = served.server.engine._observe
    served.server.engine._observe = lambda answered, adapter: batches.append(answered.batch)
    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(120)))
    finally:
        served.server.engine._observe = observe
    assert len(batches) == 120 and max(batches) <= 8
    assert max(batches) > 1, "requests of different adapters share a forward"


def test_a_picture_may_be_the_whole_body(served: Running, expected: Any, pictures: list[Path]) -> None:
    body = pictures[3].read_bytes()
    for kind in ("image/png", "application/x-www-form-urlencoded"):
        status, found, _ = served.ask("POST", "/predict?adapter=sct&top=3", body, {"Content-Type": kind})
        assert status == 200
        close(scores(found["answers"][0]), expected["sct"][3])


def test_a_broken_picture_fails_alone(served: Running, expected: Any, pictures: list[Path]) -> None:
    cut = ("cut.png", pictures[0].read_bytes()[:200])
    status, found, _ = served.send("/predict?adapter=sct&top=3", pictures[0], ("no.png", b"no"), cut, pictures[1])
    assert status == 200 and [("error" in one, one["image"]) for one in found["answers"]] == [
        (False, "00.png"), (True, "no.png"), (True, "cut.png"), (False, "01.png")
    ]  # fmt: skip
    close(scores(found["answers"][3]), expected["sct"][1])
    assert found["answers"][1]["error"].startswith("no.png is not a readable image")
    status, found, _ = served.send("/predict?adapter=sct", ("../../etc/no.png", b"no"), cut)
    assert status == 422 and len(found["answers"]) == 2 and found["error"].startswith("no.png is not")


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/predict?adapter=sst", 404, "there is no adapter 'sst'; did you mean sct?"),
        ("/predict", 400, "say which adapter"),
        ("/predict?adapter=sct&top=0", 422, "top: Input should be greater than or equal to 1"),
        ("/predict?adapter=sct&coverage=0.9", 422, "sct is not calibrated"),
        ("/predikt", 404, "Not Found"),
        ("/adapters/sct", 405, "Method Not Allowed"),
    ],
)
def test_what_is_asked_wrongly_is_named(path: str, status: int, words: str, served: Running, pictures: Any) -> None:
    found = served.send(path, pictures[0])
    assert found[0] == status and words in found[1]["error"]


def test_adapters_are_listed_with_what_is_known_of_them(served: Running, adapters: dict[str, Path]) -> None:
    _, found, _ = served.ask("GET", "/adapters")
    assert [one["name"] for one in found["adapters"]] == list(NAMES.values()) and found["backbone"] == "test_vit"
    assert found["limits"]["images"] == 64 and found["limits"]["answers"] == 512
    _, one, _ = served.ask("GET", f"/adapters/{quote('deep/al ö')}")
    assert one == found["adapters"][1] and one["classes"] == ["a", "b", "c"] and one["method"] == "alore"
    assert served.ask("GET", "/adapters/none")[0] == 404


# Protocols


def test_hugging_faces_client(served: Running, expected: Any, pictures: list[Path], adapters: dict[str, Path]) -> None:
    client = InferenceClient(model=f"http://127.0.0.1:{served.port}/models/{quote('deep/al ö')}")
    for image in (pictures[2].read_bytes(), pictures[2]):
        found = client.image_classification(image)
        close({one.label: one.score for one in found}, expected["deep/al ö"][2])
    assert [one.label for one in client.image_classification(pictures[2], top_k=2)] == list(expected["deep/al ö"][2])[
        :2
    ]
    adapted = visgraft.load(adapters["alore"])
    with torch.inference_mode():
        logits = adapted.model(adapted.transform(visgraft_open(pictures[2]))[None])[0]
    sigmoid = client.image_classification(pictures[2], function_to_apply="sigmoid")
    close({one.label: one.score for one in sigmoid}, dict(zip("abc", logits.sigmoid().tolist(), strict=True)))
    with pytest.raises(Exception, match="422"):
        client.image_classification(b"no picture")


def visgraft_open(path: Path) -> Any:
    from visgraft.data.decode import open_image

    return open_image(path)


def test_tritons_client(served: Running, expected: Any, pictures: list[Path], adapters: dict[str, Path]) -> None:
    import tritonclient.http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{served.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("lora")
    about = client.get_model_metadata("lora")
    assert [one["name"] for one in about["inputs"]] == ["image", "pixels"]
    encoded = np.array([picture.read_bytes() for picture in pictures[:3]], dtype=np.object_)
    prepared = torch.stack([visgraft.load(adapters["lora"]).transform(visgraft_open(p)) for p in pictures[:3]]).numpy()
    for binary in (True, False):
        for name, data, kind in (("image", encoded, "BYTES"), ("pixels", prepared, "FP32")):
            if name == "image" and not binary:
                continue  # this client writes bytes as text into JSON
            given = triton.InferInput(name, list(data.shape), kind)
            given.set_data_from_numpy(data, binary_data=binary)
            wanted = [
                triton.InferRequestedOutput("probabilities", binary_data=binary),
                triton.InferRequestedOutput("label", binary_data=binary),
            ]
            found = client.infer("lora", [given], outputs=wanted, request_id="7")
            assert found.get_response()["id"] == "7"
            for number, row in enumerate(found.as_numpy("probabilities")):
                close(dict(zip("xyz", row.tolist(), strict=True)), expected["lora"][number])
            labels = [x.decode() if isinstance(x, bytes) else x for x in found.as_numpy("label")]
            assert labels == [next(iter(expected["lora"][number])) for number in range(3)]
    given = triton.InferInput("image", [3], "BYTES")
    given.set_data_from_numpy(encoded)
    best = client.infer("lora", [given], outputs=[triton.InferRequestedOutput("probabilities", class_count=2)])
    value, _, label = best.as_numpy("probabilities")[0][0].decode().split(":")
    assert label == next(iter(expected["lora"][0])) and float(value) == pytest.approx(
        expected["lora"][0][label], abs=1e-5
    )
    with pytest.raises(triton.InferenceServerException, match="there is no adapter 'lor'"):
        client.infer("lor", [given])
    client.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[]", "the body must be a JSON object"),
        ({"inputs": 3}, "inputs must be a list of tensors"),
        ({"inputs": []}, "inputs must be image or pixels, not none"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["AAAA"]}]}, "has 1 pictures"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["ä"]}]}, "in base64"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}]}, "not a readable image"),
        ({"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [1]}]}, "192 numbers"),
        ({"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 1, 1, 1], "data": [1]}]}, "the images"),
        ({"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]}, "shape of whole numbers"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 9}}]}, "fit"),
    ],
)
def test_tensors_that_cannot_be_used_are_named(body: Any, words: str, served: Running) -> None:
    text = body if isinstance(body, bytes) else json.dumps(body)
    status, found, _ = served.ask("POST", "/v2/models/lora/infer", text)
    assert 400 <= status < 500 and words in found["error"]


# Adapters come and go


def test_an_adapter_is_added_replaced_and_removed(
    served: Running, expected: Any, adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    files = [(adapters[name] / file).read_bytes() for name in ("sct", "alore") for file in (CONFIG, TENSORS)]
    status, found, _ = served.put("new/one", *files[:2])
    assert status == 201 and found["name"] == "new/one" and found["method"] == "sct"
    close(scores(served.predict(pictures[0], "new/one")[0]), expected["sct"][0])
    status, replaced, _ = served.put("new/one", *files[2:])
    assert status == 200 and replaced["digest"] != found["digest"]
    (answer,) = served.predict(pictures[0], "new/one")
    close(scores(answer), expected["deep/al ö"][0])
    assert answer["digest"] == replaced["digest"]
    body = json.dumps({"path": "sub/full"})
    assert served.ask("PUT", "/adapters/new/one", body)[0] == 200
    full = dict(visgraft.predict(visgraft.load(adapters["full"]), pictures[:1], top=3)[0])
    close(scores(served.predict(pictures[0], "new/one")[0]), full)
    assert served.ask("DELETE", "/adapters/new/one")[0] == 204
    assert served.ask("DELETE", "/adapters/new/one")[0] == 404
    assert served.send("/predict?adapter=new/one", pictures[0])[0] == 404


def test_answers_are_those_of_one_adapter_while_it_is_swapped(
    served: Running, expected: Any, adapters: dict[str, Path], pictures: list[Path]
) -> None:
    """Whatever digest an answer bears, it is that adapter's answer."""
    files = {name: [(adapters[name] / file).read_bytes() for file in (CONFIG, TENSORS)] for name in ("sct", "alore")}
    digests = {served.put("swapped", *files[name])[1]["digest"]: NAMES[name] for name in ("sct", "alore")}
    wrong, seen, ending = list[Any](), set[str](), threading.Event()

    def ask(number: int) -> None:
        while not ending.is_set():
            number = (number + 1) % 10
            (answer,) = served.predict(pictures[number], "swapped")
            seen.add(answer["digest"])
            if scores(answer) != pytest.approx(expected[digests[answer["digest"]]][number], abs=1e-5):
                wrong.append((answer, number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for round in range(10):
        assert served.put("swapped", *files[("sct", "alore")[round % 2]])[0] == 200
    ending.set()
    for thread in threads:
        thread.join(30)
    assert not wrong and seen == set(digests)
    assert served.ask("DELETE", "/adapters/swapped")[0] == 204


def test_an_adapter_may_be_parked_or_pinned(
    adapters: dict[str, Path], expected: Any, pictures: list[Path], tmp_path: Path
) -> None:
    named = {name: adapters[name] for name in ("sct", "alore", "lora")}
    with running(tmp_path, named, capacity=1, pinned=("lora",)) as served:
        for name in ("sct", "alore", "lora", "sct"):
            close(scores(served.predict(pictures[0], name)[0]), expected[NAMES[name]][0])
        held = {name: one.adapter.held for name, one in served.server.hosting.adapters.items()}
        assert held["lora"].here is not None and held["lora"].parked is None
        assert held["alore"].here is None
        assert served.ask("GET", "/adapters/lora")[1]["pinned"]


def test_two_processes_see_the_same_adapters(
    adapters: dict[str, Path], expected: Any, pictures: list[Path], tmp_path: Path
) -> None:
    """Two applications on one store stand for two processes."""
    with running(tmp_path, {"sct": adapters["sct"]}) as first:
        from visgraft.serve.application import make_app
        from visgraft.serve.settings import ServeConfig

        other = make_app(ServeConfig(str(tmp_path))).state.server
        files = [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]
        digest = first.put("lora", *files)[1]["digest"]
        assert not asyncio.run(other.hosting.is_current())
        other.hosting.refresh()
        assert asyncio.run(other.hosting.is_current()) and other.hosting.get("lora").digest == digest
        other.hosting.remove("lora")
        assert first.send("/predict?adapter=lora", pictures[0])[0] == 404
        assert list(first.server.hosting.adapters) == ["sct"]
        status, found, _ = first.ask("DELETE", "/adapters/sct")
        assert status == 422 and "the last adapter" in found["error"]
        other.close()


# Operations


def test_ready_only_while_seeded_pictures_are_answered_as_ever(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visgraft.serve.server.CHECKED_FOR", 0.0)
    with running(tmp_path, {"lora": adapters["lora"]}) as served:
        assert served.ask("GET", "/v2/health/ready")[:2] == (200, {"ready": True})
        bank = served.server.bank
        plain = bank._ground.plain.patch_embed.proj.weight
        kept = plain.detach().clone()
        plain.data.mul_(-5.0)  # a kernel that computes wrongly from now on
        status, found, _ = served.ask("GET", "/v2/health/ready")
        assert status == 503 and "seeded picture" in found["error"]
        plain.data.copy_(kept)
        assert served.ask("GET", "/v2/health/ready")[0] == 200
        served.server.draining = True
        assert served.ask("GET", "/v2/health/ready")[0] == 503
        served.server.draining = False
        served.server.engine.close()
        assert served.ask("GET", "/v2/health/ready")[0] == 503 and served.ask("GET", "/v2/health/live")[0] == 200


def test_what_is_under_way_is_answered_before_the_end(
    adapters: dict[str, Path], expected: Any, pictures: list[Path], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running(tmp_path, {"sct": adapters["sct"]}) as served:
            engine = served.server.engine
            compute = engine._compute
            engine._compute = lambda *what: (time.sleep(0.5), compute(*what))[1]  # type: ignore[method-assign]
            answer = pool.submit(served.predict, pictures[0], "sct")
            while not engine.under_way:
                time.sleep(0.01)
        close(scores(answer.result()[0]), expected["sct"][0])


def test_figures_tell_of_requests_images_and_adapters(served: Running, pictures: list[Path]) -> None:
    served.send("/predict?adapter=linear", pictures[0], ("no.png", b"no"))
    text = served.ask("GET", "/metrics")[1].decode()
    for name in (
        'visgraft_requests_total{route="/predict",status="200"}', 'visgraft_answers_total{adapter="linear"}',
        'visgraft_stage_seconds_bucket{le="0.1",stage="forward"}', "visgraft_batch_images_count",
        "visgraft_broken_images_total", "visgraft_images_under_way 0.0",
    ):  # fmt: skip
        assert name in text, name


def test_a_request_leaves_one_line_without_pictures_or_names(
    served: Running, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    from visgraft.serve.metrics import JsonLines

    def lines() -> list[str]:
        records = [record for record in caplog.records if getattr(record, "facts", {}).get("images") == 2]
        return [JsonLines().format(record) for record in records]

    with caplog.at_level("INFO", "visgraft.serve"):
        served.send("/predict?adapter=linear", pictures[0], ("secret.png", b"no"))
        while not lines():  # it is written once the answer has been sent
            time.sleep(0.01)
    (line,) = lines()
    found = json.loads(line)
    assert (found["route"], found["status"], found["images"], found["broken"]) == ("/predict", 200, 2, 1)
    assert found["adapters"] == ["linear"] and "secret" not in line and "00.png" not in line


def test_figures_of_an_adapter_go_with_it(served: Running, adapters: dict[str, Path], pictures: list[Path]) -> None:
    counted = 'visgraft_adapter_seconds_total{adapter="passing",stage="wait"}', 'answers_total{adapter="passing"}'
    served.put("passing", *((adapters["sct"] / file).read_bytes() for file in (CONFIG, TENSORS)))
    served.predict(pictures[0], "passing")
    assert all(name in served.ask("GET", "/metrics")[1].decode() for name in counted)
    served.ask("DELETE", "/adapters/passing")
    assert "passing" not in served.ask("GET", "/metrics")[1].decode()


def test_heads_are_those_of_the_answers_without_their_bodies(served: Running) -> None:
    for path in ("/", "/v2/health/ready", "/adapters", "/v2/models/sct", "/v2/models/nobody"):
        status, content, headers = served.ask("HEAD", path)
        wanted = served.ask("GET", path)
        assert (status, content) == (wanted[0], b"")
        assert headers["content-length"] == wanted[2]["content-length"] and headers["content-type"]


def test_the_pages_are_served_under_a_strict_policy(served: Running) -> None:
    status, text, headers = served.ask("GET", "/")
    assert status == 200 and b"visgraft" in text and "default-src 'self'" in headers["content-security-policy"]
    for part in ("page.css", "page.js"):
        assert served.ask("GET", f"/page/{part}")[0] == 200
    assert served.ask("GET", "/page/../server.py")[0] == 404
    assert served.ask("GET", "/docs")[0] == 200 and served.ask("GET", "/docs/swagger-ui.css")[0] == 200
    document = json.loads(json.dumps(served.ask("GET", "/openapi.json")[1]))
    assert {"/predict", "/adapters", "/v2/models/{name}/infer", "/models/{name}"} <= set(document["paths"])
