"""The lines of a table, whatever kind of file it is."""

import csv
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from visgraft.data.parquet import open_parquet, parquet_texts
from visgraft.errors import DataError, nearest

DELIMITERS = ",;\t"
BLANK = ("", "nan")  # the second is how pandas and Arrow write a number that is missing


def folded(name: str) -> str:
    """Return a column's name as columns are compared: in lower case, its accents composed."""
    return unicodedata.normalize("NFC", name.strip().casefold())


def read_lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of each row that is not empty, the header first; the header tells the delimiter.

    Raises:
        DataError: the table cannot be read; the message names the line.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(DELIMITERS, key=first.count), strict=True)
            try:
                yield from ((reader.line_num, fields) for fields in reader if any(field.strip() for field in fields))
            except csv.Error as error:
                raise DataError(f"{table}, line {reader.line_num}: {error}; repair the quotes there") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 text; save it as CSV UTF-8") from error
    except FileNotFoundError as error:
        beside = [path.name for path in table.parent.iterdir()] if table.parent.is_dir() else []
        raise DataError(f"{table} does not exist; give the path of a .csv file{nearest(table.name, beside)}") from error
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror}); give the path of a .csv file") from error


def is_parquet(table: Path) -> bool:
    """Whether a table is a .parquet file, by its ending."""
    return table.suffix.lower() == ".parquet"


def at_line(table: Path, line: int) -> str:
    """Return how an error names a line of a table, or a row."""
    return f"{table}, {'row' if is_parquet(table) else 'line'} {line}"


def column_names(table: Path) -> list[str] | None:
    """Return the names of a table's columns, `folded`; None where it is empty.

    Raises:
        DataError: the table cannot be read.
    """
    names = open_parquet(table).schema_arrow.names if is_parquet(table) else next(read_lines(table), (0, None))[1]
    return None if names is None else [folded(name) for name in names]


def records(table: Path, header: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of each row that is not empty; of a .parquet file (row, fields), the `wanted` ones filled.

    Raises:
        DataError: the table cannot be read.
    """
    if not is_parquet(table):
        yield from islice(read_lines(table), 1, None)
        return
    places = [place for place, name in enumerate(header) if name in wanted]
    for row, values in enumerate(parquet_texts(table, places), 1):
        fields = [""] * len(header)
        for place, value in zip(places, values, strict=True):
            fields[place] = value or ""
        yield row, fields
