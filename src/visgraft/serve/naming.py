"""What answers are called: classes with their probabilities, and, of several tasks, numbers in their units."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from visgraft.data.tasks import LabelTask, digits_of, output_slices, written

THRESHOLD = 0.5
"""Least probability of a class, where an image may have several, unless the user says otherwise."""

Classes = list[tuple[str, float]]
"""Names of classes with their probabilities, most probable first."""


class NumberAnswer(NamedTuple):
    """A number in its `unit`, which is empty where the user gave none; with a coverage between `low` and `high`.

    `spread` is the standard deviation of the training images' numbers, by which it is written with enough digits.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    spread: float = 0.0

    def __str__(self) -> str:
        said = f"{self._digits(self.value)} {self.unit}".rstrip()
        if self.low is None or self.high is None:
            return said
        return f"{said} ({self._digits(self.low)} to {self._digits(self.high)})"

    def _digits(self, value: float) -> str:
        if 1e-3 <= abs(value) < 1e4 or not value:
            return written(value, self.spread)
        return f"{value:,.{digits_of(value, self.spread, 6)}g}"

    def told(self) -> dict[str, float | str]:
        """Return what of it is an answer, by name."""
        known = {name: value for name, value in self._asdict().items() if value is not None}
        return {name: value for name, value in known.items() if name != "spread"}


TaskAnswers = dict[str, Classes | NumberAnswer]
"""What is answered to each task, by its name."""


def best_classes(
    names: Sequence[str], probabilities: Tensor, several: bool, top: int | None, threshold: float
) -> list[Classes]:
    """Return the most probable classes of each image, of probabilities [B, classes] on the CPU.

    Args:
        names: of the classes.
        probabilities: see above.
        several: an image may have several classes, or none: those of at least `threshold` are named.
        top: how many at most; None: one, or of several all.
        threshold: see above.
    """
    best = probabilities.topk(most_named(probabilities.shape[-1], several, top))
    least = threshold if several else 0.0
    return [
        [(names[i], p) for p, i in zip(values, indices, strict=True) if p >= least]
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def most_named(outputs: int, several: bool, top: int | None) -> int:
    """Return how many classes of `outputs` are named at most."""
    return min(top or (outputs if several else 1), outputs)


def answers_to_tasks(
    tasks: Sequence[LabelTask], answers: Tensor, top: int | None, threshold: float
) -> list[TaskAnswers]:
    """Return what each image is answered, of what the adapter's record makes of outputs, [B, outputs] on the CPU."""

    def of_all(task: LabelTask, own: Tensor) -> Sequence[Classes | NumberAnswer]:
        if task.kind == "number":
            return [NumberAnswer(value, task.unit, spread=task.std) for value in own[:, 0].tolist()]
        return best_classes(task.classes, own, task.kind == "several_classes", top, threshold)

    return by_image(tasks, answers, of_all)


def by_image(
    tasks: Sequence[LabelTask],
    answers: Tensor,
    of_all: Callable[[LabelTask, Tensor], Sequence[Classes | NumberAnswer]],
) -> list[TaskAnswers]:
    """Return the answers to all tasks of each image, where `of_all` gives those to one task from its columns."""
    slices = output_slices(tasks)
    columns = {task.name: of_all(task, answers[:, own]) for task, own in zip(tasks, slices, strict=True)}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(answers))]


def in_words(answer: Classes | NumberAnswer) -> str:
    """Return an answer for people: classes with percentages, or a number with its unit."""
    if isinstance(answer, NumberAnswer):
        return str(answer)
    return ", ".join(f"{name} {100 * p:.1f} %" for name, p in answer) or "–"
