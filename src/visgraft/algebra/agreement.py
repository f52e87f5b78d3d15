"""Pictures without labels on which two adapters answer, and how often they answer alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visgraft.adapters.record import AdapterRecord
from visgraft.data.dataset import Example
from visgraft.data.images import Images, load_images
from visgraft.data.task_tensors import task_answers
from visgraft.data.tasks import LabelTask, output_slices
from visgraft.export.task_proof import AGREES
from visgraft.measure.intervals import clusters, rate_interval


@dataclass(frozen=True)
class Agreement:
    """The share of `images` that both answer alike with their most probable class, and its 95 % interval.

    With several tasks, alike are images on which every task's answer is: a number's where it differs by less than a
    tenth of its standard deviation in the first adapter's training.

    `largest_difference` is that of a logit; None where the logits are not those of the same outputs in the same order.
    """

    share: float
    interval: tuple[float, float]
    images: int
    largest_difference: float | None


def load_pictures(paths: Sequence[str | Path], record: AdapterRecord) -> Images:
    """Load pictures without labels as they were prepared for an adapter's training.

    Raises:
        DataError: a file is no image, or there is none.
    """
    examples = [Example(Path(path), 0) for path in paths]
    return load_images(examples, record.data_config, background=record.background)


def find_agreement(logits: tuple[Tensor, Tensor], records: tuple[AdapterRecord, AdapterRecord]) -> Agreement | None:
    """Compare answers [N, outputs] each; None where the two do not name the same classes, or answer the same tasks.

    Of adapters without names for their outputs, as many outputs are the same classes.
    """
    classes = records[0].classes, records[1].classes
    if records[0].tasks or records[1].tasks:
        return _of_tasks(logits, (records[0].tasks, records[1].tasks))
    outputs = tuple(one.shape[1] for one in logits)
    names = [list(named) or [str(n) for n in range(count)] for named, count in zip(classes, outputs, strict=True)]
    if set(names[0]) != set(names[1]) or not outputs[0]:
        return None
    answers = [[known[n] for n in one.argmax(-1).tolist()] for known, one in zip(names, logits, strict=True)]
    alike = np.array([a == b for a, b in zip(*answers, strict=True)], dtype=np.float64)
    apart = (logits[0] - logits[1]).abs().max().item() if names[0] == names[1] else None
    return _agreement(alike, apart)


def _of_tasks(
    logits: tuple[Tensor, Tensor], tasks: tuple[Sequence[LabelTask], Sequence[LabelTask]]
) -> Agreement | None:
    ours, theirs = ([(task.name, task.kind, task.classes, task.unit) for task in each] for each in tasks)
    if ours != theirs:
        return None
    answers = [task_answers(own, of) for own, of in zip(logits, tasks, strict=True)]
    alike = torch.ones(len(logits[0]), dtype=torch.bool)
    for task, place in zip(tasks[0], output_slices(tasks[0]), strict=True):
        one, other = (answer[:, place] for answer in answers)
        if task.kind == "one_class":
            alike &= one.argmax(-1) == other.argmax(-1)
        elif task.kind == "number":
            alike &= (one - other).abs()[:, 0] < AGREES * task.std
        else:
            alike &= ((one > 0.5) == (other > 0.5)).all(-1)
    apart = (logits[0] - logits[1]).abs().max().item() if tuple(tasks[0]) == tuple(tasks[1]) else None
    return _agreement(alike.double().numpy(), apart)


def _agreement(alike: np.ndarray, apart: float | None) -> Agreement:
    return Agreement(float(alike.mean()), rate_interval(alike, clusters([], len(alike))), len(alike), apart)
