"""The loss of several tasks at once: the mean over the labels that are known, each in units of a constant answer's."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from visgraft.data.task_tensors import known
from visgraft.data.tasks import LabelTask, column_slices, output_slices
from visgraft.errors import VisgraftError
from visgraft.options import TrainConfig
from visgraft.training.weighting import class_weights


class TaskLoss:
    """Mean over the known labels of a batch of each label's loss, divided by what the best constant answer costs.

    Cross-entropy for a class, the mean of binary cross-entropies for several, smooth L1 on the standardised number. So
    every task begins near 1, whatever its unit or number of classes. `weights` multiply the tasks' losses.

    Args:
        tasks: what the labels answer.
        labels: those of the training images, [N, columns], which decide what a constant answer costs.
        config: its `task_weights`, `class_weights` and `label_smoothing`.

    Raises:
        VisgraftError: a weight is of no task, or no number above zero.
    """

    def __init__(self, tasks: Sequence[LabelTask], labels: Tensor, config: TrainConfig) -> None:
        self.tasks, self.smoothing = tuple(tasks), config.label_smoothing
        self.factors = {task.name: 1.0 for task in tasks} | task_weights(config.task_weights, tasks)
        self.weights: list[Tensor | None] = []
        self.places = list(zip(tasks, output_slices(tasks), column_slices(tasks), strict=True))
        self.costs = []
        for task, _, columns in self.places:
            _, own = known(labels, task, columns)
            weighted = None if task.kind == "number" else class_weights(own, task.outputs, config.class_weights)
            self.weights.append(weighted)
            self.costs.append(constant_cost(task, own))

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits [B, outputs] against labels [B, columns]; 0 where no label is known."""
        total, count = logits.sum() * 0.0, 0
        for (task, outputs, columns), weights, cost in zip(self.places, self.weights, self.costs, strict=True):
            there, own = known(labels, task, columns)
            if there.any():
                each = self._each(task, logits[there][:, outputs], own, weights)
                total = total + each.sum() * (self.factors[task.name] / cost)
                count += len(own)
        return total / max(count, 1)

    def _each(self, task: LabelTask, logits: Tensor, own: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of every known label of a task [K]."""
        weights = None if weights is None else weights.to(logits.device)
        if task.kind == "number":
            return F.smooth_l1_loss(logits[:, 0], (own - task.mean) / task.std, reduction="none")
        if task.kind == "one_class":
            each = F.cross_entropy(logits, own, reduction="none", label_smoothing=self.smoothing)
            return each if weights is None else each * weights[own]
        target = own * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weights).mean(1)

    def known_labels(self, labels: Tensor) -> Tensor:
        """Return how many labels [B, columns] are known, one per task and image."""
        return sum((~labels[:, columns.start].isnan()).sum() for _, _, columns in self.places)  # type: ignore[return-value]


def constant_cost(task: LabelTask, own: Tensor) -> float:
    """Return the mean loss of the best constant answer to labels as `known` returns them; 1 where it costs nothing."""
    if not len(own):  # of a few images that stand for all, none may have the label
        return 1.0
    if task.kind == "number":
        y = ((own - task.mean) / task.std).double().numpy()

        def cost(constant: float) -> float:
            away = np.abs(y - constant)
            return float(np.where(away < 1, away**2 / 2, away - 0.5).mean())

        found = float(minimize_scalar(cost, bounds=(float(y.min()), float(y.max())), method="bounded").fun)
    else:
        shares = F.one_hot(own, task.outputs).double().mean(0) if task.kind == "one_class" else own.double().mean(0)
        entropy = torch.special.entr(shares)
        found = float(entropy.sum() if task.kind == "one_class" else (entropy + torch.special.entr(1 - shares)).mean())
    return found or 1.0


def task_weights(texts: Sequence[str] | None, tasks: Sequence[LabelTask]) -> dict[str, float]:
    """Return the weights that texts such as "reading=2" give to tasks.

    Raises:
        VisgraftError: there is no such task, or the weight is no number above zero.
    """
    names, found = [task.name for task in tasks], dict[str, float]()
    for text in texts or ():
        name, _, value = text.rpartition("=")
        if name not in names:
            raise VisgraftError(
                f"task_weights names {name or text!r}; write NAME=WEIGHT with one of {', '.join(names)}"
            )
        try:
            found[name] = float(value)
        except ValueError as error:
            raise VisgraftError(f"task_weights gives {name} {value!r}, which is no number; write {name}=2") from error
        if not 0 < found[name] < float("inf"):
            raise VisgraftError(f"task_weights gives {name} {value}, but a weight must be above 0")
    return found
