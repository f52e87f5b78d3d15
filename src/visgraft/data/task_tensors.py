"""Labels and outputs of several tasks as tensors: whose labels are known, and what outputs say."""

from collections.abc import Sequence

import torch
from torch import Tensor

from visgraft.data.tasks import BINS, LabelTask, column_slices, output_slices


def known(labels: Tensor, task: LabelTask, columns: slice) -> tuple[Tensor, Tensor]:
    """Return which images have a label of a task, bool [N], and those labels.

    The labels are int64 [K], float32 [K, classes] of 0 and 1, or float32 [K] in the unit of the number, of the K images
    that have one; `labels` [N, columns] are those of all tasks.
    """
    own = labels[:, columns]
    there = ~own[:, 0].isnan()
    own = own[there]
    if task.kind == "one_class":
        return there, own[:, 0].long()
    return there, own if task.kind == "several_classes" else own[:, 0]


def task_answers(logits: Tensor, tasks: Sequence[LabelTask]) -> Tensor:
    """Return what outputs [..., outputs] say: probabilities of classes, numbers in their unit."""
    parts = []
    for task, place in zip(tasks, output_slices(tasks), strict=True):
        own = logits[..., place]
        if task.kind == "number":
            parts.append(own * task.std + task.mean)
        else:
            parts.append(own.softmax(-1) if task.kind == "one_class" else own.sigmoid())
    return torch.cat(parts, -1)


def membership(labels: Tensor, tasks: Sequence[LabelTask]) -> Tensor:
    """Return what images have, float32 [N, outputs or bins] of 0 and 1: classes, and bins for numbers.

    The bins hold equal shares of a normal distribution with the task's mean and deviation. An image is in none of a
    task whose label is unknown.
    """
    edges = torch.distributions.Normal(0.0, 1.0).icdf(torch.arange(1, BINS) / BINS)
    parts = []
    for task, columns in zip(tasks, column_slices(tasks), strict=True):
        there, own = known(labels, task, columns)
        width = BINS if task.kind == "number" else task.outputs
        found = torch.zeros(len(labels), width)
        if task.kind == "number":
            own = torch.bucketize(((own - task.mean) / task.std).contiguous(), edges)
        found[there] = own if task.kind == "several_classes" else torch.nn.functional.one_hot(own, width).float()
        parts.append(found)
    return torch.cat(parts, 1)
