"""Jobs on a Ray cluster: each with the cores and the share of a GPU it asks for, and again where its node is lost."""

import contextlib
import logging
import os
import queue
import re
import socket
import sys
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import floor
from pathlib import Path
from typing import Any

from visgraft.errors import VisgraftError
from visgraft.executors.job import Event, Job, NextJob, TellEvent, outcome

SECONDS = 0.5
"""Between two looks at what the jobs told."""
REACHED_SECONDS = 20.0
"""In which a cluster's machine must take a connection."""
LOST = 3
"""So often a job is started again before it has failed."""


@dataclass(frozen=True)
class OnRay:
    """Runs as many jobs at a time as fit into a cluster.

    Args:
        address: `ray://HOST:PORT`; None: that in RAY_ADDRESS, a cluster that runs on this machine, or a new one on it.
        cpus: cores that each job has.
        gpus: GPUs that each job has, a fraction where several share one; None: what the job says, or one where the
            cluster has any.
        most: jobs at a time at most; None: as many as fit.
        fresh: give each job a process of its own, so that its peak of memory is its own too; otherwise a process takes
            one job after another, which spares it the seconds in which torch is imported, and keeps what it has loaded.
        each: what the options --cpus-per-… and --gpus-per-… of the verb are called after.

    Raises:
        VisgraftError: Ray is not installed, or no such cluster answers.
    """

    address: str | None = None
    cpus: int = 1
    gpus: float | None = None
    most: int | None = None
    fresh: bool = True
    each: str = "trial"

    def __post_init__(self) -> None:
        check_installed()
        connect(self.address)
        if not self._fits():
            held = ", ".join(f"{_sum(node, 'CPU'):g} cores and {_sum(node, 'GPU'):g} GPUs" for node in _nodes())
            cores, cards = f"--cpus-per-{self.each}", f"--gpus-per-{self.each}"
            raise VisgraftError(
                f"no node of the cluster has {self.cpus} cores and {self._gpus:g} GPUs for a job (there are {held}); "
                f"lower {cores} or {cards}"
            )

    @property
    def _gpus(self) -> float:
        return (1.0 if any(_sum(node, "GPU") for node in _nodes()) else 0.0) if self.gpus is None else self.gpus

    def _fits(self) -> int:
        gpus, found = self._gpus, 0
        for node in _nodes():
            by_gpu = floor(_sum(node, "GPU") / gpus + 1e-9) if gpus else 1 << 30
            found += min(floor(_sum(node, "CPU") / self.cpus), by_gpu)
        return found

    @property
    def share(self) -> dict[str, Any]:
        """What Ray is asked for each job."""
        return {"num_cpus": self.cpus, "num_gpus": self._gpus}

    @property
    def places(self) -> int:
        """See `Executor`: nodes may come and go."""
        return min(max(self._fits(), 1), self.most or 1 << 30)

    def _share(self, job: Job) -> float:
        """Return the GPUs that a job has."""
        whole = self._gpus
        return job.gpus if whole and self.gpus is None and job.gpus is not None else whole

    def _room(self, live: Collection[Job]) -> bool:
        """Whether a further job may find room now; one at most waits for it."""
        nodes, used = _nodes(), sum(map(self._share, live))
        gpus = sum(_sum(node, "GPU") for node in nodes)
        enough = (len(live) + 1) * self.cpus <= sum(_sum(node, "CPU") for node in nodes)
        return not live or (enough and (not used or used < gpus - 1e-9) and len(live) < (self.most or 1 << 30))

    def run(self, next_job: NextJob, tell: TellEvent) -> None:
        """See `Executor`.

        Raises:
            VisgraftError: the cluster is lost.
        """
        import ray
        from ray.util.queue import Queue

        remote = ray.remote(num_cpus=self.cpus, max_retries=0, max_calls=1 if self.fresh else 0)(_work)
        live: dict[Any, Job] = {}
        lost, waiting = Counter[str](), deque[Job]()
        with _loss_told():
            notes = Queue(actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}})
            try:
                while True:
                    while (
                        self._room(live.values()) and (job := waiting.popleft() if waiting else next_job()) is not None
                    ):
                        live[remote.options(num_gpus=self._share(job)).remote(job, notes, self.cpus)] = job
                    if not live:
                        return
                    ended, _ = ray.wait(list(live), num_returns=len(live), timeout=0)
                    if not ended:
                        ended, _ = ray.wait(list(live), timeout=SECONDS)
                    _tell_notes(notes, {job.key for job in live.values()}, tell)
                    for reference in ended:
                        job = live.pop(reference)
                        event = _ended(reference, job)
                        if event.kind == "again":
                            lost[job.key] += 1
                            if lost[job.key] <= LOST:
                                waiting.append(job)
                            else:
                                event = Event(job.key, "failed", f"{job.title}: lost {LOST + 1} times; {event.value}")
                        tell(event)
            finally:
                with contextlib.suppress(ConnectionError):  # where the cluster is lost, so are they
                    for reference in live:
                        ray.cancel(reference, force=True)
                    notes.shutdown(force=True)


@contextlib.contextmanager
def _loss_told() -> Iterator[None]:
    """Turn what Ray's client raises once it is cut off into one line."""
    rpc = getattr(sys.modules.get("grpc"), "RpcError", ConnectionError)  # there where Ray's client is
    try:
        yield
    except (ConnectionError, rpc) as error:
        if getattr(error, "errno", None) is not None:  # of a pipe or a file of ours
            raise
        text = error.details() if hasattr(error, "details") else str(error).partition("Last exception")[0]
        raise VisgraftError(
            f"the Ray cluster cannot be reached any more ({' '.join(text.split()).rstrip('. ')}); once it can, give "
            "the same command again"
        ) from error


def check_installed() -> None:
    """Raise a VisgraftError that says what to install, where Ray is missing."""
    if find_spec("ray") is None:
        raise VisgraftError("--on ray needs ray, which is not installed; run pip install 'visgraft[cluster]'")


def connect(address: str | None) -> None:
    """Connect this process to a cluster, and send it this package.

    Raises:
        VisgraftError: none answers, or it does not let this process in.
    """
    import ray

    if ray.is_initialized():
        return
    there = address or os.environ.get("RAY_ADDRESS")
    named = "--on" if address or not there else "RAY_ADDRESS"
    _check_reachable(there or "", named)
    settings: dict[str, Any] = {"runtime_env": {"py_modules": [str(Path(__file__).parents[1])]}}
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # what goes wrong is said once, by us
            ray.init(
                address=there, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, **settings
            )
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        token = ", and, where the cluster wants a token, RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH" if there else ""
        raise VisgraftError(
            f"no Ray cluster answers at {there or 'this machine'} ({_reason(error)}); check {named}{token}"
        ) from error


def _reason(error: Exception) -> str:
    """Return why there is no connection: the first line, or the last one where the first only announces it."""
    text = getattr(error, "message", None) or str(error)  # a missing token's is followed by a page of advice
    lines = [line.strip(" .") for line in str(text).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if lines[0].endswith(":") else 0]


def _check_reachable(address: str, named: str) -> None:
    """Raise a VisgraftError where an address is none, or nothing listens there, for which Ray itself waits long.

    `named` is what gives it.
    """
    found = re.fullmatch(r"(?:ray://)?(?:\[(?P<six>[^][\s/]+)\]|(?P<host>[^][\s/:@]+)):(?P<port>[0-9]{1,5})", address)
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        if address.startswith("ray://"):
            raise VisgraftError(
                f"{named} is {address!r}, but must be ray://HOST:PORT, where Ray's client is answered, such as "
                "ray://10.0.0.1:10001"
            )
        return
    try:
        socket.create_connection((found["six"] or found["host"], int(found["port"])), REACHED_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VisgraftError(f"no Ray cluster answers at {address} ({reason}); check {named}") from error


def _nodes() -> list[dict[str, Any]]:
    import ray

    with _loss_told():
        return [node for node in ray.nodes() if node["Alive"]]


def _sum(node: dict[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))


def _tell_notes(notes: Any, known: set[str], tell: TellEvent) -> None:
    """Tell what the jobs have told since; where that is lost, only the progress is."""
    import ray

    try:
        events = notes.get_nowait_batch(min(notes.qsize(), 1000))
    except (queue.Empty, ray.exceptions.RayError):
        return
    for event in events:
        if event.key in known:
            tell(event)


def _ended(reference: Any, job: Job) -> Event:
    """Return what became of a job; one that Ray has lost starts again."""
    import ray

    try:
        return Event(*ray.get(reference))
    except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.RayTaskError) as error:
        return Event(job.key, "failed", f"{job.title}: {str(error).strip().splitlines()[-1]}")
    except ray.exceptions.RayError as error:
        return Event(job.key, "again", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")


def _work(job: Job, notes: Any, threads: int) -> tuple[str, str, Any]:
    """Do a job on a node."""
    import ray
    import torch

    torch.set_num_threads(threads)

    def put(kind: str, value: Any) -> None:
        notes.actor.put_nowait.remote(Event(job.key, kind, value))  # nobody waits for it

    put("started", ray.get_runtime_context().get_node_id())
    return tuple(outcome(job, lambda value: put("note", value)))
