"""Adapters of one small backbone with random weights, and pictures on which there is something to learn."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support import enliven

import visgraft
from visgraft import Backbone

SPEC = Backbone("test_vit", "none", 32)
CLASSES = ("blue", "green", "red")


@functools.cache
def backbone() -> Any:
    return visgraft.create_backbone(SPEC, len(CLASSES))


def adapter(folder: Path, config: Any, seed: int = 1, change: Callable[[Any], None] = lambda model: None) -> Path:
    """An adapter of the one backbone whose tensors are off their start; `change` changes them further."""
    if config.has_places:
        config = dataclasses.replace(config, last_blocks=2)  # further ones take time and say the same
    torch.manual_seed(seed)
    path = folder / f"{config.method}-{seed}"
    model = visgraft.attach(backbone(), config, [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)])
    try:
        enliven(model, seed)
        change(model)
        return visgraft.save(model, path, classes=CLASSES)
    finally:
        visgraft.detach(model)


def picture(generator: np.random.Generator, colour: int, place: int, stripes: int) -> Image.Image:
    """A coloured square at one of three places, under stripes of three directions."""
    pixels, along = generator.integers(60, 196, (32, 32, 3)).astype(float), np.arange(32)
    x, y = ((4, 4), (18, 4), (11, 18))[place]
    pixels[y : y + 10, x : x + 10] = 128
    pixels[y : y + 10, x : x + 10, colour] = 230
    wave = (along[None, :], along[:, None], along[None, :] + along[:, None])[stripes]
    pixels += 50 * np.sign(np.sin(1.3 * wave))[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(root: Path, task: int, count: int, seed: int) -> Path:
    """Pictures labelled by one of the three, whatever the other two are."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        kinds = generator.integers(0, 3, 3)
        kinds[task] = number % 3
        folder = root / CLASSES[kinds[task]]
        folder.mkdir(parents=True, exist_ok=True)
        picture(generator, *kinds).save(folder / f"{number}.png")
    return root
