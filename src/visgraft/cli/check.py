"""The verb `check`: what is wrong with the data before training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visgraft.cli.arguments import Json
from visgraft.cli.bundles import with_bundles
from visgraft.cli.labels import TypedImages

if TYPE_CHECKING:
    from visgraft.check import Finding, Report

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
SETS, PICTURES = 3, 4  # shown of each finding
CLASSES = 20


@with_bundles
def check(
    images: TypedImages,
    *,
    html: Annotated[Path | None, typer.Option(help="write a page with pictures to this file")] = None,
    json: Json = False,
) -> None:
    """Look for what is wrong with the data before training: copies, leaks, broken files, shortcuts.

    Exits with 1 where errors were found (unreadable files, leaks between parts, one file under two classes).
    """
    from visgraft.check import check_data
    from visgraft.check.page import write_page
    from visgraft.cli.show import emit
    from visgraft.data.dataset import Split
    from visgraft.data.read import read_data
    from visgraft.errors import CannotDivide

    report_target(html)
    try:
        dataset = read_data(images.source())
    except CannotDivide:  # what is there can be looked at all the same
        dataset = read_data(images.source(), Split(0.0, 0.0))
    with _progress() as show:
        report = check_data(dataset, on_progress=show)
    if html:
        write_page(report, html)
    emit(report.to_dict(), json, lambda: print_report(report, html))
    if report.count("error"):
        raise typer.Exit(1)


def report_target(html: Path | None) -> None:
    """Refuse a page that could not be written, before an hour is spent on reading images.

    Raises:
        VisgraftError: its folder does not exist, or it is a folder.
    """
    from visgraft.errors import VisgraftError

    if html and html.is_dir():
        raise VisgraftError(f"{html} is a folder; give --html the name of a file in it")
    if html and not html.parent.is_dir():
        raise VisgraftError(f"the folder {html.parent} of --html does not exist; make it first")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback for `check_data`: a bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from visgraft.cli.show import progress_console

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, transient=True, disable=not progress_console.is_terminal) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield show


def print_report(report: "Report", html: Path | None = None) -> None:
    """Print the figures of the data, then the findings, worst first, then one line that counts them."""
    from visgraft.cli.show import print_table, result_console

    for table in report.tables.values():
        if table.rows:
            rows = [["–" if value is None else value for value in row] for row in table.rows[:CLASSES]]
            print_table(table.title, table.columns, rows)
        if len(table.rows) > CLASSES:
            result_console.print(f"and {len(table.rows) - CLASSES} more\n")
    for finding in report.findings:
        _print_finding(finding, report.root)
    if html:
        result_console.print(f"pictures: {html}")
    result_console.print(report.closing)


def _print_finding(finding: "Finding", root: Path) -> None:
    from visgraft.check.page import below
    from visgraft.cli.show import result_console
    from visgraft.cli.text import styled

    indent = " " * 9
    result_console.print(styled((f"{finding.severity:<9}", COLOURS[finding.severity]), (finding.title, "bold")))
    result_console.print(f"{indent}{finding.remedy}")
    shown = len(finding.sets) if finding.kind == "unreadable" else SETS
    for together in finding.sets[:shown]:
        names = [below(picture, root) + (f" ({picture.detail})" if picture.detail else "") for picture in together]
        more = f" and {len(names) - PICTURES} more" if len(names) > PICTURES else ""
        result_console.print(styled((f"{indent}  {', '.join(names[:PICTURES])}{more}", "dim")))
    if len(finding.sets) > shown:
        result_console.print(f"{indent}  and {len(finding.sets) - shown:,} more", style="dim")
    result_console.print()
