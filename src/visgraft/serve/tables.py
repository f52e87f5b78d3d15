"""Answers as tables: a row for each image and adapter, in a .csv or .parquet file that appears when it is whole."""

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from visgraft.errors import VisgraftError
from visgraft.files import new_file
from visgraft.serve.decoding import AnyPath
from visgraft.serve.layout import ERROR, TableColumn, TableLayout, joined
from visgraft.serve.prediction import Prediction

ROWS_AT_ONCE = 10_000  # row group of a .parquet file

Row = list[Any]
Write = Callable[[Prediction], None]
TableWriter = Callable[[Path, TableLayout], AbstractContextManager[Write]]
"""Given a file's name and the columns of the table."""


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
def csv_table(out: Path, layout: TableLayout) -> Iterator[Write]:
    """Yield a writer of predictions to a .csv file, that becomes `out` when all went well."""
    with _new_table(out) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        rows = csv.writer(text)
        rows.writerow([column.name for column in layout.columns()])
        yield lambda found: rows.writerow(map(joined, _row(layout, found)))
        text.flush()
        text.detach()  # the file below stays open, for its owner to close


@contextmanager
def parquet_table(out: Path, layout: TableLayout) -> Iterator[Write]:
    """Yield a writer of predictions to a .parquet file, that becomes `out` when all went well."""
    with _parquet(out, layout.columns()) as write:
        yield lambda found: write(_row(layout, found))


@contextmanager
def parquet_part(out: Path, layout: TableLayout) -> Iterator[Callable[[Prediction, str | None], None]]:
    """Yield a writer of predictions and, where an image is broken, the reason, to a part of a table."""
    with _parquet(out, [*layout.columns(), TableColumn(ERROR, "text")]) as write:
        yield lambda found, error: write([*_row(layout, found), None if error is None else written(error)])


def _row(layout: TableLayout, found: Prediction) -> Row:
    far = (found.as_far, found.unlike)
    return layout.row(written(found.image), found.adapter, found.classes, found.tasks, far)


@contextmanager
def _new_table(out: Path) -> Iterator[Any]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out) as file:
            yield file
    except OSError as error:
        raise VisgraftError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from error


@contextmanager
def _parquet(out: Path, columns: list[TableColumn]) -> Iterator[Callable[[Row], None]]:
    import pyarrow
    import pyarrow.parquet

    rows = list[Row]()
    kinds = {"text": pyarrow.string(), "number": pyarrow.float64()}
    kinds["flag"] = pyarrow.bool_()
    kinds |= {"texts": pyarrow.list_(kinds["text"]), "numbers": pyarrow.list_(kinds["number"])}
    schema = pyarrow.schema(
        [
            pyarrow.field(one.name, kinds[one.holds], metadata={"unit": one.unit} if one.unit else None)
            for one in columns
        ]
    )
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
