"""Run what is left of a benchmark, wherever its trials run, and keep every result at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from visgraft.bench.ledger import append, read_file
from visgraft.bench.plan import Cell, schedule
from visgraft.bench.running import TrialSources, run_trial
from visgraft.bench.share import gpu_share
from visgraft.bench.trial import Result, Trial
from visgraft.executors.job import Event, Executor, Job, Note
from visgraft.training.resume import Epoch


@dataclass(frozen=True)
class State:
    """Where a sweep is: its cells, what is done, what runs (with its epoch and all epochs), what failed and why.

    `nodes` says on which machine of a cluster what runs, `lost` how often it was lost with one and began anew.
    """

    cells: Sequence[Cell]
    done: dict[str, Result] = field(default_factory=dict)
    running: dict[str, tuple[Trial, int, int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
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
    executor: Executor,
    *,
    on_change: TellState = lambda state: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> State:
    """Run every trial that `file` has no line for, and append a line for each as it finishes.

    A trial that fails is told of in the state's `failed`, and the others go on. Only this process writes the file.

    Args:
        cells: what there is to do, from `plan`.
        place: where images and weights are.
        file: the lines of results; those of the same trials are kept.
        executor: where the trials run.
        on_change: called when anything changes.
        on_result: called with every result of this run.

    Raises:
        VisgraftError: the file cannot be read or written.
    """
    done = {result.trial.key: result for result in (read_file(file) if file.is_file() else [])}
    state = State(cells, done)
    state = State(cells, done, before=state.total - state.left)
    on_change(state)
    given: dict[str, Trial] = {}

    def next_job() -> Job | None:
        busy = given.keys() | state.failed.keys()
        trial = next((trial for trial in schedule(state.cells, state.done) if trial.key not in busy), None)
        if trial is None:
            return None
        given[trial.key] = trial
        work = partial(_work, trial, place, _selection(state, trial))
        return Job(trial.key, trial.name, work, gpu_share(trial, state.done.values()))

    def tell(event: Event) -> None:
        if event.kind == "done":
            append(file, event.value)
            state.done[event.key] = event.value
        _note(state, event, given[event.key])
        on_change(state)
        if event.kind == "done":
            on_result(event.value)

    executor.run(next_job, tell)
    return state


def _note(state: State, event: Event, trial: Trial) -> None:
    """Bring a state up to date."""
    if event.kind in ("started", "note"):
        state.running[event.key] = (trial, 0 if event.kind == "started" else event.value, trial.train["epochs"])
        if event.kind == "started":
            state.nodes[event.key] = event.value
        return
    state.running.pop(event.key, None)
    state.nodes.pop(event.key, None)
    if event.kind == "failed":
        state.failed[event.key] = event.value
    elif event.kind == "again":
        state.lost[event.key] = state.lost.get(event.key, 0) + 1


def _selection(state: State, trial: Trial) -> dict[str, Any] | None:
    """Return how a final trial's setting was chosen."""
    if trial.kind != "final":
        return None
    cell = next(c for c in state.cells if c.task == trial.task and c.method == trial.row)
    return cell.selection(state.done)


def _work(trial: Trial, place: TrialSources, selection: dict[str, Any] | None, note: Note) -> Result:
    """Run a trial, and tell of each epoch."""

    def on_progress(epoch: Epoch) -> None:
        if epoch.complete:
            note(epoch.epoch)

    return run_trial(trial, place, selection, on_progress)
