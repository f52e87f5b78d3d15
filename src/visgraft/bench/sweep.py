"""Run what is left of a benchmark: each trial in a process of its own, several at a time, every result kept at once.

A process of its own gives each trial its own peak of memory, and a trial that is killed takes no other with it.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from visgraft.bench.ledger import append, read_file
from visgraft.bench.plan import Cell, schedule
from visgraft.bench.running import TrialSources, run_trial
from visgraft.bench.trial import Result, Trial
from visgraft.errors import VisgraftError
from visgraft.training.resume import Epoch


@dataclass(frozen=True)
class State:
    """Where a sweep is: its cells, what is done, what runs (with its epoch and all epochs), what failed and why."""

    cells: Sequence[Cell]
    done: dict[str, Result] = field(default_factory=dict)
    running: dict[str, tuple[Trial, int, int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    before: int = 0
    """Trials that an earlier run had finished."""

    @property
    def total(self) -> int:
        """How many trials there are in all."""
        return sum(cell.total for cell in self.cells)

    @property
    def left(self) -> int:
        """How many trials are not done yet."""
        return sum(cell.left(self.done) for cell in self.cells)

    def seconds_left(self, workers: int) -> float | None:
        """Return about how long it still takes; None where there is a method left of which no training is done.

        A training takes as long as the method's others did for each epoch.
        """
        took: dict[str, list[float]] = {}
        for result in self.done.values():
            took.setdefault(result.trial.method, []).append(result.seconds / result.epochs)
        trials = [t for cell in self.cells for t in (*cell.tuning, *(cell.final_trials(self.done) or cell.finals))]
        left = [trial for trial in trials if trial.key not in self.done]
        if any(trial.method not in took for trial in left):
            return None
        seconds = sum(trial.train["epochs"] * sum(took[trial.method]) / len(took[trial.method]) for trial in left)
        return seconds / max(workers, 1)


TellState = Callable[[State], None]


def sweep(
    cells: Sequence[Cell],
    place: TrialSources,
    file: Path,
    *,
    workers: int = 1,
    on_change: TellState = lambda state: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> State:
    """Run every trial that `file` has no line for, and append a line for each as it finishes.

    A trial that fails is told of in the state's `failed`, and the others go on.

    Args:
        cells: what there is to do, from `plan`.
        place: where images and weights are.
        file: the lines of results; those of the same trials are kept.
        workers: processes at a time; 0 runs the trials one by one in this process.
        on_change: called when anything changes.
        on_result: called with every result of this run.

    Raises:
        VisgraftError: fewer than 0 workers, or the file cannot be read or written.
    """
    if workers < 0:
        raise VisgraftError(f"workers is {workers}, but must be 0 or more")
    done = {result.trial.key: result for result in (read_file(file) if file.is_file() else [])}
    state = State(cells, done)
    state = State(cells, done, before=state.total - state.left)
    on_change(state)

    def keep(result: Result) -> None:
        append(file, result)
        state.done[result.trial.key] = result
        on_result(result)

    if workers == 0:
        _one_by_one(state, place, keep, on_change)
    else:
        _side_by_side(state, place, workers, keep, on_change)
    return state


def _next(state: State) -> Trial | None:
    """Return a trial to start now, None where there is none."""
    busy = state.running.keys() | state.failed.keys()
    return next((trial for trial in schedule(state.cells, state.done) if trial.key not in busy), None)


def _selection(state: State, trial: Trial) -> dict[str, Any] | None:
    """Return how a final trial's setting was chosen."""
    if trial.kind != "final":
        return None
    cell = next(c for c in state.cells if c.task == trial.task and c.method == trial.row)
    return cell.selection(state.done)


def _one_by_one(state: State, place: TrialSources, keep: Callable[[Result], None], on_change: TellState) -> None:
    while (trial := _next(state)) is not None:

        def note(epoch: Epoch, trial: Trial = trial) -> None:
            state.running[trial.key] = (trial, epoch.epoch, trial.train["epochs"])
            on_change(state)

        try:
            keep(run_trial(trial, place, _selection(state, trial), note))
        except VisgraftError as error:
            state.failed[trial.key] = f"{trial.name}: {error}"
        state.running.pop(trial.key, None)
        on_change(state)


def _side_by_side(
    state: State, place: TrialSources, workers: int, keep: Callable[[Result], None], on_change: TellState
) -> None:
    context = _context()
    threads = max(1, (os.cpu_count() or 1) // workers)
    live: dict[Connection, tuple[BaseProcess, Trial]] = {}
    try:
        while True:
            while len(live) < workers and (trial := _next(state)) is not None:
                here, there = context.Pipe(duplex=False)
                work = (there, trial, place, _selection(state, trial), threads)
                process = context.Process(target=_work, args=work, daemon=True)
                process.start()
                there.close()
                live[here] = (process, trial)
                state.running[trial.key] = (trial, 0, trial.train["epochs"])
                on_change(state)
            if not live:
                return
            for connection in cast(list[Connection], wait(list(live))):
                process, trial = live[connection]
                if _listen(connection, process, trial, state, keep):
                    del live[connection]
                    del state.running[trial.key]
                on_change(state)
    finally:
        for process, _ in live.values():
            process.terminate()
        for process, _ in live.values():
            process.join()


def _listen(
    connection: Connection, process: BaseProcess, trial: Trial, state: State, keep: Callable[[Result], None]
) -> bool:
    """Take one message of a worker; return whether it is the last one."""
    try:
        kind, value = connection.recv()
    except EOFError:
        process.join()
        state.failed[trial.key] = (
            f"{trial.name}: the process ended with code {process.exitcode}; if memory ran out, lower --workers or "
            "--set batch_size"
        )
        return True
    if kind == "epoch":
        state.running[trial.key] = (trial, value, trial.train["epochs"])
        return False
    process.join()
    if kind == "result":
        keep(value)
    else:
        state.failed[trial.key] = f"{trial.name}: {value}"
    return True


def _context() -> Any:
    """Processes that start from one in which everything is imported already, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _work(
    connection: Connection, trial: Trial, place: TrialSources, selection: dict[str, Any] | None, threads: int
) -> None:
    """Run a trial in a process of its own, and send epochs and the result, or the error in one line."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    torch.set_num_threads(threads)

    def note(epoch: Epoch) -> None:
        if epoch.complete:
            connection.send(("epoch", epoch.epoch))

    with contextlib.suppress(BrokenPipeError):
        try:
            connection.send(("result", run_trial(trial, place, selection, note)))
        except VisgraftError as error:
            connection.send(("error", str(error)))
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {error}"))
