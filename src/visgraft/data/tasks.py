"""Several questions about one image: what each asks, the labels that are known, and which outputs answer it.

The outputs of all tasks lie side by side in one head, so that a model with several tasks is a model like any other: a
class task has an output per class, a number one. Only what is made of the outputs differs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, Self, get_args

import numpy as np

Kind = Literal["one_class", "several_classes", "number"]
FIGURES: dict[Kind, str] = {"one_class": "top-1", "several_classes": "mean average precision", "number": "R²"}
"""What an answer of each kind is judged by."""
LARGEST = 1e30
"""Greatest number that a label may be, as labels and answers are held in single precision."""
BINS = 5  # into which numbers are sorted where images are drawn or channels are scored by their labels


@dataclass(frozen=True)
class LabelTask:
    """What is asked of an image: one class, several, or a number.

    Attributes:
        name: of the label column or of the folder's task.
        kind: what an answer is.
        classes: names of the classes, in order; empty for a number.
        unit: of a number, as the user wrote it.
        mean: of the training images' numbers, in that unit; what a constant answer would say.
        std: their standard deviation; the model answers (number - mean) / std.
        low: their least.
        high: their greatest.

    Raises:
        ValueError: the kind is none of these, a class comes twice, or a number is not finite or does not vary.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    unit: str = ""
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"task {self.name!r} is a {self.kind!r}, not one of {', '.join(get_args(Kind))}")
        if not all(map(math.isfinite, (self.mean, self.std, self.low, self.high))) or self.std <= 0:
            raise ValueError(f"task {self.name!r} has the mean {self.mean} and the standard deviation {self.std}")
        if bool(self.classes) == (self.kind == "number"):
            raise ValueError(f"task {self.name!r} is a {self.kind} with {len(self.classes)} classes")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"task {self.name!r} has the class {twice!r} twice")

    @property
    def outputs(self) -> int:
        """How many outputs of the head answer it."""
        return len(self.classes) or 1

    @property
    def columns(self) -> int:
        """How many columns of `Images.labels` hold its labels."""
        return len(self.classes) if self.kind == "several_classes" else 1

    @property
    def output_names(self) -> tuple[str, ...]:
        """What its outputs are called among those of all tasks."""
        return tuple(f"{self.name}={name}" for name in self.classes) or (self.name,)

    def __str__(self) -> str:
        if self.kind == "number":
            low, high = (written(value, self.std, 6) for value in (self.low, self.high))
            return f"{self.name}: a number from {low} to {high}{f' {self.unit}' if self.unit else ''}"
        return f"{self.name}: {'one' if self.kind == 'one_class' else 'any number'} of {len(self.classes)} classes"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote.

        Raises:
            TypeError: a value is of the wrong type or unknown.
            ValueError: one is missing or out of range; see also the class.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"task {values!r:.80} is no dictionary")
        name = values.get("name")
        kinds: dict[str, Any] = dict.fromkeys(("mean", "std", "low", "high"), float) | {"classes": list}
        for part in (one.name for one in fields(cls)):
            if part not in values:
                raise ValueError(f"task {name!r} has no {part}")  # no default: numbers would come out in another scale
            value, kind = values[part], kinds.get(part, str)
            if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
                raise TypeError(f"task {name!r} has the {part} {value!r:.80}")
            if kind is float and not abs(value) <= LARGEST:
                raise ValueError(f"task {name!r} has the {part} {value!r}")
        if not all(isinstance(text, str) for text in values["classes"]):
            raise TypeError(f"task {name!r} has classes that are no text")
        return cls(**{**values, "classes": tuple(values["classes"])})


@dataclass(frozen=True)
class TaskLabels:
    """What is known of one image: for each task the index of its class, the indices of its classes, a number, or None.

    `tasks` are what the values answer, the same for all images of a data set.
    """

    values: tuple[int | tuple[int, ...] | float | None, ...]
    tasks: tuple[LabelTask, ...] = field(compare=False, repr=False)

    def known_outputs(self) -> Iterator[int]:
        """Yield the numbers of the outputs, among those of all tasks, of the classes that the image has."""
        for value, place in zip(self.values, output_slices(self.tasks), strict=True):
            if isinstance(value, tuple):
                yield from (place.start + index for index in value)
            elif isinstance(value, int):
                yield place.start + value


def digits_of(value: float, spread: float, digits: int = 4) -> int:
    """Return with how many digits that count a number is written, at least `digits`.

    There are more where numbers that scatter by `spread`, their standard deviation, would otherwise look alike.
    """
    if not (value and spread > 0 and math.isfinite(value) and math.isfinite(spread)):
        return digits
    return max(digits, math.floor(math.log10(abs(value))) - math.floor(math.log10(spread)) + 2)


def written(value: float, spread: float, digits: int = 4) -> str:
    """Return a number as text with the digits of `digits_of`."""
    return f"{value:.{digits_of(value, spread, digits)}g}"


def output_slices(tasks: Sequence[LabelTask]) -> list[slice]:
    """Return which outputs answer each task."""
    return _slices([task.outputs for task in tasks])


def class_outputs(tasks: Sequence[LabelTask]) -> list[int]:
    """Return the numbers of the outputs that stand for classes, without those that answer a number."""
    places = zip(tasks, output_slices(tasks), strict=True)
    return [number for task, place in places if task.classes for number in range(place.start, place.stop)]


def column_slices(tasks: Sequence[LabelTask]) -> list[slice]:
    """Return which columns of `Images.labels` hold each task's labels."""
    return _slices([task.columns for task in tasks])


def _slices(widths: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *widths]).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


def outputs_of(tasks: Sequence[LabelTask]) -> tuple[str, ...]:
    """Return the names of the outputs of all tasks."""
    return tuple(name for task in tasks for name in task.output_names)


def figure_name(tasks: Sequence[LabelTask]) -> str:
    """Return what a model with these tasks is judged by: the mean of their figures, or the only one's."""
    return FIGURES[tasks[0].kind] if len(tasks) == 1 else "mean of the tasks"


def label_row(labels: TaskLabels) -> list[float]:
    """Return an image's row of `Images.labels`: a class's index, 0 or 1 for each of several, a number; NaN: unknown."""
    row: list[float] = []
    for value, task in zip(labels.values, labels.tasks, strict=True):
        if value is None:
            row += [math.nan] * task.columns
        elif isinstance(value, tuple):
            row += [float(index in value) for index in range(task.columns)]
        else:
            row.append(float(value))
    return row
