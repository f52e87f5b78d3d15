"""Which share of a GPU a trial needs, from what earlier trials of its method took."""

from collections.abc import Iterable
from math import floor

from visgraft.bench.trial import Result, Trial

MARGIN = 1.2
"""What a trial may take beyond an earlier one of its method: another task has other numbers of classes."""
CONTEXT = 2**30
"""Bytes that a process takes on a GPU beside its tensors."""


def gpu_share(trial: Trial, done: Iterable[Result]) -> float | None:
    """Return the largest share 1/n of a GPU in which n trials like the earlier ones of this method fit side by side.

    None: no trial of the method with this backbone, batch size and precision was measured on a GPU; or only one fits.
    """
    like = [
        result for result in done if result.device_memory_bytes and _memory_facts(result.trial) == _memory_facts(trial)
    ]
    if not like:
        return None
    needed = MARGIN * max(result.peak_memory_bytes for result in like) + CONTEXT
    together = floor(min(result.device_memory_bytes or 0 for result in like) / needed)
    return 1 / together if together > 1 else None


def _memory_facts(trial: Trial) -> tuple[object, ...]:
    """Return what the memory of a training depends on."""
    chosen = {
        name: trial.train.get(name) for name in ("batch_size", "precision", "grad_checkpointing", "mixup", "cutmix")
    }
    return trial.method, trial.backbone, chosen
