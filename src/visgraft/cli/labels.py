"""Which images a verb reads and what their labels are, as typed: one argument of the verb for seven of the command."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from visgraft.cli.arguments import Csv, Data, TaskFolders, source

PANEL = "Labels"


def _columns(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=PANEL, show_default=False)


Label = Annotated[
    str | None, _columns("columns of a table to learn, e.g. category,colour,reading; none: label, or labels")
]
Number = Annotated[str | None, _columns("columns that hold numbers, perhaps with their units: reading=bar")]
Several = Annotated[str | None, _columns("columns that hold several classes each, as a|b")]
OneClass = Annotated[str | None, _columns("columns that hold one class each, though they look like numbers")]


@dataclass(frozen=True)
class TypedImages:
    """Images as named on the command line: by a place, a table and its label columns, or a place for each task."""

    data: Data = None
    csv: Csv = None
    label: Label = None
    number: Number = None
    several: Several = None
    one_class: OneClass = None
    task: TaskFolders = None

    def source(self) -> Any:
        """Return what `read_data` reads.

        Raises:
            DataError: nothing is named, or two things that do not go together.
        """
        from visgraft.data.label_columns import LabelColumns

        columns = LabelColumns.parsed(self.label, self.number, self.several, self.one_class)
        return source(self.data, self.csv, self.task, columns)

    def words(self) -> list[object]:
        """Return what is to be typed to name the same images again."""
        from visgraft.cli.text import path_argument

        words: list[object] = [path_argument(self.data)] if self.data else []
        for name in ("csv", "label", "number", "several", "one_class"):
            value = getattr(self, name)
            words += [f"--{name.replace('_', '-')}", value] if value else []
        for text in self.task or ():
            words += ["--task", text]
        return words
