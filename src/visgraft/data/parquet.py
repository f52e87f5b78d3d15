"""Columns of a .parquet file as text, a batch at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visgraft.errors import DataError

ROWS_AT_ONCE = 10_000


def open_parquet(path: Path) -> Any:
    """Return pyarrow's `ParquetFile`.

    Raises:
        DataError: it cannot be read, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow to be read; pip install 'visgraft[parquet]', or pass a .csv") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give the path of a .parquet file") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def parquet_texts(path: Path, columns: Sequence[int]) -> Iterator[tuple[str | None, ...]]:
    """Yield the values of some columns, by their numbers, row by row: whole numbers as digits, True and False so.

    Arrow would write the latter in lower case, unlike Python and pandas in a .csv file of the same table.

    Raises:
        DataError: a column holds no text, or the file cannot be read.
    """
    file = open_parquet(path)
    import pyarrow

    names = [file.schema_arrow.names[column] for column in columns]
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
            texts = []
            for name in names:
                column = batch.column(name)
                if pyarrow.types.is_boolean(column.type):
                    texts.append([None if value is None else str(value) for value in column.to_pylist()])
                    continue
                try:
                    texts.append(column.cast(pyarrow.string()).to_pylist())
                except pyarrow.ArrowException as error:
                    raise DataError(
                        f"{path}, column {name} is of type {str(column.type)[:60]}, which is no text; "
                        "write paths and names there"
                    ) from error
            yield from zip(*texts, strict=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return DataError(f"{path} is no readable .parquet file ({reason}); write it anew")
