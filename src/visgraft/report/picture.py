"""One picture of several runs: learning curves, confusion matrices, and the most confident mistakes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from visgraft.data.images import Images
from visgraft.measure.evaluation import Evaluation, confusion
from visgraft.report.looking import occlusion

COLOURS = ("#7f7f7f", "#1b7837", "#762a83", "#e08214", "#2166ac")
MISTAKES = 6


@dataclass(frozen=True)
class PaintedRun:
    """What the picture needs of one trained method: its epochs and its figures on the test images."""

    name: str
    history: Sequence[Mapping[str, Any]]
    evaluation: Evaluation


def paint(
    path: Path, title: str, runs: Sequence[PaintedRun], model: nn.Module, images: Images, classes: Sequence[str]
) -> Path:
    """Write a PNG on the runs; mistakes and where the model looks are those of the last run, whose `model` it is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(15, 12.5), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.0, 1.25, 1.15))
    _curves(top, runs)
    _confusions(middle, runs, classes)
    _mistakes(bottom, runs[-1], model, images, classes)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
    return path


def _curves(figure: Any, runs: Sequence[PaintedRun]) -> None:
    """Validation accuracy and training loss over the course of training, in per cent of each run's epochs."""
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    for run, colour in zip(runs, COLOURS, strict=False):
        done = [100 * e["epoch"] / len(run.history) for e in run.history]
        label = f"{run.name} ({len(run.history)} epochs)"
        axes[0].plot(done, [100 * (e["val_top1"] or 0) for e in run.history], color=colour, label=label, lw=2)
        axes[1].plot(done, [e["loss"] for e in run.history], color=colour, label=label, lw=2)
    axes[0].set(title="top-1 on the validation images", xlabel="training done (%)", ylabel="%", ylim=(0, 102))
    axes[1].set(title="loss on the training images", xlabel="training done (%)", ylabel="cross-entropy", yscale="log")
    for axis in axes[:2]:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    for i, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        top1, limits = run.evaluation.figure, run.evaluation.top1_ci95 or ()
        errors = [[abs(100 * (limit - top1))] for limit in limits]
        axes[2].barh(i, 100 * top1, color=colour, xerr=errors or None, capsize=4)
        axes[2].text(2, i, f"{100 * top1:.1f} %", va="center", color="white", fontweight="bold")
    axes[2].set(title=f"top-1 on {runs[0].evaluation.images} test images, 95 % interval", xlim=(0, 100), xlabel="%")
    axes[2].set_yticks(range(len(runs)), [run.name for run in runs])
    axes[2].invert_yaxis()
    for side in ("top", "right"):
        axes[2].spines[side].set_visible(False)


def _confusions(figure: Any, runs: Sequence[PaintedRun], classes: Sequence[str]) -> None:
    """One matrix per run, each row in per cent of the images of that class."""
    axes = np.atleast_1d(figure.subplots(1, len(runs), sharey=True))
    shown = None
    for axis, run in zip(axes, runs, strict=True):
        counts = confusion(run.evaluation, len(classes))
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        shown = axis.imshow(shares, cmap="viridis", vmin=0, vmax=100)
        axis.set(title=f"{run.name}: which class was answered", xlabel="answered")
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes[0].set_ylabel("true class")
    axes[0].set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(shown, ax=list(axes), label="% of the true class", shrink=0.8)


def _mistakes(figure: Any, run: PaintedRun, model: nn.Module, images: Images, classes: Sequence[str]) -> None:
    """The wrong answers of highest probability, each beside a map of what the answer depends on."""
    probabilities, labels = run.evaluation.probabilities, run.evaluation.labels
    best = probabilities.max(-1)
    wrong = torch.nonzero(best.indices != labels).flatten()
    worst = wrong[best.values[wrong].argsort(descending=True)][:MISTAKES].tolist()
    figure.suptitle(
        f"{run.name}: its most confident mistakes ({len(wrong)} of {len(labels)}), and below each what the answer "
        "depends on (red: painting over this part lowers the answer's probability most)",
        fontsize=11,
    )
    if not worst:
        axis = figure.subplots()
        axis.axis("off")
        axis.text(0.5, 0.5, "no mistake on the test images", ha="center", fontsize=14)
        return
    axes = figure.subplots(2, MISTAKES, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for column, index in enumerate(worst):
        answer = int(best.indices[index])
        picture = images.pixels[index].permute(1, 2, 0).numpy()
        drop = occlusion(model, images, index, answer).clamp_min(0).numpy()
        height, width = picture.shape[:2]
        axes[0][column].imshow(picture)
        axes[0][column].set_title(
            f"true {classes[int(labels[index])]}\nanswered {classes[answer]} ({100 * float(best.values[index]):.0f} %)",
            fontsize=9,
        )
        axes[1][column].imshow(picture.mean(axis=2), cmap="gray")
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        alpha = 0.65 * drop / max(drop.max(), 1e-9)
        axes[1][column].imshow(drop, cmap="Reds", alpha=alpha, extent=extent, interpolation="bicubic")
