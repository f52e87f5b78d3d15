"""Pictures without labels on which two adapters answer, and how often they answer alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from visgraft.adapters.record import AdapterRecord
from visgraft.data.dataset import Example
from visgraft.data.images import Images, load_images
from visgraft.measure.intervals import clusters, rate_interval


@dataclass(frozen=True)
class Agreement:
    """The share of `images` that both answer alike with their most probable class, and its 95 % interval.

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


def find_agreement(logits: tuple[Tensor, Tensor], classes: tuple[Sequence[str], Sequence[str]]) -> Agreement | None:
    """Compare answers [N, outputs] each; None where the two do not name the same classes.

    Of adapters without names for their outputs, as many outputs are the same classes.
    """
    outputs = tuple(one.shape[1] for one in logits)
    names = [list(named) or [str(n) for n in range(count)] for named, count in zip(classes, outputs, strict=True)]
    if set(names[0]) != set(names[1]) or not outputs[0]:
        return None
    answers = [[known[n] for n in one.argmax(-1).tolist()] for known, one in zip(names, logits, strict=True)]
    alike = np.array([a == b for a, b in zip(*answers, strict=True)], dtype=np.float64)
    apart = (logits[0] - logits[1]).abs().max().item() if names[0] == names[1] else None
    return Agreement(float(alike.mean()), rate_interval(alike, clusters([], len(alike))), len(alike), apart)
