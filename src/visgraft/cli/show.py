"""What the command line shows: progress on standard error, results as tables or as one JSON document."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from visgraft.cli.text import json_text, styled, visible
from visgraft.files import as_given
from visgraft.training.resume import Epoch


class TextConsole(Console):
    """A console that takes text: nothing in a user's names is markup, an emoji's name or a command to the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return what is printed for a text, in cells of tables and in titles too."""
        return super().render_str(visible(text), **options)


progress_console = TextConsole(stderr=True)
PLAIN_LINES = 30
result_console = TextConsole()


def emit(value: Any, as_json: bool, text: Callable[[], None]) -> None:
    """Print one JSON document on standard output, or call `text` to print for people."""
    if as_json:
        sys.stdout.write(json_text(value) + "\n")
    else:
        text()


def describe(epoch: Epoch, epochs: int) -> str:
    """One line on an epoch."""
    train = "" if epoch.top1 is None else f" train {epoch.top1:6.1%}"
    val = "" if epoch.val_figure is None else f" {_figure_name(epoch)} {epoch.val_figure:6.1%}"
    left = f"{epoch.seconds_left / 60:.0f} min" if epoch.seconds_left >= 90 else f"{epoch.seconds_left:.0f} s"
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs} loss {epoch.loss:6.3f}{train}{val} "
        f"{epoch.images_per_second:4.0f} images/s {left} left"
    )


def _figure_name(epoch: Epoch) -> str:
    """What the validation figure of an epoch is called."""
    if epoch.val_mean is not None:
        return "val mean"
    return "val" if epoch.val_map is None else "val mAP"


@contextmanager
def training_progress(epochs: int, title: str = "") -> Iterator[Callable[[Epoch], None]]:
    """Yield a callback for `train`: a live bar on a terminal, otherwise at most `PLAIN_LINES` plain lines.

    With a title, only one line: the whole of many short trainings would hide everything else.
    """
    if title and not progress_console.is_terminal:
        progress_console.print(title)
        yield lambda epoch: None
        return
    if not progress_console.is_terminal:
        every = -(-epochs // PLAIN_LINES)

        def tell(epoch: Epoch) -> None:
            if epoch.complete and (epoch.epoch % every == 0 or epoch.epoch == epochs):
                progress_console.print(describe(epoch, epochs))

        yield tell
        return
    columns = (BarColumn(bar_width=10), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=progress_console, transient=False) as bar:
        task = bar.add_task("starting", total=epochs)
        last: Epoch | None = None

        def show(epoch: Epoch) -> None:
            nonlocal last
            last = epoch if epoch.complete else last
            bar.update(task, completed=epoch.epoch if epoch.complete else epoch.epoch - 1)
            if last:  # its validation figures stay in sight during the next epoch
                epoch = replace(epoch, val_top1=last.val_top1, val_map=last.val_map, val_mean=last.val_mean)
            bar.update(task, description=f"{title}{describe(epoch, epochs)}")

        yield show


@contextmanager
def jobs_progress(title: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that shows how many of several jobs are done: a line that changes, or one for each."""
    status = progress_console.status(title) if progress_console.is_terminal else None
    if status is None:
        progress_console.print(title)
    else:
        status.start()

    def show(done: int, total: int) -> None:
        text = f"{title}{done} of {total} {what} done"
        if status is None:
            progress_console.print(text)
        else:
            status.update(styled(text))

    try:
        yield show
    finally:
        if status is not None:
            status.stop()


@contextmanager
def loading_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that shows how many images have been read, where that takes more than two seconds."""
    start = time.monotonic()
    told = start

    def show(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= (2 if progress_console.is_terminal else 20) or (done == total and told > start):
            told = now
            left = (now - start) / done * (total - done)
            progress_console.print(f"read {done:,} of {total:,} images, {left:.0f} s left")

    yield show


def warn(text: str) -> None:
    """Print a warning on standard error."""
    progress_console.print(styled(("warning:", "yellow"), f" {as_given(text)}"))


def percent(value: float | None) -> str:
    """A rate between 0 and 1 as a percentage with one decimal."""
    return "–" if value is None else f"{100 * value:.1f}"


def print_pairs(rows: Mapping[str, str]) -> None:
    """Print names and values in two columns; a long value, such as a path, is never broken into lines."""
    width = max(map(len, rows))
    for name, text in rows.items():
        result_console.print(f"{name:<{width}}  {text}")


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print what `train` or `eval` returned."""
    interval = figures["top1_ci95"]
    within = f"  (95 % interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    several = figures["mean_average_precision"] is not None
    main, value = ("mean average precision", "mean_average_precision") if several else ("top-1", "top1")
    if "tasks" in figures:
        alone = next(iter(figures["tasks"].values())) if len(figures["tasks"]) == 1 else None
        main, value = "mean of the tasks" if alone is None else main_figure(alone)[0], "mean"
    rows = {
        "method": f"{figures['method']} on {figures['backbone']}",
        f"{main}, {figures['split'] or 'no validation images'}": f"{percent(figures[value])} %{within}",
        "macro-F1": percent(figures["macro_f1"]),
        "balanced accuracy": percent(figures["balanced_accuracy"]),
        "images": str(figures["images"]),
        "trained parameters": f"{figures['params_adapter']:,} + {figures['params_head']:,} of the head",
        "adapter": f"{figures['adapter']}, {figures['adapter_bytes'] / 1000:.0f} KB",
        "time": f"{figures['seconds']:.1f} s, {figures['images_per_second']:.1f} images/s in {figures['precision']}",
        "peak memory": f"{figures['peak_memory_bytes'] / 1e9:.2f} GB",
    }
    if kept := figures.get("kept_bytes"):
        rows["computed once"] = f"what the frozen part gives, {kept / 1e6:,.0f} MB"
    if crossed := figures.get("cross_validation"):
        low, high = (percent(limit) for limit in crossed["interval"])
        rows[f"cross-validated {main}"] = (
            f"{percent(crossed['figure'])} %  (95 % interval {low} to {high}) on {crossed['images']} images, "
            f"{crossed['folds']} folds, {crossed['repeats']} times"
        )
    print_pairs({name: text for name, text in rows.items() if text != "–"})
    print_tasks(figures.get("tasks", {}))
    if crossed and crossed.get("tasks"):
        result_console.print("cross-validated:")
        print_tasks(crossed["tasks"])
    print_skipped(figures["skipped"])


def print_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the figures of each task."""
    for name, found in tasks.items():
        result_console.print(f"  {name}: {figures_in_words(found)}")


def figures_in_words(found: Mapping[str, Any]) -> str:
    """Return the figures of a task; of numbers in their unit, with 95 % intervals and a constant answer's error."""
    told = []
    if "mae" in found:
        told.append(f"mean absolute error {found['mae']:.4g}{_limits(found, 'mae')}, a constant answer's")
        told[-1] += f" {found['constant_mae']:.4g}"
        told.append(f"RMSE {found['rmse']:.4g}{_limits(found, 'rmse')}")
        for key, word in (("r2", "R²"), ("spearman", "Spearman")):
            if found[key] is not None:
                told.append(f"{word} {found[key]:.3f}{_limits(found, key)}")
    else:
        several = "mean_average_precision" in found
        key = "mean_average_precision" if several else "top1"
        limits = found.get(f"{key}_ci95")
        within = f" ({percent(limits[0])} to {percent(limits[1])})" if limits else ""
        told.append(f"{'mean average precision' if several else 'top-1'} {percent(found[key])} %{within}")
        told.append(f"macro-F1 {percent(found['macro_f1'])}")
    return f"{', '.join(told)}, on {found['images']:,} images"


def main_figure(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the figure of a task that settings are chosen by: its name, the figure, and its 95 % interval."""
    if "mae" in found:
        limits = found.get("r2_ci95")
        r2 = "–" if found["r2"] is None else f"{found['r2']:.3f}"
        return "R²", r2, f"{limits[0]:.3f} to {limits[1]:.3f}" if limits else "–"
    key, name = ("mean_average_precision", "mean AP") if "mean_average_precision" in found else ("top1", "top-1")
    limits = found.get(f"{key}_ci95")
    return name, percent(found[key]), f"{percent(limits[0])}–{percent(limits[1])}" if limits else "–"


def print_agreement(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Print how two models agree on each task, as a certificate has it."""
    for name, found in tasks.items():
        told = [f"same answers {percent(found['agreement'])} %"]
        if "largest_difference" in found:
            apart = f"{found['largest_difference']:.2g} {found['unit']}".rstrip()
            told = [f"largest difference {apart}, {found['largest_difference_of_std']:.1e} of its standard deviation"]
        if "accuracy" in found:
            told.append(f"right {percent(found['accuracy'])} % (torch: {percent(found['torch_accuracy'])} %)")
        if "mean_absolute_error" in found:
            error, by_torch = found["mean_absolute_error"], found["torch_mean_absolute_error"]
            told.append(f"mean absolute error {error:.4g} (torch: {by_torch:.4g})")
        result_console.print(f"  {name}: {', '.join(told)}")


def _limits(found: Mapping[str, Any], name: str) -> str:
    limits = found.get(f"{name}_ci95")
    return f" ({limits[0]:.3g} to {limits[1]:.3g})" if limits else ""


def print_forecast(forecast: Mapping[str, Any]) -> None:
    """Print what `forecast_folder` returned."""
    once = ", on features computed once" if forecast["features_once"] else ""
    steps, epochs = ceil(forecast["steps_per_epoch"]), forecast["epochs"]
    validated = ", validation included" if forecast["images_val"] else ""
    rest = forecast["seconds"] - forecast["seconds_by_part"]["training"]
    rows = {
        "method": f"{forecast['method']} on {forecast['backbone']}",
        "images": f"{forecast['images']:,} and {forecast['images_val']:,} for validation; "
        f"{forecast['images_read']} were read for this forecast",
        "trained parameters": f"{forecast['params_adapter']:,} + {forecast['params_head']:,} of the head",
        "adapter": f"{forecast['adapter_file_bytes'] / 1000:,.0f} KB",
        "peak memory": f"{forecast['peak_memory_bytes'] / 1e9:.2f} GB",
        "a step": f"{_seconds(forecast['seconds_per_step'])} on {forecast['batch_size']} images in "
        f"{forecast['precision']}{once}",
        "an epoch": f"{_seconds(forecast['seconds_per_epoch'])}: {steps:,} step{'s' if steps > 1 else ''}{validated}",
        "in all": f"{_seconds(forecast['seconds'])}: {epochs:,} epoch{'s' if epochs > 1 else ''}, and "
        f"{_seconds(rest)} before and after",
    }
    print_pairs(rows)
    progress_console.print("a forecast from the first steps; nothing was written")


def _seconds(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_skipped(skipped: Sequence[Mapping[str, str]]) -> None:
    """List the images that were left out, on standard error."""
    if skipped:
        progress_console.print(f"left out {len(skipped)} images that do not decode:", style="yellow")
    for row in skipped:
        progress_console.print(f"  {as_given(row['reason'])}")


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
