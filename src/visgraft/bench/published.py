"""Results that others published, task by task, each with its source: to be shown beside ours, never merged with them.

One method may stand there under several names, as its sources write it; they stay apart.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from visgraft.errors import VisgraftError

SIZES = {"vtab-1k": {"natural": 7, "specialized": 4, "structured": 8}, "fgvc": {"fgvc": 5}}
"""How many tasks each group has, in the order of the file."""
BACKBONES = {
    "vit_base_patch16_224": "ViT-B/16",
    "vit_large_patch16_224": "ViT-L/16",
    "vit_huge_patch14_224": "ViT-H/14",
    "swin_base_patch4_window7_224": "Swin-B",
}
"""The file's names of timm's models."""


@dataclass(frozen=True)
class Published:
    """A method as a source reports it.

    `top1` is in percent, by task; `parameters` are trained ones in millions as printed there, None: not given.
    """

    method: str
    pretraining: str
    source: str
    top1: Mapping[str, float]
    parameters: float | None

    def mean(self, tasks: Sequence[str]) -> float | None:
        """Return the mean over the tasks in percent; None where one of them is not reported."""
        if not tasks or any(task not in self.top1 for task in tasks):
            return None
        return sum(self.top1[task] for task in tasks) / len(tasks)

    def mean_of_groups(self, groups: Mapping[str, Sequence[str]]) -> float | None:
        """Return the mean over the groups' means in percent; None where one of their tasks is not reported."""
        means = [self.mean(tasks) for tasks in groups.values()]
        known = [mean for mean in means if mean is not None]
        return sum(known) / len(known) if known and len(known) == len(means) else None


@cache
def _lines() -> tuple[dict[str, str], ...]:
    text = (files("visgraft") / "bench" / "published_results.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def published_groups(benchmark: str) -> dict[str, tuple[str, ...]]:
    """Return all tasks of a benchmark by group.

    Raises:
        VisgraftError: nothing is known of the benchmark.
    """
    if benchmark not in SIZES:
        raise VisgraftError(f"there are no published results of {benchmark!r}; there are of {', '.join(SIZES)}")
    tasks = iter(dict.fromkeys(line["dataset"] for line in _lines() if line["benchmark"] == benchmark))
    return {group: tuple(next(tasks) for _ in range(size)) for group, size in SIZES[benchmark].items()}


def published(benchmark: str, backbone: str = "ViT-B/16", pretraining: str | None = "in21k") -> list[Published]:
    """Return what was published for a benchmark, in the order of the file.

    Args:
        benchmark: "vtab-1k" or "fgvc".
        backbone: "ViT-B/16", "ViT-L/16", "ViT-H/14" or "Swin-B".
        pretraining: "in21k" or "augreg_in21k", as the source names the weights; None: both.

    Raises:
        VisgraftError: nothing is known of the benchmark, or of it with this backbone and pretraining.
    """
    published_groups(benchmark)
    found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for line in _lines():
        if (line["benchmark"], line["backbone"]) == (benchmark, backbone) and pretraining in (
            None,
            line["pretraining"],
        ):
            found.setdefault((line["method"], line["pretraining"], line["source"]), []).append(line)
    if not found:
        known = dict.fromkeys(
            f"{line['backbone']} {line['pretraining']}" for line in _lines() if line["benchmark"] == benchmark
        )
        asked = f"{backbone} {pretraining or ''}".strip()
        raise VisgraftError(f"there are no published results of {benchmark} with {asked}; there are {', '.join(known)}")
    return [
        Published(
            *key,
            {line["dataset"]: float(line["top1_percent"]) for line in lines if line["top1_percent"]},
            float(lines[0]["trainable_params_millions"]) if lines[0]["trainable_params_millions"] else None,
        )
        for key, lines in found.items()
    ]
