"""What validation images say of how sure an adapter is: a temperature, and the scores that conformal answers need."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visgraft.data.tasks import LabelTask

ONE_LABEL = ""
"""Of an adapter that answers one question: what stands in place of a task's name."""


@dataclass(frozen=True)
class Calibrated:
    """What was measured on `images` validation images, of which none was trained on.

    Attributes:
        images: how many there were.
        ranks: from 1, ascending, of the scores that are kept; of many images not all are.
        scores: ascending; a score says how far the truth was from the answer (see `measure.conformal`).
        temperature: what logits are divided by; 1 for numbers.
    """

    images: int
    ranks: tuple[int, ...]
    scores: tuple[float, ...]
    temperature: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; ranks only where they are not 1, 2, 3 …"""
        told = {} if len(self.ranks) == self.images else {"ranks": list(self.ranks)}
        return {"temperature": self.temperature, "images": self.images, **told, "scores": list(self.scores)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Calibrated":
        """Return it from `to_json`'s form.

        Raises:
            TypeError, ValueError, KeyError: it is damaged.
        """
        images, scores, temperature = stored["images"], stored["scores"], stored["temperature"]
        if not isinstance(images, int) or not isinstance(scores, list) or not isinstance(temperature, int | float):
            raise TypeError("images, scores or temperature is of another kind")
        ranks = stored.get("ranks", list(range(1, len(scores) + 1)))
        if not all(isinstance(rank, int) for rank in ranks) or not all(isinstance(s, int | float) for s in scores):
            raise TypeError("ranks and scores are not all numbers")
        if not ranks or ranks[-1] != images or len(ranks) != len(scores):
            raise ValueError(f"{len(scores)} scores with {len(ranks)} ranks are not those of {images} images")
        if list(ranks) != sorted(set(ranks)) or ranks[0] < 1 or list(scores) != sorted(scores):
            raise ValueError("ranks or scores do not ascend")
        if not all(math.isfinite(score) for score in scores) or not 0 < temperature < math.inf:
            raise ValueError("a score or the temperature is not finite")
        return cls(images, tuple(ranks), tuple(map(float, scores)), float(temperature))


def told_calibration(by_task: Mapping[str, Calibrated], tasks: Sequence[LabelTask]) -> list[str]:
    """Say how an adapter is calibrated: a text for its one question, or one for each task; nothing where it is not.

    Numbers have no temperature, and a task is without where no validation image had its label.
    """
    if not by_task:
        return []
    if not tasks:
        return [_told(by_task[ONE_LABEL], True)]
    each = {task.name: (by_task.get(task.name), bool(task.classes)) for task in tasks}
    return [f"{name}: {'no' if one is None else _told(one, classes)}" for name, (one, classes) in each.items()]


def _told(one: Calibrated, classes: bool) -> str:
    temperature = f"temperature {one.temperature:.2f}, " if classes else ""
    return f"{temperature}{one.images:,} validation image{'s' * (one.images != 1)}"


def stored_calibration(by_task: Mapping[str, Calibrated]) -> dict[str, Any]:
    """Return the calibration of an adapter as plain JSON values: of its one question, or of each task by name."""
    if ONE_LABEL in by_task:
        return by_task[ONE_LABEL].to_json()
    return {"tasks": {name: one.to_json() for name, one in by_task.items()}}


def read_calibration(stored: Mapping[str, Any], tasks: Collection[str]) -> dict[str, Calibrated]:
    """Return it from `stored_calibration`'s form; `tasks` are the names of the adapter's tasks, if it has any.

    Raises:
        TypeError, ValueError, KeyError: it is damaged.
    """
    if not tasks:
        return {ONE_LABEL: Calibrated.from_json(stored)}
    found = {name: Calibrated.from_json(one) for name, one in stored["tasks"].items()}
    if not found.keys() <= set(tasks):
        raise ValueError(f"there is no task {', '.join(found.keys() - set(tasks))}")
    return found
