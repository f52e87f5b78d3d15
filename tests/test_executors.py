"""Jobs here, in processes and on a cluster of two nodes: the same answers, also where a node is lost."""

import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from visgraft.bench.ledger import read_file
from visgraft.bench.plan import plan
from visgraft.bench.running import TrialSources
from visgraft.bench.sweep import State, sweep
from visgraft.bench.trial import Result
from visgraft.errors import VisgraftError
from visgraft.executors.choosing import choose_executor
from visgraft.executors.here import Here
from visgraft.executors.job import Event, Executor, Job, Note
from visgraft.executors.on_ray import OnRay, _loss_told, _nodes
from visgraft.executors.processes import Processes


def square(number: int, note: Note) -> int:
    note("half way")
    if number == 3:
        raise VisgraftError("three is refused")
    if number == 4:
        raise ZeroDivisionError("four")
    return number * number


def once(folder: Path, seconds: float, note: Note) -> str:
    """Leave a mark and wait; the second time there is a mark already."""
    mark = folder / "mark"
    if mark.exists():
        return "again"
    mark.write_text("")
    note("waiting")
    time.sleep(seconds)
    return "first"


def leave(note: Note) -> None:
    os._exit(7)


def place(note: Note) -> int:
    return os.getpid()


def ran(executor: Executor, *works: Any) -> list[Event]:
    jobs, events = [Job(str(number), f"job {number}", work) for number, work in enumerate(works)], list[Event]()
    executor.run(lambda: jobs.pop(0) if jobs else None, events.append)
    return events


@pytest.mark.parametrize("kind", ["here", "processes", "ray"])
def test_jobs_end_alike_wherever_they_run(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("cluster")
    executor = choose_executor(kind, None if kind == "here" else 2)
    assert isinstance(executor, {"here": Here, "processes": Processes, "ray": OnRay}[kind])
    assert executor.places == (1 if kind == "here" else 2)
    events = ran(executor, *(partial(square, number) for number in range(1, 5)))
    for key, ended in {
        "0": ("done", 1), "1": ("done", 4), "2": ("failed", "job 2: three is refused"),
        "3": ("failed", "job 3: ZeroDivisionError: four"),
    }.items():  # fmt: skip
        mine = [(event.kind, event.value) for event in events if event.key == key]
        assert (
            mine[-1] == ended and [kind for kind, _ in mine].count("done") + [k for k, _ in mine].count("failed") == 1
        )
        assert {kind for kind, _ in mine[:-1]} <= {"started", "note"}
    if kind != "ray":
        assert Event("0", "note", "half way") in events and Event("0", "started", "") in events


def test_a_job_whose_process_ends_is_told_and_takes_no_other() -> None:
    events = ran(Processes(2), leave, partial(square, 2))
    ended = {event.key: event.value for event in events if event.kind in ("done", "failed")}
    assert ended["1"] == 4 and "ended with code 7" in ended["0"]


@pytest.mark.parametrize("kind", ["processes", pytest.param("ray", marks=pytest.mark.long)])
def test_a_process_is_kept_for_the_next_job_where_that_is_asked_for(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("cluster")

    def places(fresh: bool) -> set[int]:
        executor = choose_executor(kind, 1, fresh=fresh)
        return {event.value for event in ran(executor, *[place] * 4) if event.kind == "done"}

    assert len(places(fresh=True)) == 4
    kept = len(places(fresh=False))
    assert kept == 1 if kind == "processes" else kept < 4  # Ray gives a job to any process that it has


def test_a_process_that_ends_is_replaced_where_processes_are_kept() -> None:
    events = ran(Processes(1, fresh=False), partial(square, 2), leave, partial(square, 5))
    ended = [event for event in events if event.kind in ("done", "failed")]
    assert [event.value for event in ended if event.kind == "done"] == [4, 25]
    assert "ended with code 7; if memory ran out, lower --workers or the batch size" in ended[1].value


def test_what_tell_raises_ends_all_jobs(tmp_path: Path) -> None:
    def tell(event: Event) -> None:
        if event.kind == "note":
            raise KeyboardInterrupt

    jobs = [Job("a", "a", partial(once, tmp_path, 60.0))]
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Processes(1).run(lambda: jobs.pop() if jobs else None, tell)
    assert time.monotonic() - begin < 50


def test_a_lost_node_gives_its_job_to_another(cluster: Any, tmp_path: Path) -> None:
    (node,) = [one for one in cluster.list_all_nodes() if one is not cluster.head_node]
    jobs, events = [Job("a", "a", partial(once, tmp_path, 300.0))], list[Event]()

    def tell(event: Event) -> None:
        events.append(event)
        if event.kind == "note" and event.value == "waiting":
            cluster.add_node(num_cpus=2)
            cluster.remove_node(node, allow_graceful=False)

    OnRay().run(lambda: jobs.pop() if jobs else None, tell)
    kinds = [event.kind for event in events]
    assert kinds.count("again") == 1 and events[-1] == Event("a", "done", "again")
    places = [event.value for event in events if event.kind == "started"]
    assert len(set(places)) == len(places)


def test_a_job_that_ends_its_process_again_and_again_fails(cluster: Any) -> None:
    events = ran(OnRay(most=1), leave)
    assert [event.kind for event in events if event.kind != "started"] == ["again"] * 3 + ["failed"]
    assert "job 0: lost 4 times" in events[-1].value


def test_a_job_larger_than_every_node_is_refused(cluster: Any) -> None:
    with pytest.raises(VisgraftError, match=r"no node of the cluster has 64 cores.*lower --cpus-per-trial"):
        OnRay(cpus=64)
    with pytest.raises(VisgraftError, match="lower --cpus-per-trial or --gpus-per-trial"):
        OnRay(gpus=0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on": "rya"}, "--on is 'rya', but must be here, processes, ray or ray://HOST:PORT; did you mean ray?"),
        ({"on": ""}, "--on is '', but must be here, processes, ray or ray://HOST:PORT"),
        ({"on": "Ray"}, "--on is 'Ray', but must be here, processes, ray or ray://HOST:PORT; did you mean ray?"),
        ({"on": "ray:/host:1"}, "--on is 'ray:/host:1', but must be here, processes, ray or ray://HOST:PORT"),
        *(
            ({"on": address}, f"--on is {address!r}, but must be ray://HOST:PORT, where Ray's client is answered")
            for address in (
                "ray://",
                "ray://host",
                "ray://host:",
                "ray://:1",
                "ray://host:port",
                "ray://host:0",
                "ray://host:65536",
                "ray://me@host:1",
                "ray://host:1/",
                "ray://host:1 ",
                "ray://::1",
                "ray://[::1]",
            )
        ),
        ({"on": "RAY://127.0.0.1:1"}, "no Ray cluster answers at ray://127.0.0.1:1 (Connection refused); check --on"),
        ({"on": "here", "workers": 2}, "--workers 2 has no effect with --on here"),
        ({"on": "processes", "workers": 0}, "--workers is 0, but must be 1 or more"),
        ({"cpus": 2}, "--cpus-per-trial has an effect with --on ray only"),
        ({"on": "here", "gpus": 0.5}, "--gpus-per-trial has an effect with --on ray only"),
        ({"on": "ray", "gpus": 1.5}, "--gpus-per-trial is 1.5, but must be 0, from 0.0001 to 1, or a whole number"),
        *(
            ({"on": "ray", "gpus": gpus}, f"--gpus-per-trial is {gpus:g}, but must be 0, from 0.0001 to 1, or a whole")
            for gpus in (-1.0, 1e-9, float("nan"), float("inf"))
        ),
        ({"on": "ray", "cpus": 0}, "--cpus-per-trial is 0, but must be 1 or more"),
    ],
)
def test_a_choice_that_cannot_be_is_one_line(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by a test before
    with pytest.raises(VisgraftError) as error:
        choose_executor(**options)
    assert said in str(error.value)


def test_an_address_in_the_environment_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for address, said in {
        "ray://host": "RAY_ADDRESS is 'ray://host', but must be ray://HOST:PORT",
        "127.0.0.1:1": "no Ray cluster answers at 127.0.0.1:1 (Connection refused); check RAY_ADDRESS",
    }.items():
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(VisgraftError) as error:
            choose_executor("ray")
        assert str(error.value).startswith(said)


def test_a_token_that_is_missing_is_one_line(tmp_path: Path) -> None:
    if not hasattr(ray.exceptions, "AuthenticationError"):
        pytest.skip("this version of Ray knows no tokens")
    code = "from visgraft.executors.choosing import choose_executor; choose_executor('ray')"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{taken.getsockname()[1]}", "RAY_AUTH_MODE": "token"}
        env |= {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    line = done.stderr.splitlines()[-1]
    assert "no Ray cluster answers at 127.0.0.1:" in line and "is set but file cannot be opened or is empty" in line
    assert line.endswith(
        "check RAY_ADDRESS, and, where the cluster wants a token, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH"
    )


def test_a_cluster_that_cannot_be_reached_any_more_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    grpc = pytest.importorskip("grpc")

    class Cut(grpc.RpcError):  # type: ignore[misc,name-defined]
        def details(self) -> str:
            return "Stream removed"

    for raised, why in (ConnectionError("Client is shut down. Last exception:\n<>"), "Client is shut down"), (
        Cut(), "Stream removed",
    ):  # fmt: skip

        def nodes(error: Exception = raised) -> Any:
            raise error

        monkeypatch.setattr("ray.nodes", nodes)
        with pytest.raises(VisgraftError) as error:
            _nodes()
        assert str(error.value) == (
            f"the Ray cluster cannot be reached any more ({why}); once it can, give the same command again"
        )
    with pytest.raises(BrokenPipeError), _loss_told():  # of whoever reads what the command prints
        raise BrokenPipeError(32, "Broken pipe")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgraft.executors.on_ray.find_spec", lambda name: None)
    with pytest.raises(VisgraftError, match=r"pip install 'visgraft\[cluster\]'"):
        choose_executor("ray")


def told(result: Result) -> tuple[Any, ...]:
    """All that a line says of what was computed: neither when nor how long, nor on which machine."""
    chosen = {name: value for name, value in result.selection.items() if "seconds" not in name}
    return result.trial, result.outcome, result.measured, chosen, result.epochs, result.learned_top1, result.channels


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    from test_bench import draw_colours

    return draw_colours(tmp_path / "tiny")


def test_a_sweep_that_loses_a_node_has_the_lines_of_one_in_this_process(
    cluster: Any, tiny: Path, tmp_path: Path
) -> None:
    from test_bench import PROTOCOL, request

    cells, place = plan(request(tiny, methods=("linear", "sct"))), TrialSources(PROTOCOL, tiny)
    sweep(cells, place, tmp_path / "here.jsonl", Here())
    node, states = cluster.add_node(num_cpus=2), list[State]()
    killed = False

    def change(state: State) -> None:
        nonlocal killed
        states.append(state)
        if not killed and any(place == node.node_id for place in state.nodes.values()):
            killed = True
            cluster.remove_node(node, allow_graceful=False)

    state = sweep(cells, place, tmp_path / "ray.jsonl", OnRay(fresh=False), on_change=change)
    assert killed and not state.failed and not state.left
    lines = [
        {result.trial.key: told(result) for result in read_file(tmp_path / f"{name}.jsonl")} for name in ("here", "ray")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6
