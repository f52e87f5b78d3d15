"""The server behind Ray Serve: the answers of `predict` from every worker, whatever becomes of one of them."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from predicting import adapters, pictures
from serving import Running, running, scores
from test_cli import run

import visgraft
from visgraft import load, predict
from visgraft.adapters.directory import CONFIG, TENSORS
from visgraft.serve.keeper import Keeper, KeptStore, Sent
from visgraft.serve.metrics import labelled
from visgraft.serve.store import FolderStore, LastAdapterError, StoreLostError, digest_of


def refused(*words: Any) -> str:
    code, out, err = run("serve", *words)
    assert code == 1 and out == "" and err.count("\n") == 1, (code, out, err)
    return err


def test_options_that_have_no_effect_are_refused(adapters: dict[str, Path]) -> None:
    assert "--on is 'here', but must be processes, ray or" in refused(adapters["sct"], "--on", "here")
    assert "did you mean ray?" in refused(adapters["sct"], "--on", "rya")
    assert "--cpus-per-worker has an effect with --on ray only" in refused(adapters["sct"], "--cpus-per-worker", 2)


def test_without_ray_serve_the_extra_is_named(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert "pip install 'visgraft[serve-cluster]'" in refused(adapters["sct"], "--on", "ray")


def test_figures_of_workers_bear_their_name() -> None:
    text = b'# HELP a_total A\n# TYPE a_total counter\na_total{x="1"} 2.0\n'
    found = labelled({"one": text, "two": text.replace(b"2.0", b"5.0")}).decode()
    assert 'a_total{worker="one",x="1"} 2.0' in found and 'a_total{worker="two",x="1"} 5.0' in found
    assert found.count("# TYPE a_total counter") == 1


class Direct:
    """An actor's handle whose calls are made at once."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self.keeper, name))})


def test_a_change_of_somebody_else_is_never_taken_for_seen(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visgraft.serve.keeper.answer_of", lambda answer, seconds=0: answer)
    monkeypatch.setattr("ray.get_runtime_context", type("Node", (), {"get_node_id": lambda self: "0" * 20}))
    sent = {name: Sent.of(adapters[name], digest_of(adapters[name])) for name in ("sct", "lora")}
    keeper = Keeper(str(tmp_path / "store"))
    keeper.begin({"sct": sent["sct"]})
    one, two = (KeptStore(Direct(keeper), tmp_path / name) for name in ("one", "two"))
    marks = one.mark(), two.mark()
    assert marks[0] == marks[1] and {name: facts["digest"] for name, facts in one.read().items()} == keeper.read()
    first = one.put("a", adapters["lora"], sent["lora"].digest, keep=True)
    assert first == keeper.mark()
    assert two.put("b", adapters["lora"], sent["lora"].digest, keep=True) == marks[1] != keeper.mark()
    two.mark()
    found = two.read()
    assert set(found) == {"sct", "a", "b"} and digest_of(found["a"]["path"]) == sent["lora"].digest
    again = Keeper(str(tmp_path / "store"))  # as Ray starts it again
    assert set(again.read()) == {"sct", "a", "b"}
    again.begin({"lora": sent["lora"]})
    assert set(again.read()) == {"lora", "a", "b"}, "uploads last as long as the folder, arguments do not"
    for name in ("lora", "a"):
        again.remove(name)
    with pytest.raises(LastAdapterError):
        again.remove("b")


def test_a_keeper_without_an_answer_is_told_and_asked_again(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]

    def lost(*given: Any, **options: Any) -> Any:
        raise StoreLostError("the keeper of the adapters does not answer (ActorDiedError); try again")

    with running(tmp_path / "store", {"sct": adapters["sct"]}) as server:

        def names() -> set[str]:
            return {one["name"] for one in server.ask("GET", "/adapters")[1]["adapters"]}

        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "put", lost)
            status, told, headers = server.put("lora", *files)
            assert (status, headers["retry-after"]) == (503, "5") and "see in GET /adapters" in told["error"]
        FolderStore(tmp_path / "store").put("other", adapters["lora"], digest_of(adapters["lora"]), keep=False)
        with monkeypatch.context() as patch:
            patch.setattr(FolderStore, "read", lost)
            assert names() == {"sct"}
        assert names() == {"sct", "other"}, "what changed meanwhile is seen once it can be asked"
        assert server.put("lora", *files)[0] == 201


class Served(Running):
    """A command that serves on a cluster, and its workers."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        super().__init__(None, port)  # type: ignore[arg-type]
        self.process, self.log = process, log

    def until(self, seen: Callable[[], Any], seconds: float = 120) -> Any:
        """Wait for something."""
        end = time.monotonic() + seconds
        while not (found := seen()):
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        return found

    def workers(self) -> set[str]:
        """Return the names of the workers that tell figures."""
        return set(re.findall(r'visgraft_adapters{worker="(\w+)"} [1-9]', self.ask("GET", "/metrics")[1].decode()))


def start(*words: Any, log: Path) -> Served:
    command = [sys.executable, "-m", "visgraft", "serve", *map(str, words), "--port", "0", "--on", "ray"]
    env = {**os.environ, "PYTHONPATH": str(Path(visgraft.__file__).parents[1])}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=env)
    assert process.stdout is not None
    told = re.findall(r":(\d+)(?: of [\d.]+)?,", process.stdout.readline())
    assert told, log.read_text()
    return Served(process, int(told[0]), log)


@pytest.fixture(scope="module")
def served(cluster: Any, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers on a cluster, answering."""
    log = tmp_path_factory.mktemp("log") / "log"
    found = start(adapters["sct"], "--workers", 2, "--max-images", 64, log=log)
    try:
        found.until(lambda: "2 workers answer" in log.read_text())
        yield found
    finally:
        found.process.terminate()
        found.process.wait(60)


@pytest.mark.long
def test_what_a_cluster_cannot_serve_is_refused(cluster: Any, adapters: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = adapters["sct"], "--on", "ray", "--port", taken.getsockname()[1]
        assert "cannot be listened on (Address already in use); choose another --host or --port" in refused(*words)
    assert "has room for 2 of 3 workers with 1 cores" in refused(adapters["sct"], "--on", "ray", "--workers", 3)
    code, _, err = run("serve", adapters["sct"], "--on", "ray", "--port", 0, "--weights", "/nowhere/a.safetensors")
    assert code == 1 and "the weights file /nowhere/a.safetensors does not exist" in err


def processes(name: str) -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [one for one in found if name in " ".join(one.cmdline())]


@pytest.mark.long
def test_a_keeper_that_dies_again_and_again_loses_no_change_and_no_answer(
    served: Served, adapters: dict[str, Path], pictures: list[Path]
) -> None:
    files = [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]
    stop, seen = threading.Event(), list[int]()

    def ask() -> None:
        while not stop.is_set():
            seen.append(served.send("/predict?adapter=sct", pictures[0])[0])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for number in range(6):
            (keeper,) = served.until(lambda: processes("ray::Keeper"))
            deadly = threading.Timer(0.03 * number, keeper.kill)
            deadly.start()
            assert served.put("up", *files)[0] == 201
            assert served.ask("DELETE", "/adapters/up")[0] == 204
            deadly.join()
            keeper.wait(30)
            assert served.put("up", *files)[0] == 201 and served.predict(pictures[0], "up")
            assert served.ask("DELETE", "/adapters/up")[0] == 204
    finally:
        stop.set()
        asking.join(60)
    assert set(seen) == {200}


@pytest.mark.long
def test_workers_answer_as_predict_and_one_that_dies_comes_back(
    served: Served, adapters: dict[str, Path], pictures: list[Path]
) -> None:
    expected = {name: dict(predict(load(adapters[name]), pictures[:1], top=3)[0]) for name in ("sct", "lora")}

    def answers(name: str) -> bool:
        return scores(served.predict(pictures[0], name)[0]) == pytest.approx(expected[name], abs=1e-5)

    assert answers("sct") and served.ask("GET", "/v2/health/ready")[0] == 200
    assert "answers on this cluster already; end it first" in refused(adapters["sct"], "--on", "ray", "--port", 0)
    files = [(adapters["lora"] / file).read_bytes() for file in (CONFIG, TENSORS)]
    assert served.put("lora", *files)[0] == 201
    assert all(answers("lora") for _ in range(20)), "whoever is asked has it"
    first = served.until(lambda: len(found := served.workers()) == 2 and found)

    victim, other = processes("ray::ServeReplica:visgraft")
    victim.kill()
    served.until(lambda: answers("lora") and len(served.workers() - first) == 1)
    other.kill()  # so that only the new one can answer
    other.wait(30)
    served.until(lambda: served.send("/predict?adapter=lora", pictures[0])[0] == 200)
    assert answers("lora") and answers("sct")
    assert served.ask("DELETE", "/adapters/sct")[0] == 204
    assert {served.send("/predict?adapter=sct", pictures[0])[0] for _ in range(10)} == {404}
    assert served.ask("DELETE", "/adapters/lora")[0] == 422


@pytest.mark.long
def test_what_is_under_way_is_answered_before_it_ends(served: Served, pictures: list[Path]) -> None:
    content = pictures[0].read_bytes()
    served.until(lambda: served.send("/predict", pictures[0])[0] == 200)
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
        slow.sendall(f"Content-Length: {len(content)}\r\n\r\n".encode() + content[:100])
        time.sleep(1)
        served.process.send_signal(signal.SIGTERM)
        served.until(lambda: "ending, once what is under way" in served.log.read_text())
        time.sleep(2)
        slow.sendall(content[100:])
        status = slow.recv(1000).split(b"\r\n")[0]
    assert status == b"HTTP/1.1 200 OK"
    assert served.process.wait(60) == 0
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    assert [line["level"] for line in lines] == ["info"] * len(lines)
    with pytest.raises(OSError):
        served.ask("GET", "/")
