"""What the command line shows: progress on standard error, results as tables or as one JSON document."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from visgraft.train import Epoch

progress_console = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_LINES = 30
result_console = Console(highlight=False, soft_wrap=True)


def emit(value: Any, as_json: bool, text: Callable[[], None]) -> None:
    """Print one JSON document on standard output, or call `text` to print for people."""
    if as_json:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    else:
        text()


def describe(epoch: Epoch, epochs: int) -> str:
    """One line on an epoch."""
    val = "" if epoch.val_top1 is None else f" val {epoch.val_top1:6.1%}"
    left = f"{epoch.seconds_left / 60:.0f} min" if epoch.seconds_left >= 90 else f"{epoch.seconds_left:.0f} s"
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs} loss {epoch.loss:6.3f} train {epoch.top1:6.1%}{val} "
        f"{epoch.images_per_second:4.0f} images/s {left} left"
    )


@contextmanager
def training_progress(epochs: int) -> Iterator[Callable[[Epoch], None]]:
    """Yield a callback for `train`: a live bar on a terminal, otherwise at most `PLAIN_LINES` plain lines."""
    if not progress_console.is_terminal:
        every = -(-epochs // PLAIN_LINES)

        def tell(epoch: Epoch) -> None:
            if epoch.complete and (epoch.epoch % every == 0 or epoch.epoch == epochs):
                progress_console.print(describe(epoch, epochs))

        yield tell
        return
    columns = (BarColumn(bar_width=10), TextColumn("{task.description}"))
    with Progress(*columns, console=progress_console, transient=False) as bar:
        task = bar.add_task("starting", total=epochs)
        val: float | None = None

        def show(epoch: Epoch) -> None:
            nonlocal val
            val = epoch.val_top1 if epoch.complete else val  # stays in sight during the next epoch
            bar.update(task, completed=epoch.epoch if epoch.complete else epoch.epoch - 1)
            bar.update(task, description=describe(replace(epoch, val_top1=val), epochs))

        yield show


def percent(value: float | None) -> str:
    """A rate between 0 and 1 as a percentage with one decimal."""
    return "–" if value is None else f"{100 * value:.1f}"


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print what `train` or `eval` returned."""
    table = Table(show_header=False, box=None, pad_edge=False)
    interval = figures["top1_ci95"]
    within = f"  (95 % interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    rows = {
        "method": f"{figures['method']} on {figures['backbone']}",
        f"top-1, {figures['split'] or 'no validation images'}": f"{percent(figures['top1'])} %{within}",
        "macro-F1": percent(figures["macro_f1"]),
        "images": str(figures["images"]),
        "trained parameters": f"{figures['params_adapter']:,} + {figures['params_head']:,} of the head",
        "adapter": f"{figures['adapter']}, {figures['adapter_bytes'] / 1000:.0f} KB",
        "time": f"{figures['seconds']:.1f} s, {figures['images_per_second']:.1f} images/s in {figures['precision']}",
        "peak memory": f"{figures['peak_memory_bytes'] / 1e9:.2f} GB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    result_console.print(table)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; numbers stand on the right."""
    table = Table(title=title or None, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) or str(row[i])[:1].isdigit() for row in rows)
        short = all(len(str(row[i])) < 16 for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=short, overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v) for v in row))
    result_console.print(table)
