"""Each job in a process of its own on this machine: its own peak of memory, and one that is killed takes no other."""

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
    """Runs so many jobs at a time, each in a new process with its share of the cores.

    Args:
        places: processes at a time.
        preload: modules that are imported once, before a process starts, where the system can do that.
    """

    places: int
    preload: Sequence[str] = ()

    def run(self, next_job: NextJob, tell: TellEvent) -> None:
        """See `Executor`."""
        context, threads = _context(self.preload), max(1, (os.cpu_count() or 1) // self.places)
        live: dict[Connection, tuple[BaseProcess, Job]] = {}
        try:
            while True:
                while len(live) < self.places and (job := next_job()) is not None:
                    here, there = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(there, job, threads), daemon=True)
                    process.start()
                    there.close()
                    live[here] = (process, job)
                    tell(Event(job.key, "started", ""))
                if not live:
                    return
                for connection in cast(list[Connection], wait(list(live))):
                    event = _heard(connection, *live[connection])
                    if event.kind in ("done", "failed"):
                        live.pop(connection)[0].join()
                    tell(event)
        finally:
            for process, _ in live.values():
                process.terminate()
            for process, _ in live.values():
                process.join()


def _heard(connection: Connection, process: BaseProcess, job: Job) -> Event:
    try:
        return cast(Event, connection.recv())
    except EOFError:
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


def _work(connection: Connection, job: Job, threads: int) -> None:
    """Do a job in a process of its own, and send what happens."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    torch.set_num_threads(threads)
    with contextlib.suppress(BrokenPipeError):
        connection.send(outcome(job, lambda value: connection.send(Event(job.key, "note", value))))
