"""Figures of a run: learning curves, large confusion matrices, reliability diagrams."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visgraft.measure.calibration import Calibration
from visgraft.pictures import BLUE, ORANGE, Picture, draw

CURVE_SIZE = (4.6, 2.9)
FEW_EPOCHS = 20


def curves(history: Sequence[Mapping[str, Any]], kept_epoch: int | None) -> list[Picture]:
    """Draw loss, accuracy and learning rate over the epochs; empty where no epoch is recorded.

    The epoch whose weights were kept is marked where it is not the last. A multi-label run has no top-1, but mean
    average precision on the validation images; one with several tasks the mean of their figures.
    """
    if not history:
        return []
    figure = "top-1" if _column(history, "top1") else "mean average precision"
    figure = "figure of the tasks" if _column(history, "val_mean") else figure
    loss = {"train": _column(history, "loss"), "val": _column(history, "val_loss")}
    rates = {
        "train": _column(history, "top1"),
        "val": _column(history, "val_top1") or _column(history, "val_map") or _column(history, "val_mean"),
    }
    rates = {name: [100 * value for value in values] for name, values in rates.items()}
    mark = kept_epoch if kept_epoch and kept_epoch != len(history) else None
    drawn = [
        _lines(loss, "loss", "Loss over the epochs", mark),
        _lines(rates, f"{figure} (%)", f"{figure} over the epochs", mark) if any(rates.values()) else None,
        _lines({"": _column(history, "lr")}, "learning rate", "Learning rate over the epochs", mark),
    ]
    return [picture for picture in drawn if picture is not None]


def _column(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Values of all epochs, or an empty list where one is missing."""
    values = [epoch.get(name) for epoch in history]
    return [] if any(value is None for value in values) else values  # type: ignore[return-value]


def _lines(series: Mapping[str, Sequence[float]], name: str, alt: str, mark: int | None) -> Picture:
    """Draw one quantity of the training and the validation images over the epochs."""
    colours = {"train": BLUE, "val": ORANGE, "": BLUE}
    shown = {label: values for label, values in series.items() if values}

    def paint(figure: Any, theme: dict[str, str]) -> None:
        axes = figure.subplots()
        for label, values in shown.items():
            epochs = range(1, len(values) + 1)
            marker = "o" if len(values) <= FEW_EPOCHS else None
            axes.plot(epochs, values, color=colours[label], label=label, lw=1.8, marker=marker, ms=3.5)
        axes.set(xlabel="epoch", title=name, xlim=(0.5, max(map(len, shown.values())) + 0.5), ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name.endswith("(%)"):
            axes.set_ylim(0, 102)
        if mark is not None:
            axes.axvline(mark, color=theme["ink"], lw=1, ls=":", label="kept epoch")
        axes.grid(alpha=0.6)
        if any(shown) or mark is not None:
            axes.legend()

    return draw(paint, CURVE_SIZE, f"{alt}: {_ends(shown)}", "svg")


def _ends(series: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{label} {values[0]:.3g} to {values[-1]:.3g}".strip() for label, values in series.items())


def large_confusion(counts: NDArray[np.int64]) -> Picture:
    """Draw the shares of each true class without class names, in the classes' order."""
    edges = (0.5, len(counts) + 0.5, len(counts) + 0.5, 0.5)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def paint(figure: Any, theme: dict[str, str]) -> None:
        axes = figure.subplots()
        shown = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100, interpolation="nearest", extent=edges)
        axes.set(xlabel="answered class, by its number", ylabel="true class, by its number")
        figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)

    right = np.trace(counts) / max(int(counts.sum()), 1)
    return draw(paint, (6.2, 5.2), f"Confusion matrix of {len(counts)} classes, {right:.0%} on the diagonal", "png")


def reliability(found: Calibration, success: str) -> Picture:
    """Draw success (`right`, or `there`) over probability, bin by bin, above the number of answers in each bin."""
    width = 0.1

    def paint(figure: Any, theme: dict[str, str]) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
        above.plot([0, 100], [0, 100], color=theme["ink"], lw=1, ls="--", label="probabilities at their word")
        for i, one in enumerate(found.bins):
            low, high = (100 * abs(limit - one.accuracy) for limit in one.interval)
            above.errorbar(
                100 * one.confidence, 100 * one.accuracy, [[low], [high]], color=BLUE, marker="o", ms=5, capsize=2,
                lw=1.2, label="this run, 95 % interval" if i == 0 else None,
            )  # fmt: skip
        above.set(ylim=(-2, 102), xlim=(0, 100), ylabel=f"{success} (%)")
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9, borderaxespad=0.3)
        centres, counts = [100 * (b.low + width / 2) for b in found.bins], [b.count for b in found.bins]
        below.bar(centres, counts, 100 * width * 0.9, color=BLUE)
        below.set(xlabel="probability given (%)", ylabel="how many", ylim=(0, 1.1 * max(counts)))
        below.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        for axes in (above, below):
            axes.grid(alpha=0.6)

    alt = f"Reliability diagram: expected calibration error {found.error:.3f}"
    return draw(paint, (5.2, 4.4), alt, "svg")
