"""Jobs in processes of this machine: one that is killed takes no other with it."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from visgraft.executors.job import Event, Job, NextJob, TellEvent, outcome


@dataclass(frozen=True)
class Processes:
    """Runs so many jobs at a time, each in a process with its share of the cores.

    Args:
        places: processes at a time.
        preload: modules that are imported once, before a process starts, where the system can do that.
        fresh: give each job a new process, so that its peak of memory is its own too; otherwise a process takes one job
            after another, and keeps what it has loaded.
    """

    places: int
    preload: Sequence[str] = ()
    fresh: bool = True

    def run(self, next_job: NextJob, tell: TellEvent) -> None:
        """See `Executor`."""
        context, threads = _context(self.preload), max(1, (os.cpu_count() or 1) // self.places)
        live, idle = dict[Connection, tuple[BaseProcess, Job]](), list[tuple[Connection, BaseProcess]]()
        try:
            while True:
                while len(live) < self.places and (job := next_job()) is not None:
                    here, process = idle.pop() if idle else _started(context, threads)
                    live[here] = (process, job)
                    with contextlib.suppress(BrokenPipeError):  # a process that has ended meanwhile is heard below
                        here.send(job)
                    tell(Event(job.key, "started", ""))
                if not live:
                    return
                for connection in cast(list[Connection], wait(list(live))):
                    event = _heard(connection, *live[connection])
                    if event.kind in ("done", "failed"):
                        process, _ = live.pop(connection)
                        if self.fresh or process.exitcode is not None:
                            _end(connection, process)
                        else:
                            idle.append((connection, process))
                    tell(event)
        finally:
            for process, _ in live.values():
                process.terminate()
            for connection, (process, _) in live.items():
                _end(connection, process)
            for connection, process in idle:
                _end(connection, process)


def _started(context: Any, threads: int) -> tuple[Connection, BaseProcess]:
    """Return a new process, and what jobs are sent to it through."""
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, threads), daemon=True)
    process.start()
    there.close()
    return here, process


def _end(connection: Connection, process: BaseProcess) -> None:
    """Let a process end, which waits for another job."""
    connection.close()
    process.join()


def _heard(connection: Connection, process: BaseProcess, job: Job) -> Event:
    try:
        return cast(Event, connection.recv())
    except (EOFError, ConnectionResetError):
        process.join()
        why = f"the process ended with code {process.exitcode}; if memory ran out, lower --workers or the batch size"
        return Event(job.key, "failed", f"{job.title}: {why}")


def _context(preload: Sequence[str]) -> Any:
    """Processes that start from one in which everything is imported already, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    return context


def _work(connection: Connection, threads: int) -> None:
    """Do one job after another until there is none any more, and send what happens."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    torch.set_num_threads(threads)
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
        while True:
            job: Job = connection.recv()
            connection.send(outcome(job, lambda value, key=job.key: connection.send(Event(key, "note", value))))  # type: ignore[misc]
