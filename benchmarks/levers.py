"""Which parts of a recipe raise accuracy, for every method alike? Each lever alone, then together, on four tasks.

    python benchmarks/levers.py --out levers --methods alore,sct --levers plain,flip,norms --tasks count,orientation

A training learns from the 600 training and validation images of the offline suite and is measured on images that the
suite does not have: sprites drawn with another seed, in their own style and restyled, and what Fashion-MNIST and the
textile surfaces have besides. So no test image is read, and a difference is told by 900 or 1,000 images. One JSON line
per training goes to OUT/levers.jsonl; a killed run goes on where it stopped. `--table` prints what is there.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
from PIL import Image

from visgraft.adapters.directory import adapter_tensors
from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.bench.settings import configured
from visgraft.data.dataset import Example
from visgraft.data.folders import read_folder
from visgraft.data.images import load_images
from visgraft.drawn.sprites import TASKS as SPRITES
from visgraft.drawn.sprites import draw_sprites
from visgraft.files import cache_folder
from visgraft.measure.evaluation import score
from visgraft.protocols.offline import FASHION_CLASSES, OFFLINE, _fashion_part, prepare
from visgraft.training.fit import fit

TASKS = ("count", "orientation", "fashion", "textile")
SEEN, RESTYLED = 1000, 500
RAND = "rand-m9-mstd0.5-inc1"
LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head-first": {"head_first": 50},
    "mean": {"pool": "avg"},
    "biases": {"also_train": "biases", "backbone_lr": 5e-3},
    "norms": {"also_train": "norms", "backbone_lr": 5e-3},
    "biases+norms": {"also_train": "biases+norms", "backbone_lr": 5e-3},
    "own-2e-3": {"also_train": "biases+norms", "backbone_lr": 2e-3},
    "own-1e-2": {"also_train": "biases+norms", "backbone_lr": 1e-2},
    "flip": {"flip": True},
    "rand": {"rand_augment": RAND},
    "flip+rand": {"flip": True, "rand_augment": RAND},
    "colours": {"rand_augment": "rand-m9-mstd0.5-n1-t3a"},
    "one-operation": {"rand_augment": "rand-m10-mstd101-n1-p1-inc1"},
    "crop": {"crop_scale": 0.35},
    "mild-crop": {"crop_scale": 0.7},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "smooth": {"label_smoothing": 0.1},
    "drop-path": {"drop_path": 0.1},
    "decay": {"weight_decay": 0.05},
    "strong-decay": {"weight_decay": 1.0},
    "head-fast": {"head_lr": 1e-2},
    "head-slow": {"head_lr": 5e-4},
    "large-steps": {"lr": 5e-3, "warmup_epochs": 6.0},
    "small-steps": {"lr": 1e-3},
    "long": {"epochs": 60},
}
"""What each lever sets; joined by a comma, several act together."""


def setting(levers: str) -> dict[str, Any]:
    """Return what levers joined by commas set; NAME=VALUE sets an option by itself."""
    found: dict[str, Any] = {}
    for lever in levers.split(","):
        name, given, value = lever.partition("=")
        found |= {name: json.loads(value)} if given else LEVERS[name]
    return found


def further(task: str, root: Path, used: Sequence[Example]) -> Path:
    """Make images of a task that the suite does not have, where they are missing; returns their folder."""
    folder = root / f"{task}-further"
    if folder.exists():
        return folder
    if task in SPRITES:
        return draw_sprites(task, folder, train=0, val=SEEN, test=0, restyled=RESTYLED, seed=1)
    generator, taken = np.random.default_rng(1), {Path(example.path).name for example in used}
    if task == "fashion":
        (root / "scratch").mkdir(exist_ok=True)
        images, labels = _fashion_part(root / "scratch", True)
        free = [i for i in generator.permutation(len(labels)) if f"{i:05d}.png" not in taken][:SEEN]
        content = [(FASHION_CLASSES[labels[i]], f"{i:05d}.png", Image.fromarray(images[i])) for i in free]
    else:
        from conformal_clip_data import textile_simulated_root  # type: ignore[import-untyped]

        files = [file for file in sorted(Path(textile_simulated_root()).glob("*/*.jpg")) if file.name not in taken]
        content = [(file.parent.name, file.name, Image.open(file)) for file in files]
    for kind, name, image in content:
        target = folder / "images" / "val" / kind / name
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    return folder


def parts_of(task: str, root: Path) -> dict[str, Any]:
    """Return the images to learn from, and the sets to measure on by name."""
    own = OFFLINE.task(task)
    assert own is not None
    parts = own.open(root / own.folder, own, 0)
    folder = further(task, root, [*parts.train, *parts.val, *(e for test in parts.tests.values() for e in test)])
    sets = {"further": read_folder(folder / "images", val_fraction=0, test_fraction=0, known=parts.classes).val}
    if (folder / "restyled").exists():
        found = read_folder(folder / "restyled", val_fraction=0, test_fraction=0, known=parts.classes)
        sets["restyled"] = (*found.train, *found.val, *found.test)
    return {"classes": parts.classes, "learned": sorted((*parts.train, *parts.val), key=str), **sets}


def run(method: str, levers: str, task: str, seed: int, root: Path, kept: Path) -> dict[str, Any]:
    """Train once and return the line of results; the adapter's tensors and all answers go to a file in `kept`."""
    torch.set_num_threads(1)
    values = setting(levers)
    pool = values.pop("pool", None)
    arguments = {"global_pool": pool, "fc_norm": False} if pool else {}
    options, config = configured(method, {"seed": seed, "precision": "bf16", **values}, OFFLINE.epochs)
    parts = parts_of(task, root)
    classes = len(parts.pop("classes"))
    backbone = Backbone(OFFLINE.backbone, OFFLINE.weights, OFFLINE.image_size, seed, arguments)
    model = create_backbone(backbone, classes, config.drop_path)
    facts = model_data_config(model) | {"crop_pct": 1.0, "crop_mode": "squash"}
    images = {name: load_images(found, facts, outputs=classes, cache="disk") for name, found in parts.items()}
    learned = images.pop("learned")
    measured = {name: lambda one=one: one for name, one in images.items()}
    fitted = fit(model, options, config, learned, measured=measured, keep_last_good=True)
    name = hashlib.sha256(json.dumps([method, levers, task, seed]).encode()).hexdigest()[:16]
    tensors = {f"adapter.{key}": tensor.float().numpy() for key, tensor in adapter_tensors(model).items()}
    logits = {f"logits.{key}": answers.logits.numpy() for key, answers in fitted.answers.items()}
    labels = {f"labels.{key}": answers.labels.numpy() for key, answers in fitted.answers.items()}
    np.savez(kept / f"{name}.npz", **tensors, **logits, **labels)
    found = {key: score(a.logits.nan_to_num().softmax(-1), a.labels) for key, a in fitted.answers.items()}
    return {
        "method": method,
        "levers": levers,
        "task": task,
        "seed": seed,
        "setting": options.to_dict() | config.to_dict() | arguments,
        "finished": fitted.training is not None,
        "top1": {key: one.top1 for key, one in found.items()},
        "macro_f1": {key: one.macro_f1 for key, one in found.items()},
        "learned_top1": fitted.training.history[-1].top1 if fitted.training else None,
        "seconds": fitted.seconds,
        "file": f"{name}.npz",
    }


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracy by method and lever: mean over seeds on further images, and on restyled ones behind a stroke."""
    tasks = [task for task in (*TASKS, *SPRITES) if any(line["task"] == task for line in lines)]
    rows: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        rows.setdefault((line["method"], line["levers"]), {}).setdefault(line["task"], []).append(line)

    def cell(found: list[Mapping[str, Any]]) -> str:
        means = [100 * float(np.mean([one["top1"][name] for one in found])) for name in found[0]["top1"]]
        learned = [one["learned_top1"] for one in found if one["learned_top1"] is not None]
        told = " / ".join(f"{mean:.1f}" for mean in means)
        return f"{told} ({100 * np.mean(learned):.0f}{f', {len(found)} seeds' if len(found) > 1 else ''})"

    head = ["method", "levers", *dict.fromkeys(tasks)]
    body = [[*key, *(cell(found[task]) if task in found else "" for task in head[2:])] for key, found in rows.items()]
    return shared.table(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("levers"))
    parser.add_argument("--methods", default="alore,sct")
    parser.add_argument("--levers", default=";".join(LEVERS), help="separated by semicolons; by commas they add up")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    asked = parser.parse_args()
    file, root = asked.out / "levers.jsonl", cache_folder() / "offline-2"
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.table:
        tasks = asked.tasks.split(",")
        prepare(root, tasks)
        for task in tasks:
            parts_of(task, root)  # before several processes want them
        known = {(line["method"], line["levers"], line["task"], line["seed"]) for line in read(file)}
        wanted = [
            (method, levers, task, int(seed))
            for seed in asked.seeds.split(",")
            for levers in asked.levers.split(";")
            for task in tasks
            for method in asked.methods.split(",")
        ]
        with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(run, *one, root, asked.out) for one in wanted if one not in known]
            for future in running:
                line = future.result()
                with file.open("a") as lines:
                    lines.write(json.dumps(line) + "\n")
                print(f"{line['method']} {line['levers']} {line['task']}: {line['top1']}", flush=True)
    print(table(read(file)))


if __name__ == "__main__":
    main()
