"""How far two models agree on each of several tasks, and how often each is right."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from visgraft.data.task_tensors import known
from visgraft.data.tasks import LabelTask, column_slices, output_slices

AGREES = 0.1
"""By how much of their standard deviation in training two numbers may differ and still count as the same answer."""


def agreement_by_task(expected: Tensor, found: Tensor, tasks: Sequence[LabelTask]) -> dict[str, dict[str, Any]]:
    """Return for each task the share of equal answers of outputs [N, outputs]; of numbers also how far they differ.

    Equal are answers with the same class, decisions of several classes, and numbers that differ by less than a tenth of
    their standard deviation. `largest_difference` is in the number's unit, `largest_difference_of_std` in deviations.
    """
    told: dict[str, dict[str, Any]] = {}
    for task, place in zip(tasks, output_slices(tasks), strict=True):
        one, other = expected[:, place].double(), found[:, place].double()
        if task.kind == "number":
            apart = (one - other).abs()
            told[task.name] = {
                "agreement": (apart < AGREES).double().mean().item(),
                "largest_difference": apart.max().item() * task.std,
                "largest_difference_of_std": apart.max().item(),
                "unit": task.unit,
            }
        else:
            same = one.argmax(1) == other.argmax(1) if task.kind == "one_class" else (one > 0) == (other > 0)
            told[task.name] = {"agreement": same.double().mean().item()}
    return told


def least_of_tasks(by_task: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the agreement on the task with the lowest."""
    return float(min(one["agreement"] for one in by_task.values()))


def rightness_by_task(logits: Tensor, labels: Tensor | None, tasks: Sequence[LabelTask]) -> dict[str, dict[str, float]]:
    """Return for each task with known labels [N, columns] the `accuracy` of classes, or the `mean_absolute_error`.

    Accuracy is the share of right answers or decisions; the error is in the number's unit.
    """
    told: dict[str, dict[str, float]] = {}
    if labels is None:
        return told
    for task, place, columns in zip(tasks, output_slices(tasks), column_slices(tasks), strict=True):
        there, own = known(labels, task, columns)
        if not len(own):
            continue
        said = logits[there][:, place].double()
        if task.kind == "number":
            apart = (said[:, 0] * task.std + task.mean - own.double()).abs()
            told[task.name] = {"mean_absolute_error": apart.mean().item()}
        else:
            right = said.argmax(1) == own if task.kind == "one_class" else (said > 0) == (own > 0.5)
            told[task.name] = {"accuracy": right.double().mean().item()}
    return told
