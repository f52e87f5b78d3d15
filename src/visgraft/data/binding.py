"""What the training images tell of a data set's tasks, once its parts are known: whether each can be learned."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from visgraft.data.dataset import listed
from visgraft.data.examples import Coded, Example, Examples, labels_of
from visgraft.data.tasks import LabelTask
from visgraft.errors import DataError

SMALLEST = 1e-30
"""Least standard deviation of numbers; below about 1e-38 single precision has fewer digits."""


def check_outputs(tasks: Sequence[LabelTask], where: str) -> None:
    """Raise a DataError where an output of one task has the name of another's, as a=b=c of the tasks a and a=b."""
    first = dict[str, str]()
    for task in tasks:
        for output in task.output_names:
            if (other := first.setdefault(output, task.name)) != task.name:
                raise DataError(
                    f"{where}: {other} and {task.name} both have an output called {output}; rename one of these tasks, "
                    "or its class"
                )


def bind(
    parts: Mapping[str, Sequence[Example]], tasks: Sequence[LabelTask], where: str
) -> tuple[dict[str, Sequence[Example]], tuple[LabelTask, ...]]:
    """Return the parts with labels that know their tasks, whose numbers are described by the training images.

    Raises:
        DataError: a class has no training image, or a number does not vary enough among them.
    """
    labels = labels_of(parts["train"])
    used = [labels.values[code] for code in labels.codes.tolist()]
    made = tuple(
        _described(task, [own.values[place] for own in used], where)
        if task.kind == "number"
        else _learnable(task, [own.values[place] for own in used], where)
        for place, task in enumerate(tasks)
    )
    return {part: _bound(examples, made) for part, examples in parts.items()}, made


def _bound(examples: Sequence[Example], tasks: tuple[LabelTask, ...]) -> Sequence[Example]:
    if not isinstance(examples, Examples):
        return examples  # an empty part
    labels = examples.columns.labels
    values = [replace(value, tasks=tasks) for value in labels.values]
    return Examples(replace(examples.columns, labels=Coded(labels.codes, values)), examples.rows)


def _described(task: LabelTask, values: Sequence[float | None], where: str) -> LabelTask:
    numbers = np.array([value for value in values if value is not None], np.float64)
    if len(np.unique(numbers)) < 2:
        found = f"only the number {numbers[0]:.12g}" if len(numbers) else "no number"
        raise DataError(
            f"{where}: the training images have {found} in column {task.name}; at least two different ones are needed, "
            "or leave the column out of --label"
        )
    _check_precision(task, numbers, where)
    return replace(
        task, mean=float(numbers.mean()), std=float(numbers.std()), low=float(numbers.min()), high=float(numbers.max())
    )


def _check_precision(task: LabelTask, numbers: np.ndarray, where: str) -> None:
    """Raise a DataError where float32, in which labels and answers are held, tells the numbers apart too coarsely."""
    low, high, std = numbers.min(), numbers.max(), numbers.std()
    step = float(np.spacing(np.float32(np.abs(numbers).max())))
    if std < max(100 * step, SMALLEST):
        raise DataError(
            f"{where}: the numbers of the training images in column {task.name} are from {low:.12g} to {high:.12g}, "
            f"which vary too little to be told apart in single precision; write them as differences from {low:.12g}, "
            "or in another unit"
        )


def _learnable(task: LabelTask, values: Sequence[int | tuple[int, ...] | None], where: str) -> LabelTask:
    seen = {
        index for value in values if value is not None for index in (value if isinstance(value, tuple) else (value,))
    }
    absent = [name for index, name in enumerate(task.classes) if index not in seen]
    if absent:
        raise DataError(
            f"{where}: classes of {task.name} have no train image: {listed(absent)}; add or move images, or change the "
            "seed"
        )
    return task
