"""How much of the demo runs on this machine: measured first, so that nobody waits for a lesson."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.core.attach import attach
from visgraft.data.images import Images
from visgraft.drawn.gauges import POSITIONS
from visgraft.methods.alore import ALoREConfig
from visgraft.options import TrainConfig
from visgraft.training.loop import train

BATCH = 16


@dataclass(frozen=True)
class DemoSize:
    """What the demo draws and trains: images, epochs, adapted last blocks (None: all), and rates other than usual."""

    train: int
    val: int
    test: int
    epochs: int
    last_blocks: int | None = None
    lr: Mapping[str, float] = field(default_factory=dict)

    def steps(self, blocks: int) -> float:
        """What all of it costs, in training steps of one image through all blocks.

        A forward takes a third of a step; of adapted last blocks, those before run once per image. Each test image is
        seen by three methods, by the merged model beside the adapted one, and for pictures.
        """
        share = 1.0 if self.last_blocks is None else self.last_blocks / blocks
        once = 0.0 if self.last_blocks is None else (1 - share) * (self.train + self.val) / 3
        trained = 2 * (once + self.epochs * share * (self.train + self.val / 3))
        return trained + (self.train + self.val) / 3 + 6 * self.test / 3

    def __str__(self) -> str:
        blocks = "all blocks" if self.last_blocks is None else f"the last {self.last_blocks} blocks"
        return f"{self.train} images, {self.epochs} epochs, {blocks}"


FULL = DemoSize(592, 160, 496, 12)
RATES = {"sct": 1e-2, "alore": 5e-3}
SIZES = (
    FULL,
    DemoSize(592, 80, 240, 12, 6, RATES),
    DemoSize(400, 80, 240, 8, 6, RATES),
    DemoSize(272, 48, 128, 10, 6, RATES),
)
"""From all to the least from which sct and alore still learn what linear does not."""


def seconds_per_image(backbone: Backbone) -> float:
    """Measure how long a training step takes here, per image, after a first short epoch."""
    side = backbone.image_size or 224
    pixels = torch.randint(256, (2 * BATCH, 3, side, side), dtype=torch.uint8)
    images = Images(pixels, torch.arange(2 * BATCH) % POSITIONS, (0.5,) * 3, (0.5,) * 3)
    model = attach(create_backbone(backbone, POSITIONS), ALoREConfig())
    found = train(model, images, TrainConfig(epochs=3, warmup_epochs=0.0, batch_size=BATCH)).history
    first, _, last = (epoch.epoch * len(images) / epoch.images_per_second for epoch in found)  # seconds since the start
    return (last - first) / (2 * len(images))


def choose_size(seconds: float, budget: float, blocks: int) -> tuple[DemoSize, float]:
    """Return the largest size that fits into a time, else the least, and the seconds it takes."""
    fitting = [size for size in SIZES if seconds * size.steps(blocks) <= budget]
    size = fitting[0] if fitting else SIZES[-1]
    return size, seconds * size.steps(blocks)
