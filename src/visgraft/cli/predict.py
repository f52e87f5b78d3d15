"""The verb `predict`: name the classes of any number of images, with one adapter or several of one backbone."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import Background, Json, Quiet, SkipBroken, Weights
from visgraft.cli.bundles import with_bundles
from visgraft.cli.predict_output import StreamProgress, choose_table, printed
from visgraft.cli.predict_parts import PartOptions, predict_in_parts
from visgraft.errors import DataError

if TYPE_CHECKING:
    from visgraft.serve.prediction import Prediction
    from visgraft.serve.tables import Write

Broken = tuple[str | Path, str]
"""An image's path or URL, and why it cannot be read."""


Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER... IMAGES",
        help="adapter folders or hf:USER/NAME; then images: files, folders, quoted patterns, - for paths on stdin, "
        "or a table with a column image and perhaps adapter",
        show_default=False,
    ),
]
AdaptersFolder = Annotated[
    str | None, typer.Option(metavar="DIR", help="folder with any number of adapters", show_default=False)
]
Top = Annotated[
    int | None, typer.Option(help="classes to name; none: 1, or all above the threshold", min=1, show_default=False)
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="least probability, where images may have several classes; none: 0.5", min=0, max=1, show_default=False
    ),
]
Coverage = Annotated[
    float | None,
    typer.Option(
        help="name a set of classes that holds the truth with this probability, e.g. 0.95; none: the most probable",
        show_default=False,
    ),
]
Unlike = Annotated[
    float | None,
    typer.Option(
        help="also mark pictures unlike the training's, wrongly so this share of those like them, e.g. 0.05",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="table to write: .csv or .parquet; or a folder, for .parquet in parts", show_default=False),
]
BatchSize = Annotated[int, typer.Option(help="images per forward", min=1)]
Ensemble = Annotated[bool, typer.Option("--ensemble", help="one answer of all: the mean probabilities")]


@with_bundles
def predict(
    arguments: Arguments,
    *,
    adapters: AdaptersFolder = None,
    weights: Weights = None,
    top: Top = None,
    threshold: Threshold = None,
    coverage: Coverage = None,
    unlike: Unlike = None,
    out: Out = None,
    in_parts: PartOptions,
    skip_broken: SkipBroken = False,
    background: Background = None,
    batch_size: BatchSize = 64,
    ensemble: Ensemble = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Name the class of each image, with one adapter or several of one backbone."""
    from visgraft.adapters.directory import read_record
    from visgraft.adapters.hub import settled
    from visgraft.bank.opening import check_same_backbone, load_bank
    from visgraft.cli.predict_images import find_images, find_work, split_arguments
    from visgraft.serve.covering import check_covering
    from visgraft.serve.layout import table_layout
    from visgraft.serve.prediction import predict_rows, predict_stream
    from visgraft.serve.unlike import check_references

    by_folder = in_parts.for_folder(out)
    named, images = split_arguments(arguments, adapters)
    work = find_work(images, named, ensemble)
    named, told = (work.adapters, work.rows) if work else (named, None)
    asked: dict[str, Any] = {"top": top, "threshold": threshold, "coverage": coverage, "unlike": unlike}
    asked |= {"background": background, "batch_size": batch_size}
    if by_folder and out:
        asked |= {"weights": weights, "ensemble": ensemble, "skip_broken": skip_broken}
        predict_in_parts(out, named, images, work, asked, in_parts, json)
        return
    paths, total = (iter(()), told) if work else find_images(images)
    broken = list[Broken]()
    streamed = skip_broken and not json and out is None  # no image can stop it, so lines need not wait for the end
    progress = StreamProgress(total, hidden=streamed and sys.stdout.isatty())
    asked |= {"on_broken": (lambda *why: broken.append(why)) if skip_broken else None, "on_progress": progress.show}
    table = None if out is None else choose_table(out, images)
    with settled():
        check_same_backbone(list(named.values()), prepared_alike=not work)
        records = {name: read_record(path) for name, path in named.items()}
        check_covering(coverage, records.items(), top=top, threshold=threshold, ensemble=ensemble)
        check_references(named, unlike, ensemble)
        bank = load_bank(named, weights=weights)
    each = (
        partial(predict_rows, bank, work.pairs()) if work else partial(predict_stream, bank, paths, ensemble=ensemble)
    )
    answering = ["ensemble of " + " and ".join(named)] if ensemble else list(named)
    records = {name: bank.record(name) for name in bank.names}
    columns = partial(table_layout, records, top, coverage, unlike is not None)  # lines and JSON have none to share
    sink = table(out, columns()) if out and table else printed(len(answering), json, streamed)
    rows = _write_all(each(**asked), sink, progress, broken)
    _report(out, answering, rows if work else rows // len(answering), progress, broken, json, bool(work))


def _write_all(
    found: Iterator["Prediction"],
    sink: AbstractContextManager["Write"],
    progress: "StreamProgress",
    broken: Sequence[Broken],
) -> int:
    """Write every prediction and return their number; what is written stays only if there is at least one."""
    rows = 0
    with sink as write, progress:
        for prediction in found:
            write(prediction)
            rows += 1
        if not rows:
            none = f"none of the {len(broken)} images decodes, e.g. {broken[0][1]}" if broken else ""
            raise DataError(none or "standard input names no image")
    return rows


def _report(
    out: Path | None,
    adapters: Sequence[str],
    images: int,
    progress: "StreamProgress",
    broken: Sequence[Broken],
    json: bool,
    mixed: bool,
) -> None:
    """List what was left out, and sum up what was written to a file."""
    from visgraft.cli.show import emit, print_skipped
    from visgraft.cli.text import visible
    from visgraft.serve.tables import written

    skipped = [{"image": written(path), "reason": reason} for path, reason in broken]
    print_skipped(skipped)
    if out:
        figures = {
            "out": str(out),
            "adapters": adapters,
            "images": images,
            "skipped": skipped,
            "seconds": progress.seconds,
            "images_per_second": progress.done / progress.seconds,
        }
        each = f", each with its own of {len(adapters)} adapters" if mixed else f" × {len(adapters)} adapters"
        kinds = each if len(adapters) > 1 else ""
        emit(figures, json, lambda: print(visible(f"{out}: {images:,} images{kinds}, {progress.rate}")))
