"""The verb `serve`: what it is told, what it refuses before anything is loaded, and its processes."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from predicting import adapters, make, pictures
from serving import Running, scores
from test_cli import run

from visgraft import Backbone, load, predict
from visgraft.adapters.directory import CONFIG, TENSORS
from visgraft.cli.serve import name_adapters
from visgraft.serve.settings import ServeConfig


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served, in place of serving it."""
    found: list[Any] = []
    monkeypatch.setattr("visgraft.serve.run.serve", lambda *what: found.append(what))
    return found


def refused(*words: Any) -> str:
    code, out, err = run("serve", *words)
    assert code == 1 and out == "" and err.count("\n") == 1, (code, out, err)
    return err


def test_options_reach_the_server(adapters: dict[str, Path], tmp_path: Path, started: list[Any]) -> None:
    shutil.copytree(adapters["lora"], tmp_path / "zoo" / "a" / "b")
    (tmp_path / "tokens").write_text("one\n\n two \n")
    words = ["--adapters", tmp_path / "zoo", "--port", 0, "--token-file", tmp_path / "tokens", "--capacity", 3]
    words += ["--pin", "a/b", "--max-body-mb", 1, "--max-megapixels", 2, "--workers", 2, "--store", tmp_path / "store"]
    code, out, err = run("serve", adapters["sct"], *words)
    assert code == 0, err
    ((named, options, _, workers),) = started
    assert named == {"a/b": str(tmp_path / "zoo" / "a" / "b"), "sct": str(adapters["sct"])} and workers == 2
    config = ServeConfig.from_json(ServeConfig(**options).to_json())
    assert config == ServeConfig(**options)
    assert config.tokens == ("one", "two") and config.pinned == ("a/b",) and config.max_body == 2**20
    assert config.max_pixels == 2_000_000 and config.capacity == 3 and config.hosts and config.threads
    assert re.match(r"2 adapters at http://127\.0\.0\.1:\d+, as soon as they are loaded\n$", out)


def test_what_cannot_be_served_is_refused(adapters: dict[str, Path], tmp_path: Path, started: list[Any]) -> None:
    assert "no adapter is given" in refused()
    assert "is not an adapter" in refused(tmp_path)
    other = shutil.copytree(adapters["sct"], tmp_path / "other" / "sct")
    assert "would both be called sct" in refused(adapters["sct"], other)
    assert "--pin sst: there is no adapter of this name; did you mean sct?" in refused(adapters["sct"], "--pin", "sst")
    assert "can be reached by others; pass --token-file" in refused(adapters["sct"], "--host", "0.0.0.0")
    (tmp_path / "empty").write_text("\n")
    assert "must hold a token on each line" in refused(adapters["sct"], "--token-file", tmp_path / "empty")
    assert "cannot be read" in refused(adapters["sct"], "--token-file", tmp_path / "nowhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be listened on (Address already in use)" in refused(
            adapters["sct"], "--port", taken.getsockname()[1]
        )
    large = make(tmp_path / "large", "lora", Backbone("test_vit", "none", 64))
    assert "are not of one backbone: image size" in refused(adapters["sct"], large)
    assert started == []


def test_without_the_extra_it_says_what_to_install(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgraft.serve.extra.NEEDED", ("no_such_package",))
    assert "pip install 'visgraft[serve]'" in refused(adapters["sct"])


def test_names_are_those_of_folders(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapters["sct"])
    assert list(name_adapters(["."], None, [])) == ["sct"]


@pytest.mark.long
def test_a_server_that_is_told_to_end_has_not_failed(adapters: dict[str, Path], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "visgraft", "serve", str(adapters["sct"]), "--port", "0", "--host", "127.0.0.2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    port, until = int(re.findall(r":(\d+),", process.stdout.readline())[0]), time.monotonic() + 120
    while "Application startup complete" not in (tmp_path / "log").read_text():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.2)
    assert urlopen(f"http://127.0.0.2:{port}/v2/health/ready").status == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "interrupted" not in (tmp_path / "log").read_text()


@pytest.mark.long
def test_a_process_that_dies_is_started_again_with_the_adapters_as_they_are(
    adapters: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "visgraft", "serve", str(adapters["sct"]), "--port", "0", "--workers", "2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        port = int(re.findall(r":(\d+),", process.stdout.readline())[0])
        served = Running(None, port)  # type: ignore[arg-type]
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                if urlopen(f"http://127.0.0.1:{port}/v2/health/ready").status == 200:
                    break
            except OSError:
                time.sleep(0.2)
        files = [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]
        assert served.put("added", *files)[0] == 201
        expected = dict(predict(load(adapters["lora"]), pictures[:1], top=3)[0])

        def workers() -> list[psutil.Process]:
            found = psutil.Process(process.pid).children()
            return [one for one in found if any("spawn_main" in word for word in one.cmdline())]

        first = workers()
        assert len(first) == 2
        first[0].kill()
        first[0].wait(30)
        while len(alive := [one for one in workers() if one.is_running() and one.status() != "zombie"]) < 2:
            assert time.monotonic() < until + 60
            time.sleep(0.2)
            assert scores(served.predict(pictures[0], "added")[0]) == pytest.approx(expected, abs=1e-5)
        assert first[0].pid not in {one.pid for one in alive}
        first[1].kill()  # so that only the new one can answer
        answered = False
        while not answered and time.monotonic() < until + 120:
            try:
                answered = scores(served.predict(pictures[0], "added")[0]) == pytest.approx(expected, abs=1e-5)
            except OSError:
                time.sleep(0.2)
        assert answered
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_benchmark_with_a_core_apart_asks_for_two_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "serve.py"))["shares"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 4}, raising=False)
    assert shares(True) == ({4}, {1, 3})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    with pytest.raises(SystemExit, match="--apart takes two cores"):
        shares(True)
    own, others = shares(False)
    assert own == others
