"""What the server says of an adapter with several tasks, in each protocol, and how its page shows it."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, browser
from predicting import TASKS, make, make_tasks, pictures, shop
from serving import Running, running

from visgraft import predict_stream
from visgraft.serve.naming import NumberAnswer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shop: Path) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("server")
    numbers = make_tasks(root / "numbers", TASKS[1:2])
    named = {"shop": shop, "plain": make(root / "plain", "lora", classes="xyz"), "numbers": numbers}
    with running(root / "store", named) as found:
        yield found


def answers(shop: Path, picture: Path) -> Any:
    return next(iter(predict_stream([shop], [picture], top=3, threshold=0))).tasks


def test_predict_has_a_field_for_each_task(server: Running, shop: Path, pictures: list[Path]) -> None:
    found, plain = server.predict(pictures[0], "shop", "plain")
    assert "classes" not in found and "tasks" not in plain and len(plain["classes"]) == 3
    expected = answers(shop, pictures[0])
    assert list(found["tasks"]) == list(expected)
    for name, said in expected.items():
        told = found["tasks"][name]
        if isinstance(said, NumberAnswer):
            assert told == {"value": pytest.approx(said.value, abs=1e-3), "unit": "cm"}
        else:
            assert {one["label"]: one["score"] for one in told["classes"]} == pytest.approx(dict(said), abs=1e-5)


def test_adapters_tell_their_tasks(server: Running) -> None:
    _, listed, _ = server.ask("GET", "/adapters")
    by_name = {one["name"]: one for one in listed["adapters"]}
    assert "tasks" not in by_name["plain"]
    told = [
        (one["name"], one["kind"], one["unit"], one["first_output"], one["outputs"]) for one in by_name["shop"]["tasks"]
    ]
    assert told == [
        ("colour", "one_class", "", 0, 3),
        ("size", "number", "cm", 3, 1),
        ("tags", "several_classes", "", 4, 2),
    ]


def test_image_classification_ranks_the_classes_of_all_tasks(server: Running, shop: Path, pictures: list[Path]) -> None:
    expected = answers(shop, pictures[0])
    scores = {f"{task}={name}": p for task in ("colour", "tags") for name, p in expected[task]}
    content = pictures[0].read_bytes()
    _, found, _ = server.ask("POST", "/models/shop", content)
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    assert {one["label"]: one["score"] for one in found} == pytest.approx(scores, abs=1e-5)
    asked = {"inputs": base64.b64encode(content).decode(), "parameters": {"function_to_apply": "sigmoid", "top_k": 9}}
    _, found, _ = server.ask("POST", "/models/shop", json.dumps(asked), {"Content-Type": "application/json"})
    each = {one["label"]: one["score"] for one in found}
    assert len(each) == 5
    assert each["tags=ring"] == pytest.approx(scores["tags=ring"], abs=1e-5)
    assert each["colour=red"] != pytest.approx(scores["colour=red"], abs=1e-5)
    status, told, _ = server.ask("POST", "/models/numbers", content)
    assert status == 422 and "numbers only" in told["error"]


def test_open_inference_tells_tasks_and_a_label_of_each(server: Running, shop: Path, pictures: list[Path]) -> None:
    _, model, _ = server.ask("GET", "/v2/models/shop")
    assert [one["shape"] for one in model["outputs"]] == [[-1, 6], [-1, 6], [-1, 3]]
    assert [task["name"] for task in model["parameters"]["tasks"]] == ["colour", "size", "tags"]
    assert "parameters" not in server.ask("GET", "/v2/models/plain")[1]
    image = {"name": "image", "datatype": "BYTES", "shape": [2]}
    image["data"] = [base64.b64encode(one.read_bytes()).decode() for one in pictures[:2]]
    outputs = [{"name": "label"}, {"name": "probabilities"}, {"name": "logits", "parameters": {"classification": 6}}]
    status, found, _ = server.ask("POST", "/v2/models/shop/infer", json.dumps({"inputs": [image], "outputs": outputs}))
    assert status == 200, found
    label, probabilities, best = found["outputs"]
    assert label["shape"] == [2, 3] and probabilities["shape"] == [2, 6]
    for row, picture in enumerate(pictures[:2]):
        expected = answers(shop, picture)
        colour, size, tags = label["data"][3 * row : 3 * row + 3]
        assert colour == expected["colour"][0][0]
        assert float(size) == pytest.approx(expected["size"].value, abs=1e-2)
        assert tags == ";".join(name for name, p in expected["tags"] if p >= 0.5)
        assert probabilities["data"][6 * row + 3] == pytest.approx(expected["size"].value, abs=1e-3)
    assert best["shape"] == [2, 5] and not any(text.endswith(":3:size") for text in best["data"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_the_page_shows_each_task(server: Running, shop: Path, pictures: list[Path]) -> None:
    expected = answers(shop, pictures[0])
    with browser() as tab:
        assert tab.open(f"http://127.0.0.1:{server.port}/") == "ready"
        found = tab.choose(pictures[0])
        assert not found["error"], found

        def texts(selector: str) -> list[str]:
            return list(
                tab.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
            )

        assert texts(".answers details:first-child h4") == ["colour", "size", "tags"]
        (size,) = texts(".answers details:first-child .number")
        assert float(size.removesuffix(" cm")) == pytest.approx(expected["size"].value, abs=0.01)
        shown = texts(".answers details:first-child .shares .name")
        over = [name for name, p in expected["tags"] if p >= 0.5]
        assert shown == [*(name for name, _ in expected["colour"]), *over]
        assert f"shop: colour {expected['colour'][0][0]}, " in found["status"] and f"size {size}" in found["status"]
        assert texts("#adapters summary")[:2] == ["lora, 3 tasks", "lora, 3 classes"]
        tab.evaluate("document.querySelector('#adapters details').open = true; 0")
        assert "size: a number, 20 to 60 cm in training" in tab.evaluate(
            "document.querySelector('.labels').textContent"
        )
