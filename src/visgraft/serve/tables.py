"""Answers as tables: a row for each image and adapter, in a .csv or .parquet file that appears when it is whole."""

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from visgraft.errors import VisgraftError
from visgraft.files import new_file
from visgraft.serve.decoding import AnyPath
from visgraft.serve.prediction import Classes, Prediction

ROWS_AT_ONCE = 10_000  # row group of a .parquet file
ERROR = "error"

Row = list[Any]
Write = Callable[[Prediction], None]
TableWriter = Callable[[Path, int], AbstractContextManager[Write]]
"""Given a file's name and how many classes a row names at most."""


def written(path: AnyPath) -> str:
    """Return a path as text that any output can hold, though file names need not be UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def check_pyarrow(out: Path) -> None:
    """Raise a VisgraftError that says what to install, where .parquet files cannot be written."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        instead = "; pip install 'visgraft[parquet]', or write a .csv"
        raise VisgraftError(f"{out} needs pyarrow, because it holds .parquet{instead}") from error


@contextmanager
def csv_table(out: Path, width: int) -> Iterator[Write]:
    """Yield a writer of predictions to a .csv file, that becomes `out` when all went well."""
    with _new_table(out) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        rows = csv.writer(text)
        rows.writerow(_columns(width))
        yield lambda found: rows.writerow(_row(found.image, found.adapter, found.classes, width))
        text.flush()
        text.detach()  # the file below stays open, for its owner to close


@contextmanager
def parquet_table(out: Path, width: int) -> Iterator[Write]:
    """Yield a writer of predictions to a .parquet file, that becomes `out` when all went well."""
    with _parquet(out, _columns(width)) as write:
        yield lambda found: write(_row(found.image, found.adapter, found.classes, width))


@contextmanager
def parquet_part(out: Path, width: int) -> Iterator[Callable[[AnyPath, str, Classes, str | None], None]]:
    """Yield a writer of image, adapter, classes and, where it is broken, the reason, to a part of a table."""
    with _parquet(out, [*_columns(width), ERROR]) as write:
        yield lambda image, adapter, classes, error: write(
            [*_row(image, adapter, classes, width), None if error is None else written(error)]
        )


def _columns(width: int) -> list[str]:
    numbers = ["", *(f"_{number}" for number in range(2, width + 1))]
    return ["image", "adapter", *(f"{name}{number}" for number in numbers for name in ("class", "probability"))]


def _row(image: AnyPath, adapter: str, classes: Classes, width: int) -> Row:
    """Return a row of the table; None where fewer classes are named."""
    missing = [(None, None)] * (width - len(classes))
    return [written(image), adapter, *chain.from_iterable([*classes, *missing])]


@contextmanager
def _new_table(out: Path) -> Iterator[Any]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as file:
            yield file
    except OSError as error:
        raise VisgraftError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from error


@contextmanager
def _parquet(out: Path, columns: list[str]) -> Iterator[Callable[[Row], None]]:
    import pyarrow
    import pyarrow.parquet

    rows = list[Row]()
    kinds = [pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    with _new_table(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            if rows:
                writer.write_table(pyarrow.table(list(map(list, zip(*rows, strict=True))), schema=schema))
                rows.clear()

        def write(row: Row) -> None:
            rows.append(row)
            if len(rows) >= ROWS_AT_ONCE:
                flush()

        yield write
        flush()
