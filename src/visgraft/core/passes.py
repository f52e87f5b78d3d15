"""Tasks that are answered in passes of their own: the model runs a batch once for each, all copies side by side.

The copies of a task lie together, [tasks × B, ...], so that a method can tell them apart by unflattening the first
axis, however many windows the backbone makes of an image.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class RepeatImages:
    """Hook before a model: its images [B, 3, H, W] once for each task, [tasks × B, 3, H, W]."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *rest = args
        return images.repeat(self.tasks, *(1,) * (images.ndim - 1)), *rest


class PickOutputs:
    """Hook behind a model: of the outputs [tasks × B, outputs], each task's own from its own copies, [B, outputs]."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.ends = [sum(widths[:number]) for number in range(len(widths) + 1)]

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        each = output.unflatten(0, (len(self.ends) - 1, -1))
        return torch.cat([each[task, :, start:stop] for task, (start, stop) in enumerate(pairwise(self.ends))], -1)
