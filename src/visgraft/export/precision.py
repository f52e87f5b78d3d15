"""Weights of a model in half precision, and which share of answers an export with compressed weights must keep."""

import copy

import torch
from torch import Tensor, nn

from visgraft.export.format import AGREEMENT, ExportError

LEAST_AGREEMENT = f"share of answers that must be the model's, in less than fp32; none: {AGREEMENT}"
"""Help of the option `least_agreement` of formats with a `precision`."""


class InHalf(nn.Module):
    """A model with its weights in a type of 16 bits, which it computes in too; it takes and answers float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype).eval(), dtype

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model(x.to(self.dtype))
        return answer.float()


def check_agreement(least: float | None, precision: str) -> None:
    """Raise unless a least share of equal answers says something about weights in this precision.

    Raises:
        ExportError: the precision is fp32, of which every logit is compared, or it is no share.
    """
    if least is not None and precision == "fp32":
        raise ExportError(
            "--least-agreement has no effect on --precision fp32, which answers as the model; leave it out"
        )
    if least is not None and not 0 <= least <= 1:
        raise ExportError(f"--least-agreement is {least}, but must be between 0 and 1")
