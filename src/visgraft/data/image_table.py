"""Tables of work: images by path, each perhaps with the name of the adapter that is to answer it; read as a stream."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from visgraft.data.parquet import parquet_texts
from visgraft.data.table import PATH
from visgraft.data.table_lines import column_names, read_lines
from visgraft.data.urls import from_folder
from visgraft.errors import DataError, nearest

IMAGE, ADAPTER = ("image", PATH), "adapter"
ENDINGS = (".csv", ".tsv", ".parquet")


class TableImage(NamedTuple):
    """A row: where it stands, the image's path from the table's folder, or its URL, and perhaps its adapter."""

    where: str
    path: str
    adapter: str | None


class ImageTable:
    """A .csv, .tsv or .parquet file with a column `image` (or `image_path`) and perhaps a column `adapter`.

    Relative paths start at the table's folder. Other columns are not read, and no more than a few rows are held.

    Raises:
        DataError: the table cannot be read, or has no column of images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = column_names(self.path) or []
        found = [name for name in IMAGE if name in header]
        if not found:
            named = f"its columns are {', '.join(header) or 'none'}{nearest(IMAGE[0], header, 1)}"
            raise DataError(f"{self.path} has no column {IMAGE[0]} (or {IMAGE[1]}); {named}")
        for name in (*found, ADAPTER):
            if header.count(name) > 1 or len(found) > 1:
                raise DataError(f"{self.path} has two columns for {name}; remove one")
        self.images, self.adapters = header.index(found[0]), header.index(ADAPTER) if ADAPTER in header else None
        self.width = len(header)

    @property
    def mixed(self) -> bool:
        """Whether each row names its adapter."""
        return self.adapters is not None

    def rows(self) -> Iterator[TableImage]:
        """Yield the rows in order.

        Raises:
            DataError: a row names no image, or no adapter where there is such a column.
        """
        for where, fields in self._fields():
            if len(fields) != self.width:
                remedy = "quote fields that contain the delimiter"
                raise DataError(f"{where} has {len(fields)} fields, but the header {self.width}; {remedy}")
            adapter = None if self.adapters is None else fields[self.adapters].strip()
            for name, value in ((IMAGE[0], fields[self.images].strip()), (ADAPTER, adapter)):
                if value == "":
                    raise DataError(f"{where} names no {name}; fill it in, or remove the line")
            yield TableImage(where, from_folder(self.path.parent, fields[self.images].strip()), adapter)

    @property
    def _is_text(self) -> bool:
        return self.path.suffix.lower() != ".parquet"

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        return read_lines(self.path)

    def _fields(self) -> Iterator[tuple[str, list[str]]]:
        if self._is_text:
            lines = self._lines()
            next(lines)
            yield from ((f"{self.path}, line {line}", fields) for line, fields in lines)
            return
        chosen = sorted({self.images, self.images if self.adapters is None else self.adapters})
        for row, values in enumerate(parquet_texts(self.path, chosen), 1):
            fields = [""] * self.width
            for column, value in zip(chosen, values, strict=True):
                fields[column] = value or ""
            yield f"{self.path}, row {row}", fields


def is_table(path: str) -> bool:
    """Whether a path is that of a table, by its ending."""
    return path.lower().endswith(ENDINGS) and os.path.isfile(path)
