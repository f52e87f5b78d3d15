"""What a benchmark shows while it runs: a table that lives on a terminal, otherwise a line for every result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visgraft.bench.sweep import State
    from visgraft.executors.job import Executor


@contextmanager
def sweep_progress(
    methods: Sequence[str], executor: "Executor"
) -> Iterator[tuple[Callable[["State"], None], Callable[[Any], None]]]:
    """Yield callbacks for `sweep`: a table that lives on a terminal, otherwise a line for every result."""
    from rich.live import Live

    from visgraft.cli.show import progress_console

    latest: list[Any] = []
    live = Live(console=progress_console, refresh_per_second=2) if progress_console.is_terminal else None

    def show(state: "State") -> None:
        latest[:] = [state]
        if live is not None:
            live.update(progress_table(state, methods, executor.places))

    def tell(result: Any) -> None:
        if live is None:
            left = latest[0].left if latest else 0
            progress_console.print(
                f"{describe(result)}; {left} left{_time_left(latest[0], executor.places)}{_nodes(latest[0])}"
            )

    if live is None:
        yield show, tell
    else:
        with live:
            yield show, tell


def _nodes(state: "State") -> str:
    """Say on how many machines of a cluster how much runs, and what was lost with one."""
    nodes = {node for node in state.nodes.values() if node}
    told = f"; {len(state.running)} running on {len(nodes)} node{'s' * (len(nodes) != 1)}" if nodes else ""
    failed = f", {len(state.failed)} failed" if state.failed else ""
    return told + failed + (f", {sum(state.lost.values())} lost and started again" if state.lost else "")


def _time_left(state: "State", workers: int) -> str:
    from visgraft.training.pace import duration

    seconds = state.seconds_left(workers)
    return "" if seconds is None or not state.left else f", about {duration(seconds)}"


def describe(result: Any) -> str:
    """One line on a result."""
    from visgraft.bench.measures import only_top1, shown
    from visgraft.cli.show import percent

    figures = ", ".join(f"{name} {percent(one.figure)} %" for name, one in result.measured.items())
    measures = [one.measure for one in result.measured.values()]
    figures += "" if only_top1(measures) else f" ({shown(measures)})"
    varied = result.trial.train["lr"]
    outcome = "" if result.outcome == "finished" else f" ({result.outcome})"
    return f"{result.trial.name} (lr {varied:g}): {figures}{outcome}, {result.seconds:.0f} s"


def progress_table(state: "State", methods: Sequence[str], workers: int) -> Any:
    """A table of tasks and methods: trials done and in all, and the epoch of what runs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from visgraft.cli.text import styled

    grid = Table(
        box=SIMPLE_HEAD,
        title=f"{state.total - state.left} of {state.total} trials{_time_left(state, workers)}{_nodes(state)}",
    )
    grid.add_column("task")
    for method in methods:
        grid.add_column(method, justify="right")
    by_task: dict[str, dict[str, Any]] = {}
    running: Mapping[tuple[str, str], str] = {
        (trial.task, trial.row): f" {epoch}/{epochs}" for trial, epoch, epochs in state.running.values()
    }
    for cell in state.cells:
        finished = cell.total - cell.left(state.done)
        colour = "green" if finished == cell.total else "default"
        now = running.get((cell.task, cell.method), "")
        text = styled((f"{finished}/{cell.total}", colour), (now, "cyan"))
        by_task.setdefault(cell.task, {})[cell.method] = text
    for task, cells in by_task.items():
        grid.add_row(task, *(cells.get(method, "") for method in methods))
    return grid
