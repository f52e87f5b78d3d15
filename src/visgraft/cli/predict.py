"""The verb `predict`: name the classes of any number of images, with one adapter or several of one backbone."""

import csv
import glob
import io
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from visgraft.cli.arguments import Background, Json, Quiet, SkipBroken, Weights
from visgraft.errors import DataError, VisgraftError

if TYPE_CHECKING:
    from visgraft.data.images import Skipped
    from visgraft.serve.prediction import Prediction

Write = Callable[["Prediction"], None]
LOG = logging.getLogger(__name__)
STDIN = "-"
ROWS_AT_ONCE = 10_000  # row group of a .parquet file
HELD_IN_MEMORY = 16 * 2**20  # bytes of results that wait in memory; more go to a temporary file
SECONDS_BETWEEN_LINES = 10


def predict(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER... IMAGES",
            help="adapter folders or hf:USER/NAME; then images: files, folders, quoted patterns, - for paths on stdin",
            show_default=False,
        ),
    ],
    weights: Weights = None,
    top: Annotated[
        int | None, typer.Option(help="classes to name; none: 1, or all above the threshold", min=1, show_default=False)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="least probability, where images may have several classes; none: 0.5", min=0, max=1, show_default=False
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="table to write: .csv or .parquet", show_default=False)] = None,
    skip_broken: SkipBroken = False,
    background: Background = None,
    batch_size: Annotated[int, typer.Option(help="images per forward", min=1)] = 64,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="one answer of all adapters: the mean of their probabilities")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Name the class of each image, with one adapter or several of one backbone."""
    from visgraft.data.images import Skipped
    from visgraft.serve.prediction import check_same_backbone, predict_stream

    adapters, images = split_arguments(arguments)
    check_same_backbone(adapters)
    table = None if out is None else choose_table(out)
    paths, total = find_images(images)
    broken: list[Skipped] = []
    streamed = skip_broken and not json and out is None  # no image can stop it, so lines need not wait for the end
    progress = StreamProgress(total, hidden=streamed and sys.stdout.isatty())
    found = predict_stream(
        adapters,
        paths,
        weights=weights,
        top=top,
        threshold=threshold,
        batch_size=batch_size,
        background=background,
        ensemble=ensemble,
        on_broken=(lambda *why: broken.append(Skipped(*why))) if skip_broken else None,
        on_progress=progress.show,
    )
    answering = ["ensemble of " + " and ".join(adapters)] if ensemble else adapters
    sink = table(out, _width(adapters, top)) if out and table else _printed(len(answering), json, streamed)
    rows = _write_all(found, sink, progress, broken)
    _report(out, answering, rows // len(answering), progress, broken, json)


def _write_all(
    found: Iterator["Prediction"],
    sink: AbstractContextManager[Write],
    progress: "StreamProgress",
    broken: Sequence["Skipped"],
) -> int:
    """Write every prediction and return their number; what is written stays only if there is at least one."""
    rows = 0
    with sink as write, progress:
        for prediction in found:
            write(prediction)
            rows += 1
        if not rows:
            none = f"none of the {len(broken)} images decodes, e.g. {broken[0].reason}" if broken else ""
            raise DataError(none or "standard input names no image")
    return rows


def _report(
    out: Path | None,
    adapters: Sequence[str],
    images: int,
    progress: "StreamProgress",
    broken: Sequence["Skipped"],
    json: bool,
) -> None:
    """List what was left out, and sum up what was written to a file."""
    from visgraft.cli.show import emit, print_skipped
    from visgraft.cli.text import visible

    skipped = [{"image": _written(path), "reason": reason} for path, reason in broken]
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
        kinds = f" × {len(adapters)} adapters" if len(adapters) > 1 else ""
        emit(figures, json, lambda: print(visible(f"{out}: {images:,} images{kinds}, {progress.rate}")))


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which arguments are adapters, and which name images.

    Raises:
        AdapterError: the first one is no adapter.
        DataError: none names images.
    """
    from visgraft.adapters.directory import CONFIG, read_record
    from visgraft.adapters.hub import on_hub

    adapters = [path for path in arguments if on_hub(path) or os.path.isfile(os.path.join(path, CONFIG))]
    if arguments[0] not in adapters:
        read_record(arguments[0])
    images = [argument for argument in arguments if argument not in adapters]
    if not images:
        raise DataError("no images are given; add files, a folder, a quoted pattern, or - for standard input")
    return adapters, images


def find_images(arguments: Sequence[str]) -> tuple[Iterator[str], int | None]:
    """Return the paths of images in the order of the arguments, and their number; None where standard input tells.

    Raises:
        DataError: an argument leads to no image.
    """
    parts = [None if argument == STDIN else _matching(argument) for argument in arguments]
    lines = (name for name in (line.rstrip("\r\n") for line in sys.stdin) if name)
    total = None if None in parts else sum(len(part or ()) for part in parts)
    return chain.from_iterable(lines if part is None else part for part in parts), total


def _matching(argument: str) -> list[str]:
    """Return the images that an argument names: a file as it is, those below a folder, those that match a pattern."""
    from visgraft.data.decode import is_image
    from visgraft.data.folders import passed_over

    if os.path.isdir(argument):
        others = list[str]()
        found = list(_images_below(argument, others))
        told = passed_over(others) if others else ""
        if not found:
            why = f" ({told})" if told else ""
            raise DataError(
                f"{argument} holds no images{why}, and no adapter_config.json of an adapter; check the path"
            )
        if told:
            LOG.info("%s: %s", argument, told)
        return found
    if os.path.exists(argument):
        return [argument]
    if not glob.has_magic(argument):
        raise DataError(f"{argument}: No such file or folder; pass images, a folder, a quoted pattern, or -")
    matches = sorted(glob.glob(argument, recursive=True))
    found = [path for path in matches if not os.path.isdir(path) and is_image(path)]
    if not found:
        ignored = f" ({len(matches)} others do)" if matches else ""
        raise DataError(f"no images match {argument}{ignored}; check the pattern")
    return found


def _images_below(folder: str, others: list[str], above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the images at any depth, sorted by name, through links too; as text, which for a million is far smaller.

    The names of all other files go to `others`.
    """
    from visgraft.data.decode import is_hidden, is_image

    here = os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder} is a link to a folder above it; remove the link")
    try:
        with os.scandir(folder) as entries:
            shown = sorted((entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
    for name, is_folder in shown:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _images_below(path, others, above | {here})
        elif is_image(path):
            yield path
        else:
            others.append(name)


def _written(path: Path) -> str:
    """Return a path as text that any output can hold, though file names need not be UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@contextmanager
def _printed(adapters: int, json: bool, streamed: bool) -> Iterator[Write]:
    """Yield a writer to standard output; unless `streamed`, nothing appears there before all has gone well."""
    from visgraft.cli.text import json_text, visible

    with tempfile.SpooledTemporaryFile(HELD_IN_MEMORY, "w+", encoding="utf-8") as held:
        file: Any = sys.stdout if streamed else held
        between = "["

        def write_json(found: "Prediction") -> None:
            nonlocal between
            classes = [{"class": name, "probability": p} for name, p in found.classes]
            row = {"image": _written(found.image), "adapter": found.adapter, "classes": classes}
            file.write(between + json_text(row))
            between = ", "

        def write_line(found: "Prediction") -> None:
            named = ", ".join(f"{name} {100 * p:.1f} %" for name, p in found.classes) or "–"
            prefix = f"{found.adapter}: " if adapters > 1 else ""
            line = visible(f"{prefix}{_written(found.image)}: {named}").replace("\n", "\\n")
            file.write(f"{line}\n")

        yield write_json if json else write_line
        if json:
            file.write("]\n")
        if not streamed:
            held.seek(0)
            shutil.copyfileobj(held, sys.stdout)


TableWriter = Callable[[Path, int], AbstractContextManager[Write]]


def choose_table(out: Path) -> TableWriter:
    """Return the writer of a table, by its extension.

    Raises:
        VisgraftError: another extension, a folder, or .parquet without pyarrow.
    """
    tables: dict[str, TableWriter] = {".csv": _csv, ".parquet": _parquet}
    if out.suffix.lower() not in tables or out.is_dir():
        raise VisgraftError(f"--out is {out}, but must be a file that ends in .csv or .parquet")
    if out.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise VisgraftError(
                "a .parquet file needs pyarrow; pip install 'visgraft[parquet]', or write a .csv"
            ) from error
    return tables[out.suffix.lower()]


def _width(adapters: Sequence[str], top: int | None) -> int:
    """Return how many classes a row of the table has room for."""
    from visgraft.adapters.directory import read_record
    from visgraft.serve.prediction import most_named

    records = map(read_record, adapters)
    return max(most_named(record.outputs, record.multi_label, top) for record in records)


def _columns(width: int) -> list[str]:
    numbers = ["", *(f"_{number}" for number in range(2, width + 1))]
    return ["image", "adapter", *(f"{name}{number}" for number in numbers for name in ("class", "probability"))]


def _row(found: "Prediction", width: int) -> list[Any]:
    """Return a row of the table; None where fewer classes are named."""
    missing = [(None, None)] * (width - len(found.classes))
    return [_written(found.image), found.adapter, *chain.from_iterable([*found.classes, *missing])]


@contextmanager
def _new_table(out: Path) -> Iterator[Any]:
    from visgraft.files import new_file

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as file:
            yield file
    except OSError as error:
        raise VisgraftError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from error


@contextmanager
def _csv(out: Path, width: int) -> Iterator[Write]:
    with _new_table(out) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        rows = csv.writer(text)
        rows.writerow(_columns(width))
        yield lambda found: rows.writerow(_row(found, width))
        text.flush()
        text.detach()  # the file below stays open, for its owner to close


@contextmanager
def _parquet(out: Path, width: int) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    columns, rows = _columns(width), list[list[Any]]()
    kinds = [pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    with _new_table(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            if rows:
                writer.write_table(pyarrow.table(list(map(list, zip(*rows, strict=True))), schema=schema))
                rows.clear()

        def write(found: "Prediction") -> None:
            rows.append(_row(found, width))
            if len(rows) >= ROWS_AT_ONCE:
                flush()

        yield write
        flush()


class StreamProgress:
    """Images done, images per second and the time left: a bar on a terminal, otherwise a line now and then.

    The clock starts on entering. Lines come every 10 seconds at first, later whenever a tenth more time has passed.
    """

    def __init__(self, total: int | None, hidden: bool) -> None:
        self.total, self.hidden, self.done = total, hidden, 0
        self.bar: Any = None

    def __enter__(self) -> Self:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        from visgraft.cli.show import progress_console

        self.console, self.begin, self.last = progress_console, time.perf_counter(), 0.0
        if self.console.is_terminal and not self.hidden:
            columns = (BarColumn(bar_width=10), TextColumn("{task.description}", markup=False))
            self.bar = Bar(*columns, console=self.console, redirect_stdout=False)
            self.task = self.bar.add_task("starting", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since entering."""
        return time.perf_counter() - self.begin

    @property
    def rate(self) -> str:
        """Images per second."""
        return f"{self.done / self.seconds:.1f} images/s"

    def show(self, done: int) -> None:
        """Tell that so many images have been read."""
        self.done = done
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=self._line())
        elif not self.hidden and self.seconds - self.last >= max(SECONDS_BETWEEN_LINES, self.last / 10):
            self.last = self.seconds
            self.console.print(self._line())

    def _line(self) -> str:
        if self.total is None:
            return f"{self.done:,} images {self.rate}"
        left = (self.total - self.done) * self.seconds / max(self.done, 1)
        told = f"{left / 3600:.1f} h" if left >= 5400 else f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        return f"{self.done:,} of {self.total:,} images {self.rate} {told} left"
