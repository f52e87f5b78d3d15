"""Which images a verb reads and what their labels are, as typed: one argument of the verb for seven of the command."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
OPTIONS: dict[str, tuple[Any, Any]] = {
    "csv": (Csv, None),
    "label": (Label, None),
    "number": (Number, None),
    "several": (Several, None),
    "one_class": (OneClass, None),
    "task": (TaskFolders, None),
}


@dataclass(frozen=True)
class TypedImages:
    """Images as named on the command line: by a place, a table and its label columns, or a place for each task."""

    data: str | None = None
    csv: Path | None = None
    label: str | None = None
    number: str | None = None
    several: str | None = None
    one_class: str | None = None
    task: tuple[str, ...] = ()

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
        for text in self.task:
            words += ["--task", text]
        return words


def with_labels(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a verb whose parameter `images` is typed as DATA, `--csv`, `--label` and what says more of labels."""
    own = inspect.signature(command)
    keyword = inspect.Parameter.KEYWORD_ONLY
    data = inspect.Parameter("data", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Data)
    options = [
        inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in OPTIONS.items()
    ]
    rest = [p for p in own.parameters.values() if p.name != "images"]
    first = [p.replace(kind=keyword) for p in rest if p.kind is not inspect.Parameter.VAR_KEYWORD]
    last = [p for p in rest if p.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(command)
    def labelled(data: str | None = None, **values: Any) -> Any:
        typed = {name: values.pop(name, None) for name in OPTIONS}
        typed["task"] = tuple(typed["task"] or ())
        return command(TypedImages(data, **typed), **values)

    parameters = [data, *options, *first, *last]
    labelled.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    labelled.__annotations__ = {p.name: p.annotation for p in parameters}
    return labelled
