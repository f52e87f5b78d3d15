"""One task of several on its own: its images, its outputs, and its figure on any choice of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from visgraft.data.cache import Pixels
from visgraft.data.images import Images
from visgraft.data.task_tensors import known
from visgraft.data.tasks import LabelTask, column_slices, output_slices

FigureOn = Callable[[np.ndarray], float]
"""The figure of a task on images of these numbers, which may come several times; nan where none has its label."""


class OutputsOf(nn.Module):
    """A model of which only the outputs of one task are seen."""

    def __init__(self, model: nn.Module, outputs: slice) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the task's outputs [B, outputs] for images [B, 3, H, W]."""
        found: Tensor = self.model(x)[:, self.outputs]
        return found


@dataclass(frozen=True)
class _Some:
    """Some of many pixels, wherever those are kept."""

    pixels: Pixels
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[images, 3, H, W]."""
        return (len(self.rows), *self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any, /) -> Tensor:
        chosen = self.rows[index]
        return self.pixels[int(chosen)] if chosen.ndim == 0 else self.pixels[chosen]


def images_of_task(images: Images, number: int) -> Images:
    """Return the images whose label of the task with this number is known, labelled for that task alone.

    Labels of classes are as those of images that never had another task; a number keeps its task, labels being
    float32 [K, 1].
    """
    task, columns = images.tasks[number], column_slices(images.tasks)[number]
    there, own = known(images.labels, task, columns)
    rows = torch.nonzero(there).flatten()
    places, is_number = rows.tolist(), task.kind == "number"
    return replace(
        images,
        pixels=_Some(images.pixels, rows),
        labels=own[:, None] if is_number else own,
        paths=[images.paths[i] for i in places] if images.paths else (),
        groups=tuple(images.groups[i] for i in places) if images.groups else (),
        outputs=task.outputs,
        tasks=(task,) if is_number else (),
    )


def mean_precision(answers: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean average precision of answers [repeats, N, classes] for labels [N, classes]; nan: no class."""
    present = labels.any(0)
    if not present.any():
        return float("nan")
    truth = labels[:, present]
    return float(np.mean([average_precision_score(truth, one[:, present], average="macro") for one in answers]))


def figures_on(answers: Tensor, labels: Tensor, tasks: Sequence[LabelTask]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of rows of images that gives the figure of each task on them, float64 [tasks].

    The figures are those of `Evaluation.by_task`, their means over the repeats; nan where no image has a label.

    Args:
        answers: [repeats, N, outputs], as `task_answers` gives them.
        labels: [N, columns].
        tasks: what both are of.
    """
    places = zip(tasks, output_slices(tasks), column_slices(tasks), strict=True)
    each = [_figure_on(answers[..., outputs], labels, task, columns) for task, outputs, columns in places]
    return lambda rows: np.array([figure(rows) for figure in each])


def _figure_on(answers: Tensor, labels: Tensor, task: LabelTask, columns: slice) -> FigureOn:
    there, own = known(labels, task, columns)
    said, has, place = answers[:, there], there.numpy(), np.cumsum(there.numpy()) - 1
    if task.kind == "one_class":
        right = (said.argmax(-1) == own).double().mean(0).numpy()
    numbers, true = said.double().numpy(), own.double().numpy()

    def figure(rows: np.ndarray) -> float:
        chosen = place[rows[has[rows]]]
        if not len(chosen):
            return float("nan")
        if task.kind == "one_class":
            return float(right[chosen].mean())
        if task.kind == "several_classes":
            return mean_precision(numbers[:, chosen], true[chosen])
        return explained(numbers[:, chosen, 0], true[chosen])

    return figure


def explained(numbers: np.ndarray, true: np.ndarray) -> float:
    """Return R² of numbers [repeats, N] against the true ones [N], 0 at least; nan where these do not vary."""
    around = ((true - true.mean()) ** 2).sum()
    if around == 0:
        return float("nan")
    return float(np.maximum(0.0, 1 - ((numbers - true) ** 2).sum(1) / around).mean())


def mean_known(figures: np.ndarray) -> np.ndarray:
    """Return the mean over the tasks of figures [resamples, tasks], without those that are nan; nan where all are."""
    there = ~np.isnan(figures)
    found: np.ndarray = np.where(there, figures, 0.0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)
    return found
