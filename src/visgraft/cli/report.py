"""`visgraft report`: one self-contained HTML page on one or several adapters."""

from pathlib import Path
from typing import Annotated

import typer

from visgraft.cli.arguments import Csv, Json, Quiet, TaskFolders, TypedLoading, Weights, source
from visgraft.cli.bundles import with_bundles


@with_bundles
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders that `train` wrote, or hf:USER/NAME", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write", show_default=False)],
    *,
    data: Annotated[
        str | None, typer.Option(help="data to measure on; none: only what the adapters themselves hold")
    ] = None,
    csv: Csv = None,
    task: TaskFolders = None,
    weights: Weights = None,
    split: Annotated[str, typer.Option(help="val, test for a last look, or all where it learned none")] = "val",
    reading: TypedLoading,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write one HTML page on runs: how they compare, how they learned, where they fail, what they cost."""
    from visgraft.cli.show import emit, progress_console, result_console
    from visgraft.report.page import check_page, gather, render, write_page

    check_page(out)
    images = source(data, csv, task) if data or csv or task else None
    found = gather(
        runs,
        images,
        weights=weights,
        part=split,
        loading=reading.loading(),
        on_step=progress_console.print,
    )
    write_page(out, render(found))
    size = out.stat().st_size
    result = {
        "out": str(out), "bytes": size, "split": split if images is not None else None, "figure": found.figure,
        "verdict": found.verdict, "runs": found.rows,
    }  # fmt: skip

    def text() -> None:
        result_console.print(found.verdict)
        result_console.print(f"{out}, {size / 1e6:.1f} MB")

    emit(result, json, text)
