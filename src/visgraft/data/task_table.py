"""Tables with several label columns, or with one that holds a number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visgraft.data.binding import bind, check_outputs
from visgraft.data.dataset import Dataset, Split, check_classes, fill_parts, known_names, left_out_note, match_classes
from visgraft.data.examples import Coded, Columns, Examples
from visgraft.data.label_columns import (
    LabelColumns,
    as_number,
    check_columns,
    found_kind,
    separator_of,
    split_names,
)
from visgraft.data.table import (
    GROUP,
    PATH,
    SPLIT,
    LabelColumn,
    TableColumns,
    given_parts,
    read_table,
    rows_by_name,
    table_fingerprint,
    table_header,
    table_rows,
)
from visgraft.data.table_lines import BLANK, at_line, folded, records
from visgraft.data.tasks import LARGEST, LabelTask, TaskLabels, outputs_of
from visgraft.errors import DataError

TAKEN = (PATH, SPLIT, GROUP)
Value = int | tuple[int, ...] | float | None


def read_task_table(
    table: str | Path,
    folder: str | Path | None,
    split: Split,
    columns: LabelColumns,
    known: Sequence[LabelTask] = (),
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Read images from a table whose label columns are named: one task for each.

    A single column of classes is read as `read_table` reads its column label. A blank cell is a label that is not
    known; a row with none is left out, which `notes` says. In a column of several, "|" alone stands for no class.
    What a column holds is found by its cells, unless `columns` or the `known` tasks of a model say it.

    Raises:
        DataError: the table cannot be used; the message names the line or the column.
    """
    table = Path(table)
    header = table_header(table)
    check_columns(columns.names, header, TAKEN, str(table))
    names = [folded(name) for name in columns.names]
    if len(names) == 1 and not known and columns.given_kind(names[0]) != "number":
        place = header.index(names[0])
        cells = {fields[place].strip() for _, fields in records(table, header, names) if len(fields) > place}
        cells = {cell for cell in cells if cell.casefold() not in BLANK}
        kind = columns.given_kind(names[0]) or found_kind(columns.names[0], cells, str(table))
        if kind != "number":
            label = LabelColumn(columns.names[0], kind == "several_classes")
            return read_table(table, folder, split, classes, label)
    rows = table_rows(table, folder, header, names)
    return _Reading(table, rows, columns, known).dataset(split)


@dataclass(frozen=True)
class _Reading:
    """The rows of a table on their way to a data set."""

    table: Path
    rows: TableColumns
    columns: LabelColumns
    known: Sequence[LabelTask]

    def dataset(self, split: Split) -> Dataset:
        values, tasks = self._values()
        check_outputs(tasks, str(self.table))
        labelled = np.array([any(value is not None for value in own) for own in values])[self.rows.labels.codes]
        if not labelled.any():
            raise DataError(f"{self.table} has no label in any row; fill in {', '.join(self.columns.names)}")
        by_name = rows_by_name(self.rows)
        labels = Coded(self.rows.labels.codes, [TaskLabels(own, tasks) for own in values])
        groups = None if set(self.rows.groups.values) == {None} else self.rows.groups
        examples = Examples(Columns(self.rows.paths, labels, groups, self.rows.sizes), by_name[labelled[by_name]])
        given, flat, where = given_parts(self.table, self.rows, examples, bool(self.known))
        found, drawn_by = fill_parts(given, outputs_of(tasks), split, flat, where)
        if not self.known:
            found, tasks = bind(found, tasks, str(self.table))
        kinds = [f"{task.name} ({task.kind})" for task in tasks]
        marks = [tuple(f"{n}={c}" for n, c in zip(kinds, own, strict=True)) for own in self._cells()]
        layout: Literal["split", "flat"] = "flat" if flat else "split"
        return Dataset(
            self.table, outputs_of(tasks), found["train"], found["val"], found["test"], layout,
            table_fingerprint(self.rows, marks, by_name), drawn_by, notes=left_out_note(labelled), tasks=tasks,
        )  # fmt: skip

    def _cells(self) -> list[tuple[str, ...]]:
        """Return the label cells of each distinct row of labels."""
        return [tuple("" if c.casefold() in BLANK else c for c in own) for own in self.rows.labels.values]

    def _values(self) -> tuple[list[tuple[Value, ...]], tuple[LabelTask, ...]]:
        """Return what each distinct row of labels says, and the tasks."""
        cells = self._cells()
        columns, tasks = [], []
        for place, name in enumerate(self.columns.names):
            own = [row[place] for row in cells]
            task = next((task for task in self.known if folded(task.name) == folded(name)), None)
            values, made = self._column(name, own, task)
            columns.append(values)
            tasks.append(made)
        return list(zip(*columns, strict=True)), tuple(tasks)

    def _column(self, name: str, cells: Sequence[str], known: LabelTask | None) -> tuple[list[Value], LabelTask]:
        given = known.kind if known else self.columns.given_kind(name)
        kind = given or found_kind(name, cells, str(self.table))
        if kind == "number":
            numbers = [self._number(name, place, cell) for place, cell in enumerate(cells)]
            return numbers, known or LabelTask(name, kind, unit=self.columns.unit(name))
        separator, spell = separator_of(cells), known_names(known.classes if known else None)
        several = kind == "several_classes"
        split = [[spell(n) for n in (split_names(c, separator) if several else [c])] if c else [] for c in cells]
        used, where = {n for names in split for n in names}, f"{self.table}, column {name}"
        if known:
            classes = match_classes(used, known.classes, where, several)
        else:
            classes = tuple(sorted(used))
            check_classes(classes, where)
            if len(classes) < 2:
                found = f"only one class, {classes[0]}" if classes else "no class at all"
                raise DataError(f"{where} has {found}; at least two are needed, or leave the column out of --label")
        index = {n: number for number, n in enumerate(classes)}
        sets = [tuple(sorted({index[n] for n in names})) if c else None for names, c in zip(split, cells, strict=True)]
        values: list[Value] = list(sets) if several else [None if s is None else s[0] for s in sets]
        return values, known or LabelTask(name, kind, classes)

    def _number(self, name: str, place: int, cell: str) -> Value:
        value = as_number(cell) if cell else None
        if cell and value is None:
            raise DataError(f"{self._line(place)}: {name} is {cell!r}, which is no number; write it as 3.5")
        if value is not None and abs(value) > LARGEST:
            line = self._line(place)
            raise DataError(f"{line}: {name} is {cell}, but numbers go up to {LARGEST:g}; write them in another unit")
        return value

    def _line(self, place: int) -> str:
        """Return how an error names the first line that has these labels."""
        return at_line(self.table, int(self.rows.lines[np.argmax(self.rows.labels.codes == place)]))


def with_tasks(dataset: Dataset, tasks: Sequence[LabelTask]) -> Dataset:
    """Return a data set whose labels answer a model's tasks, of which it may lack some."""
    if not tasks or tuple(tasks) == dataset.tasks:
        return dataset
    place = {task.name: number for number, task in enumerate(dataset.tasks)}
    order = [place.get(task.name) for task in tasks]
    parts: dict[str, Any] = {}
    for part in ("train", "val", "test"):
        examples = getattr(dataset, part)
        if len(examples):
            assert isinstance(examples, Examples)
            labels = examples.columns.labels
            values = [
                TaskLabels(tuple(None if o is None else v.values[o] for o in order), tuple(tasks))
                for v in labels.values
            ]
            parts[part] = Examples(replace(examples.columns, labels=Coded(labels.codes, values)), examples.rows)
    absent = {task.name: f"{dataset.root} has no column {task.name}" for task in tasks if task.name not in place}
    return replace(dataset, classes=outputs_of(tasks), tasks=tuple(tasks), absent=absent, **parts)
