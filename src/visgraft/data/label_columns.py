"""Which columns of a table are labels, and what each holds: a class, several classes, or a number."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from visgraft.data.table_lines import folded
from visgraft.data.tasks import Kind, LabelTask
from visgraft.errors import DataError, nearest

MOST_CLASSES = 20
"""A column of whole numbers with more different ones than this holds numbers, with fewer classes."""
MOSTLY = 0.8
WRITTEN_OTHERWISE = re.compile(r"[-+]?(\d+,\d+|\d+([.,]\d+)?\s*%|\d{1,3}([,.'\u2019\s]\d{3})+([.,]\d+)?)")
"""Numbers that people write with a decimal comma, as percentages, or with their thousands apart."""
SEPARATORS = ";|"


@dataclass(frozen=True)
class LabelColumns:
    """The columns to learn, by name; what those hold that are in `numbers` (with units), `several` or `one_class`.

    A column that is in one of these need not be named before.

    Raises:
        DataError: a column is named twice, or is to hold two kinds at once, or names are no tuple.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, str] = field(default_factory=dict)
    several: tuple[str, ...] = ()
    one_class: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("names", "several", "one_class"):
            if isinstance(getattr(self, part), str):
                raise DataError(f"{part} is the text {getattr(self, part)!r}; give a tuple of columns")
        if not isinstance(self.numbers, Mapping):
            raise DataError(f"numbers is {self.numbers!r}; give a unit for each column, such as {{'size': 'cm'}}")
        kinds = (*self.numbers, *self.several, *self.one_class)
        named = {folded(name) for name in self.names}
        object.__setattr__(self, "names", (*self.names, *(n for n in kinds if folded(n) not in named)))
        for what, names in (("a kind", kinds), ("a label", self.names)):
            alike = [folded(name) for name in names]
            twice = next((name for name in names if alike.count(folded(name)) > 1), None)
            if twice is not None:
                raise DataError(f"column {twice} is given {what} twice; name it once")

    @classmethod
    def parsed(cls, label: str | None, number: str | None, several: str | None, one_class: str | None) -> Self | None:
        """Return what options say: names joined by commas, a number's unit after "="; None where nothing is named.

        Raises:
            DataError: see the class.
        """
        numbers = {name: unit for name, _, unit in (text.partition("=") for text in _names(number))}
        if "" in numbers:
            raise DataError(f"--number {number} has a unit without a column; write --number NAME=UNIT")
        columns = cls(_names(label), numbers, _names(several), _names(one_class))
        return columns if columns.names else None

    @classmethod
    def of(cls, tasks: Sequence[LabelTask]) -> Self:
        """Return the columns that answer the tasks of a model."""
        by_kind = {
            kind: tuple(task.name for task in tasks if task.kind == kind) for kind in ("several_classes", "one_class")
        }
        numbers = {task.name: task.unit for task in tasks if task.kind == "number"}
        return cls(tuple(task.name for task in tasks), numbers, by_kind["several_classes"], by_kind["one_class"])

    def given_kind(self, name: str) -> Kind | None:
        """Return what a column is said to hold; None where nobody said."""
        kinds: tuple[tuple[Kind, Iterable[str]], ...] = (
            ("number", self.numbers), ("several_classes", self.several), ("one_class", self.one_class)
        )  # fmt: skip
        return next((kind for kind, names in kinds if folded(name) in {folded(n) for n in names}), None)

    def unit(self, name: str) -> str:
        """Return the unit of a number's column, empty where none is given."""
        return next((unit for given, unit in self.numbers.items() if folded(given) == folded(name)), "")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def as_number(cell: str) -> float | None:
    """Return the finite number that a cell holds, or None; 1_000 is a name, though Python reads it as 1000."""
    try:
        value = float(cell.replace("_", "?"))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def found_kind(name: str, cells: Iterable[str], where: str) -> Kind:
    """Return what a column holds by its different cells.

    Numbers with decimals, or of more than 20 different values, are numbers; names joined by "|" or ";" that also stand
    alone are several classes; anything else is one class.

    Raises:
        DataError: most cells are numbers but some are not.
    """
    known = {cell for cell in cells if cell}
    numbers = {cell: as_number(cell) for cell in known}
    right = [value for value in numbers.values() if value is not None]
    measured = any(not value.is_integer() for value in right) or len(right) > MOST_CLASSES
    if len(right) == len(known):
        return "number" if measured else "one_class"
    names = [cell for cell, value in numbers.items() if value is None]
    written = [cell for cell in names if WRITTEN_OTHERWISE.fullmatch(cell)]
    if len(right) + len(written) > MOST_CLASSES and len(right) + len(written) >= MOSTLY * len(known):
        odd = min(written or names)
        raise DataError(
            f"{where}: most of column {name} are numbers, but {odd!r} is none; write it as 3.5, leave the cell blank, "
            f"or say --one-class {name}"
        )
    pieces = [split_names(cell) for cell in known if re.search(f"[{SEPARATORS}]", cell)]
    return "several_classes" if any(piece in known for some in pieces for piece in some) else "one_class"


def split_names(cell: str, separators: str = SEPARATORS) -> list[str]:
    """Return the names in a cell of several."""
    return [name.strip() for name in re.split(f"[{re.escape(separators)}]", cell) if name.strip()]


def separator_of(cells: Iterable[str]) -> str:
    """Return what separates names in a column of several: ";" where any cell has one, otherwise "|"."""
    return ";" if any(";" in cell for cell in cells) else "|"


def check_columns(names: Sequence[str], header: Sequence[str], taken: Sequence[str], where: str) -> None:
    """Raise a DataError unless each column is there once and is no other's; `header` is `folded`."""
    for name in names:
        count = header.count(folded(name))
        if count != 1:
            others = [other for other in header if other not in taken]
            found = "two columns" if count else "no column"
            raise DataError(
                f"{where} has {found} {name}; its columns are {', '.join(other or '(nothing)' for other in header)}"
                f"{nearest(folded(name), others, 1) if not count else ''}"
            )
        if folded(name) in taken:
            raise DataError(f"{where}: column {name} is no label; name one of {', '.join(set(header) - set(taken))}")
