"""One temperature that logits are divided by, so that probabilities mean what they say (Guo et al. 2017).

Everything starts at the probabilities that `evaluate` returns and `predict` prints, in float32, so that validation
images and later ones pass through the very same rounding.
"""

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

LEAST = float(torch.finfo(torch.float32).tiny)
"""The smallest probability that is told from nothing."""
MOST = 1 - float(torch.finfo(torch.float32).eps) / 2
"""The largest that is told from certainty."""
WIDEST = 10.0
"""Of the temperature's logarithm, to either side, as in scikit-learn."""


def recalibrated(probabilities: Tensor, temperature: float, multi_label: bool) -> Tensor:
    """Return the logarithms of probabilities [N, classes] at another temperature, float64.

    They are over all classes, or of each class alone where an image may have several.
    """
    logits = _logits(probabilities, multi_label) / temperature
    return functional.logsigmoid(logits) if multi_label else logits.log_softmax(-1)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """Return the temperature at which labels are most likely, of probabilities [N, classes].

    Labels are int64 [N], or [N, classes] of 0 and 1. As in Platt (1999), one more image than there are is counted as
    undecided: without it the temperature of answers that are all right would be 0, and every answer certain.
    """
    multi_label, share = labels.ndim == 2, 1 / (len(labels) + 2)
    logits, classes = _logits(probabilities, multi_label), probabilities.shape[1]
    loss = functional.binary_cross_entropy_with_logits if multi_label else functional.cross_entropy
    truth = labels.double() if multi_label else functional.one_hot(labels, classes).double()
    wanted = (1 - share) * truth + share * (0.5 if multi_label else 1 / classes)
    found = minimize_scalar(
        lambda log: float(loss(logits / math.exp(log), wanted)), bounds=(-WIDEST, WIDEST), method="bounded"
    )
    return math.exp(found.x)


def _logits(probabilities: Tensor, multi_label: bool) -> Tensor:
    """Return logits that have these probabilities."""
    p = probabilities.double().clamp_min(LEAST)
    return p.log() - torch.log1p(-p.clamp_max(MOST)) if multi_label else p.log()
