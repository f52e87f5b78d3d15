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
from visgraft.serve.prediction import Prediction

ROWS_AT_ONCE = 10_000  # row group of a .parquet file
ERROR = "error"

Row = list[Any]
Write = Callable[[Prediction], None]
TableWriter = Callable[[Path, int, bool], AbstractContextManager[Write]]
"""Given a file's name, how many classes a row names at most, and whether it says how far the picture lies."""
FAR = ("as_far", "unlike")


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
def csv_table(out: Path, width: int, far: bool = False) -> Iterator[Write]:
    """Yield a writer of predictions to a .csv file, that becomes `out` when all went well."""
    with _new_table(out) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        rows = csv.writer(text)
        rows.writerow(_columns(width, far))
        yield lambda found: rows.writerow(_row(found, width, far))
        text.flush()
        text.detach()  # the file below stays open, for its owner to close


@contextmanager
def parquet_table(out: Path, width: int, far: bool = False) -> Iterator[Write]:
    """Yield a writer of predictions to a .parquet file, that becomes `out` when all went well."""
    with _parquet(out, _columns(width, far)) as write:
        yield lambda found: write(_row(found, width, far))


@contextmanager
def parquet_part(out: Path, width: int, far: bool = False) -> Iterator[Callable[[Prediction, str | None], None]]:
    """Yield a writer of predictions and, where an image is broken, the reason, to a part of a table."""
    with _parquet(out, [*_columns(width, far), ERROR]) as write:
        yield lambda found, error: write([*_row(found, width, far), None if error is None else written(error)])


def _columns(width: int, far: bool) -> list[str]:
    numbers = ["", *(f"_{number}" for number in range(2, width + 1))]
    return [
        "image",
        "adapter",
        *(f"{name}{number}" for number in numbers for name in ("class", "probability")),
        *(FAR if far else ()),
    ]


def _row(found: Prediction, width: int, far: bool) -> Row:
    """Return a row of the table; None where fewer classes are named."""
    named = chain.from_iterable([*found.classes, *[(None, None)] * (width - len(found.classes))])
    return [written(found.image), found.adapter, *named, *((found.as_far, found.unlike) if far else ())]


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
    number, of_name = pyarrow.float64(), {"as_far": pyarrow.float64(), "unlike": pyarrow.bool_()}
    kinds = [number if name.startswith("probability") else of_name.get(name, pyarrow.string()) for name in columns]
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
