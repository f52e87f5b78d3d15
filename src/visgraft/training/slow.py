"""What would make a training faster that takes long on this machine."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from visgraft.backbones.creation import Backbone, fit_image_size
from visgraft.backbones.input_size import input_size, patch_size
from visgraft.core.attached import find_attached
from visgraft.errors import VisgraftError
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training.pace import duration
from visgraft.training.resume import Epoch

LONG = 30 * 60.0
"""Seconds of training from which on something is said."""
WATCHED = 10.0
"""Seconds after the first step over which the pace is taken."""


def faster_options(
    model: nn.Module, backbone: Backbone, method: MethodConfig, config: TrainConfig, free: bool = True
) -> list[tuple[str, float]]:
    """Return options of `train` that shorten a training, and to which share of its time, the shortest first.

    Args:
        model: the backbone with the method attached.
        backbone: where it came from.
        method: the method's options.
        config: how it is trained.
        free: whether the method's options can be chosen; those of an adapter to start from cannot.
    """
    found = [(f"--epochs {max(1, config.epochs // 2)}", 0.5)] if config.epochs > 1 else []
    attached, anew = find_attached(model), config.anew
    blocks = len(attached.sites.blocks) if attached else 0
    if free and method.has_places and method.last_blocks is None and not anew and blocks >= 4:
        kept = blocks // 4
        found.append((f"--last-blocks {kept}", kept / blocks + (1 - kept / blocks) / (3 * config.epochs)))
    side, patch = input_size(model)[1], (patch_size(model) or (32, 32))[0]
    smaller = round(0.6 * side / patch) * patch
    with contextlib.suppress(VisgraftError):  # where the model runs on its own size only
        if smaller >= 2 * patch and not fit_image_size(replace(backbone, image_size=smaller))[1]:
            found.append((f"--image-size {smaller}", (smaller / side) ** 2))
    return sorted(found, key=lambda option: option[1])


class LongRun:
    """Says once, after a few seconds of training, that it will take long, and what would help most."""

    def __init__(self, tell: Callable[[str], None], options: Callable[[], list[tuple[str, float]]]) -> None:
        self.tell, self.options = tell, options
        self.begin: float | None = None
        self.told = False

    def __call__(self, epoch: Epoch) -> None:
        """Look at the figures after a step."""
        now = time.monotonic()
        if self.begin is None:
            self.begin = now
        if self.told or now - self.begin < WATCHED:
            return
        self.told = True
        if epoch.seconds_left > LONG:
            helps = " or ".join(f"{option} (about {share:.0%} of the time)" for option, share in self.options()[:2])
            self.tell(
                f"this training will take about {duration(epoch.seconds_left)} on this machine; to be faster, stop it "
                f"and train with {helps}"
            )
