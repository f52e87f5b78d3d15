"""Requests drawn from the OpenAPI document, as it says and against it: never an error of the server's own."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import base64
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, strategies
from predicting import adapters, pictures
from schemathesis import GenerationMode
from serving import Running, running, scores

import visgraft

MANY = 1300
"""Requests for each of the eight routes that take something: ten thousand."""


def damaged(picture: bytes, place: float, other: bytes, shorter: bool) -> bytes:
    """Return a picture in which something else stands, or which ends there."""
    at = int(place * len(picture))
    return picture[:at] + other + (b"" if shorter else picture[at + len(other) :])


@pytest.fixture(scope="module")
def served(
    adapters: dict[str, Path], pictures: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    zoo = tmp_path_factory.mktemp("zoo")
    shutil.copytree(adapters["lora"], zoo / "lora")
    whole = strategies.sampled_from([picture.read_bytes() for picture in pictures])
    sent = whole | strategies.builds(
        damaged, whole, strategies.floats(0, 1), strategies.binary(), strategies.booleans()
    )
    schemathesis.openapi.media_type("image/*", sent | strategies.binary())
    schemathesis.openapi.format("byte", sent.map(base64.b64encode).map(bytes.decode))
    schemathesis.openapi.format("binary", sent)
    with running(tmp_path_factory.mktemp("store"), {"sct": adapters["sct"]}, adapters=str(zoo)) as found:
        yield found


@pytest.mark.parametrize("requests", [6, pytest.param(MANY, marks=pytest.mark.long)])
def test_no_request_makes_the_server_fail(
    requests: int, served: Running, adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    document = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json")
    asked: Counter[tuple[str, int]] = Counter()
    for result in document.get_all_operations():
        operation = result.ok()
        drawn = [
            operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        ]

        @hypothesis.settings(
            max_examples=requests, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(case=strategies.one_of(drawn), known=strategies.booleans())
        def ask(case: schemathesis.Case, known: bool) -> None:
            if known and "name" in case.path_parameters:
                case.path_parameters["name"] = "guest" if case.method in ("PUT", "DELETE") else "sct"
            elif known and isinstance(case.query, dict):
                case.query["adapter"] = "sct"
            if known and isinstance(case.body, dict) and "path" in case.body:
                case.body["path"] = "lora"
            reply = case.call()
            asked[operation.label, reply.status_code] += 1  # noqa: B023 - called in the loop
            text = reply.content.decode("utf-8", "replace")
            assert reply.status_code < 500, (case.as_curl_command(), text)
            assert "Traceback" not in text and str(tmp_path.parent) not in text

        ask()
    print(f"{sum(asked.values()):,} requests:", *(f"{label} {code}: {n}" for (label, code), n in sorted(asked.items())))
    assert len({label for label, _ in asked}) >= 12
    (answer,) = served.predict(pictures[0], "sct")
    wanted = dict(visgraft.predict(visgraft.load(adapters["sct"]), pictures[:1], top=3)[0])
    assert scores(answer) == pytest.approx(wanted, abs=1e-5), "it answers as before"
