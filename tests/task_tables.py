"""Pictures whose colour, brightness and corner are the labels in a table, some of them blank."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visgraft.data.label_columns import LabelColumns

COLUMNS = LabelColumns(("colour", "size", "tags"), {"size": "mm"}, ("tags",))


def shop(folder: Path, count: int = 60, seed: int = 0, **more: Any) -> Path:
    """Pictures whose colour, brightness and corner are their labels, some of them blank."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        red, level, dot = bool(random.integers(2)), float(random.uniform(40, 200)), bool(random.integers(2))
        pixels = random.normal(level, 12, (36, 36, 3))
        pixels[..., 0 if red else 2] += 55
        if dot:
            pixels[:12, :12] = 255
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
        rows.append({
            "image_path": f"{i:03}.png", "colour": ("red" if red else "blue") if i % 7 else "",
            "size": f"{level:.1f}" if i % 5 else "", "tags": ("dot|far" if dot else "far") if i % 2 else "|",
            "split": "train" if i % 3 else "val", **{name: value(i) for name, value in more.items()},
        })  # fmt: skip
    return write(folder / "shop.csv", rows)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
