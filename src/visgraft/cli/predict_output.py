"""What `predict` prints or writes: lines, JSON or a table, whole or not at all; and how far it has come."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from visgraft.errors import VisgraftError

if TYPE_CHECKING:
    from visgraft.serve.prediction import Prediction
    from visgraft.serve.tables import TableWriter, Write

HELD_IN_MEMORY = 16 * 2**20  # bytes of results that wait in memory; more go to a temporary file
SECONDS_BETWEEN_LINES = 10


@contextmanager
def printed(adapters: int, json: bool, streamed: bool) -> Iterator["Write"]:
    """Yield a writer to standard output; unless `streamed`, nothing appears there before all has gone well."""
    from visgraft.cli.text import json_text, visible
    from visgraft.serve.naming import in_words
    from visgraft.serve.tables import written

    with tempfile.SpooledTemporaryFile(HELD_IN_MEMORY, "w+", encoding="utf-8") as held:
        file: Any = sys.stdout if streamed else held
        between = "["

        def write_json(found: "Prediction") -> None:
            nonlocal between
            row: dict[str, Any] = {"image": written(found.image), "adapter": found.adapter, **_fields(found)}
            row |= {} if found.unlike is None else {"as_far": found.as_far, "unlike": found.unlike}
            file.write(between + json_text(row))
            between = ", "

        def write_line(found: "Prediction") -> None:
            if found.tasks is None:
                named = in_words(found.classes)
            else:
                named = "; ".join(f"{name}: {in_words(answer)}" for name, answer in found.tasks.items())
            prefix = f"{found.adapter}: " if adapters > 1 else ""
            far = f" (unlike: {100 * (found.as_far or 0):.1f} % as far)" if found.unlike else ""
            line = visible(f"{prefix}{written(found.image)}: {named}{far}").replace("\n", "\\n")
            file.write(f"{line}\n")

        yield write_json if json else write_line
        if json:
            file.write("]\n")
        if not streamed:
            held.seek(0)
            shutil.copyfileobj(held, sys.stdout)


def _fields(found: "Prediction") -> dict[str, Any]:
    """Return what a prediction says, as JSON values: its classes, or the answer to each task."""
    from visgraft.serve.naming import NumberAnswer

    def of_task(answer: Any) -> dict[str, Any]:
        if not isinstance(answer, NumberAnswer):
            return {"classes": _classes(answer)}
        return answer.told()

    if found.tasks is None:
        return {"classes": _classes(found.classes)}
    return {"tasks": {name: of_task(answer) for name, answer in found.tasks.items()}}


def _classes(named: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class": name, "probability": p} for name, p in named]


def choose_table(out: Path, read: Sequence[str] = ()) -> "TableWriter":
    """Return the writer of a table, by its extension; `read` are the files that name images.

    Raises:
        VisgraftError: another extension, a folder, a file that is read, or .parquet without pyarrow.
    """
    from visgraft.serve.tables import check_pyarrow, csv_table, parquet_table

    tables: dict[str, TableWriter] = {".csv": csv_table, ".parquet": parquet_table}
    if out.is_dir() or not is_table_name(out):
        raise VisgraftError(f"--out is {out}, but must be a file that ends in .csv or .parquet, or a folder for parts")
    if out.exists() and any(os.path.exists(path) and out.samefile(path) for path in read):
        raise VisgraftError(f"--out is {out}, which is read and would be overwritten; give the answers another name")
    if out.suffix.lower() == ".parquet":
        check_pyarrow(out)
    return tables[out.suffix.lower()]


def is_table_name(out: Path) -> bool:
    """Whether answers go to one file, by its extension, rather than to a folder."""
    return out.suffix.lower() in (".csv", ".parquet")


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
