"""Pictures of numbers: answered against true, and how far off each answer is."""

from typing import Any

import numpy as np

from visgraft.data.tasks import LabelTask
from visgraft.measure.numbers import NumberFigures
from visgraft.pictures import BLUE, ORANGE, Picture, Values, draw

SIZE = (4.6, 4.0)
MANY = 2000  # points, from which on a picture of vectors would be large


def with_unit(task: LabelTask) -> str:
    """Return the task's name with its unit."""
    return f"{task.name} ({task.unit})" if task.unit else task.name


def against_true(found: NumberFigures, task: LabelTask) -> Picture:
    """Draw the answers over the true numbers, with the diagonal and the constant answer."""
    true, said = _values(found)
    low, high = float(min(true.min(), said.min())), float(max(true.max(), said.max()))
    edge = 0.04 * (high - low) or 1.0

    def paint(figure: Any, theme: dict[str, str]) -> None:
        axes = figure.subplots()
        axes.plot([low, high], [low, high], color=theme["ink"], lw=1, ls="--", label="right")
        axes.axhline(task.mean, color=ORANGE, lw=1.2, label="constant answer")
        axes.scatter(true, said, s=16, color=BLUE, alpha=0.65, lw=0, zorder=3)
        limits = (low - edge, high + edge)
        axes.set(xlabel=f"true {with_unit(task)}", ylabel=f"answered {with_unit(task)}", xlim=limits, ylim=limits)
        axes.set_aspect("equal")
        axes.grid(alpha=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9, borderaxespad=0.3)

    r2 = "" if found.r2 is None else f", R² {found.r2:.2f}"
    return draw(paint, SIZE, f"Answered against true {task.name} of {found.images} images{r2}", _kind(true))


def errors_over_true(found: NumberFigures, task: LabelTask) -> Picture:
    """Draw how far off the answers are over the true numbers, and beside it how often each distance comes."""
    true, said = _values(found)
    errors = said - true

    def paint(figure: Any, theme: dict[str, str]) -> None:
        main, beside = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        main.axhline(0, color=theme["ink"], lw=1, ls="--")
        main.scatter(true, errors, s=16, color=BLUE, alpha=0.65, lw=0, zorder=3)
        main.set(xlabel=f"true {with_unit(task)}", ylabel="answered − true" + (f" ({task.unit})" if task.unit else ""))
        beside.hist(errors, bins=min(40, max(5, round(len(errors) ** 0.5))), orientation="horizontal", color=BLUE)
        beside.axhline(0, color=theme["ink"], lw=1, ls="--")
        beside.set(xlabel="images")
        beside.xaxis.get_major_locator().set_params(integer=True, nbins=3)
        for axes in (main, beside):
            axes.grid(alpha=0.6)

    alt = f"Answered minus true {task.name}: mean {errors.mean():.3g}, standard deviation {errors.std():.3g}"
    return draw(paint, SIZE, alt, _kind(true))


def _values(found: NumberFigures) -> tuple[Values, Values]:
    return found.truth.double().numpy(), found.answers.double().numpy()


def _kind(values: Values) -> str:
    return "svg" if len(values) <= MANY else "png"


def mean_error(found: NumberFigures) -> float:
    """Return by how much the answers are above the true numbers on average."""
    true, said = _values(found)
    return float(np.mean(said - true))
