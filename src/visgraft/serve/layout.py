"""Which columns a table of answers has, whatever adapters answer: those of classes, and those of each task by name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

from visgraft.adapters.record import AdapterRecord
from visgraft.data.label_columns import SEPARATORS
from visgraft.data.tasks import Kind, LabelTask
from visgraft.errors import AdapterError
from visgraft.serve.naming import Classes, NumberAnswer, TaskAnswers, most_named

ERROR = "error"
FAR = ("as_far", "unlike")
Cell = str | float | list[str] | list[float] | None


class TableColumn(NamedTuple):
    """A column of a table: its name, what its cells hold, and the unit of numbers."""

    name: str
    holds: Literal["text", "number", "texts", "numbers", "flag"]
    unit: str = ""


@dataclass(frozen=True)
class TaskColumns:
    """The columns of one task.

    Attributes:
        task: its name, by which predictions hold its answer.
        kind: what an answer is.
        unit: of a number.
        width: how many classes a row names at most, of one class.
        name: of the first column; another than the task's where a column has that already.
        bounds: whether a number has an interval.
    """

    task: str
    kind: Kind
    unit: str
    width: int
    name: str
    bounds: bool = False

    def columns(self) -> Iterator[TableColumn]:
        """Yield them."""
        if self.kind == "number":
            for end in ("", *(("_low", "_high") if self.bounds else ())):
                yield TableColumn(f"{self.name}{end}", "number", self.unit)
        elif self.kind == "several_classes":
            yield TableColumn(self.name, "texts")
            yield TableColumn(f"{self.name}_probability", "numbers")
        else:
            for number in _numbers(self.width):
                yield TableColumn(f"{self.name}{number}", "text")
                yield TableColumn(f"{self.name}_probability{number}", "number")

    def cells(self, answer: Classes | NumberAnswer | None) -> list[Cell]:
        """Return what a row holds there; None: the adapter is not asked this."""
        if self.kind == "number":
            said = answer if isinstance(answer, NumberAnswer) else None
            cells: list[Cell] = [said and said.value, *((said and said.low, said and said.high) if self.bounds else ())]
            return cells
        named = answer if isinstance(answer, list) else []
        if self.kind == "several_classes":
            known = answer is not None
            return [[name for name, _ in named] if known else None, [p for _, p in named] if known else None]
        return _paired(named, self.width)


@dataclass(frozen=True)
class TableLayout:
    """The columns of a table of answers.

    Attributes:
        width: how many classes a row names at most, of adapters that answer one question; 0: there is none.
        tasks: the columns of each task.
        far: whether a row says how far the picture lies from those of the training.
    """

    width: int
    tasks: tuple[TaskColumns, ...] = ()
    far: bool = False

    def columns(self) -> list[TableColumn]:
        """Return all columns in order, without that for errors."""
        pairs = ((f"class{number}", f"probability{number}") for number in _numbers(self.width))
        of_classes = chain.from_iterable((TableColumn(name, "text"), TableColumn(p, "number")) for name, p in pairs)
        of_tasks = chain.from_iterable(one.columns() for one in self.tasks)
        far = [TableColumn(FAR[0], "number"), TableColumn(FAR[1], "flag")] if self.far else []
        return [TableColumn("image", "text"), TableColumn("adapter", "text"), *of_classes, *of_tasks, *far]

    def row(
        self,
        image: str,
        adapter: str,
        classes: Classes,
        tasks: TaskAnswers | None,
        far: tuple[float | None, bool | None] = (None, None),
    ) -> list[Cell]:
        """Return a row of the table; None where fewer classes are named, or nothing is asked."""
        of_tasks = chain.from_iterable(one.cells((tasks or {}).get(one.task)) for one in self.tasks)
        return [image, adapter, *_paired(classes, self.width), *of_tasks, *(far if self.far else ())]


def table_layout(
    records: Mapping[str, AdapterRecord], top: int | None, coverage: float | None = None, far: bool = False
) -> TableLayout:
    """Return the columns in which the answers of these adapters, by name, find room.

    With a coverage a set may hold every class, and a number has an interval; `far` says how far pictures lie.

    Raises:
        AdapterError: two of them answer a task of one name in different ways.
    """
    single = [record for record in records.values() if not record.tasks]
    covered = coverage is not None

    def most_of(outputs: int, several: bool) -> int:
        return outputs if covered else most_named(outputs, several, top)

    width = max((most_of(record.outputs, record.multi_label) for record in single), default=0)
    found = dict[str, tuple[str, LabelTask, int]]()
    for name, record in records.items():
        for task in record.tasks:
            other, first, most = found.get(task.name, (name, task, 0))
            if (first.kind, first.unit) != (task.kind, task.unit):
                raise AdapterError(
                    f"{other} answers {_told(first)}, and {name} answers {_told(task)}, which share no column; write "
                    "the answers of each to a table of its own"
                )
            found[task.name] = other, first, max(most, most_of(task.outputs, task.kind == "several_classes"))
    taken, tasks = {ERROR, *FAR, *(column.name for column in TableLayout(width).columns())}, list[TaskColumns]()
    for _, task, most in found.values():
        made = TaskColumns(task.name, task.kind, task.unit, most, task.name, covered)
        while taken & {column.name for column in made.columns()}:
            made = replace(made, name=f"{made.name}_")
        taken |= {column.name for column in made.columns()}
        tasks.append(made)
    return TableLayout(width, tuple(tasks), far)


def joined(cell: Cell) -> Any:
    """Return a cell as a .csv holds it: several names or numbers joined as a table of labels joins them."""
    if not isinstance(cell, list):
        return cell
    texts = [str(one) for one in cell]
    return (SEPARATORS[1] if any(SEPARATORS[0] in text for text in texts) else SEPARATORS[0]).join(texts)


def _told(task: LabelTask) -> str:
    kinds = {"one_class": "with one class", "several_classes": "with several classes", "number": "with a number"}
    return f"{task.name} {kinds[task.kind]}{f' in {task.unit}' if task.unit else ''}"


def _numbers(width: int) -> list[str]:
    return ["", *(f"_{number}" for number in range(2, width + 1))][:width]


def _paired(classes: Sequence[tuple[str, float]], width: int) -> list[Cell]:
    missing = [(None, None)] * (width - len(classes))
    return list(chain.from_iterable([*classes, *missing]))
