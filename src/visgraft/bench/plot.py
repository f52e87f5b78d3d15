"""The results of a benchmark as pictures: what accuracy costs, groups of tasks, few shots, other domains, channels."""

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visgraft.bench.measures import shown
from visgraft.bench.plot_numbers import (
    Overlap,
    Point,
    group_means,
    incomplete,
    overlap,
    parameter_points,
    shifts,
    shot_curves,
    time_points,
)
from visgraft.bench.statistics import Mean, Table, tables
from visgraft.errors import VisgraftError
from visgraft.files import new_file
from visgraft.pictures import BLUE, ORANGE, THEMES

if TYPE_CHECKING:
    from visgraft.bench.trial import Result

DOTS_PER_INCH = 160
COLOURS = (BLUE, ORANGE, "#3f9a5c", "#c0453f", "#8866b5", "#7a5a44", "#cf6fae", "#6d7681", "#a9a12c", "#2ba5b5")
HATCHES = ("", "////", "....", "xxxx")
MARKERS = "osD^vP*X<>"
INK, GRID = THEMES["light"]["ink"], THEMES["light"]["grid"]
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK,
    "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "font.size": 10,
    "axes.titlesize": 10.5, "figure.titlesize": 11, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip
Looks = Mapping[str, dict[str, Any]]
"""The colour and marker of each row, by its label: the same in all pictures of a table."""
Paint = Callable[[Any], None]
"""Draws on a matplotlib figure."""


def plot(
    results: Sequence["Result"], out: Path, order: Sequence[str] = (), widths: Mapping[str, int] | None = None
) -> list[Path]:
    """Draw what the results allow, as PNG files in the folder `out`; several conditions get a folder each in it.

    Args:
        results: what `read_results` returned.
        out: the folder, made where it is missing; pictures of the same names are replaced.
        order: names of the tasks in the order wished for.
        widths: how many channels a site has, by site; with it, the picture of chosen channels says what chance gives.

    Returns:
        The files written.

    Raises:
        VisgraftError: there is nothing to draw, or a file cannot be written.
    """
    found = tables(results, order)
    written: list[Path] = []
    for number, table in enumerate(found, 1):
        folder = out if len(found) == 1 else out / f"{number}-{table.condition.protocol}"
        for name, size, paint in _pictures(table, widths):
            written.append(_write(folder / f"{name}.png", size, paint, table))
    if not written:
        raise VisgraftError("no method has a result for every task yet; let `visgraft bench run` finish first")
    return written


def _write(file: Path, size: tuple[float, float], paint: Paint, table: Table) -> Path:
    import matplotlib
    from matplotlib.figure import Figure

    one, buffer = table.condition, io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        reduced = ", reduced" if one.reduced else ""
        figure.suptitle(f"{one.protocol}{reduced}: {one.backbone}, {one.image_size} pixels")
        paint(figure)
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as target:
            target.write(buffer.getvalue())
    except OSError as error:
        raise VisgraftError(f"{file} cannot be written ({error.strerror}); choose another --out") from error
    return file


def _pictures(table: Table, widths: Mapping[str, int] | None) -> Iterator[tuple[str, tuple[float, float], Paint]]:
    """Yield name, size in inches and painter of each picture that the table has numbers for."""
    looks = {
        row.label: {"color": colour, "marker": marker}
        for row, (colour, marker) in zip(table.rows, _looks(), strict=False)
    }
    lacking, said = incomplete(table), f"{shown(table.measures.values())} (%)"
    points, times, groups = parameter_points(table), time_points(table), group_means(table)
    if points:
        yield "accuracy-parameters", (7.2, 4.4), lambda f: _over_parameters(f, points, looks, said, lacking)
    if times:
        yield "accuracy-time", (7.2, 4.4), lambda f: _over_time(f, times, looks, said, lacking)
    if len(table.groups) > 1 and any(groups.values()):
        names = list(dict.fromkeys(name for means in groups.values() for name in means))
        longest = max(len(line) for name in names for line in name.split("\n"))
        width = 2.6 + max(len(names) * max(0.5 + 0.12 * len(groups), 0.2 + 0.085 * longest), 3.0)
        yield "groups", (width, 4.2), lambda f: _bars(f, groups, names, looks, said, lacking)
    curves = shot_curves(table)
    if any(curve for panel in curves.values() for curve in panel.values()):
        columns = min(len(curves), 3)
        size = (3.1 * columns + 0.2, 2.9 * -(-len(curves) // columns) + 0.7)
        yield "few-shot", size, lambda f: _curves(f, curves, columns, looks, said)
    moved = {name: rows for name, rows in shifts(table).items() if rows}
    if moved:
        tasks = {name: len(names) for name, names in table.shifted.items()}
        size = (max(2.9 * len(moved) + 1.6, 5.5), 1.9 + 0.3 * len(table.rows))
        yield "shifted", size, lambda f: _shifts(f, moved, tasks, looks, said)
    for row in table.rows:
        shared = overlap(row, table.tasks, widths)
        if shared:
            side = 2.8 + 0.45 * len(shared.tasks)
            name = "".join(c if c.isalnum() else "-" for c in row.label).strip("-")
            yield f"channels-{name}", (side + 1.2, side), _heat_map(row.label, shared)


def _looks() -> Iterator[tuple[str, str]]:
    """Yield pairs of a colour and a marker, all different for the first hundred."""
    for shift in itertools.count():
        for number, colour in enumerate(COLOURS):
            yield colour, MARKERS[(number + shift) % len(MARKERS)]


def _error(mean: Mean) -> list[list[float]]:
    """Return how far the interval reaches below and above the mean, in points, as matplotlib takes it."""
    return [[100 * (mean.value - mean.interval.low)], [100 * (mean.interval.high - mean.value)]]


def _interval(means: Sequence[Mean]) -> str:
    kinds = dict.fromkeys(mean.interval.over for mean in means)
    return f"95 % interval over {' or '.join(kinds)}"


def _title(means: Sequence[Mean], lacking: Sequence[str]) -> str:
    """Say what the intervals are, and which methods have no mean to show."""
    return _interval(means) + (f"\nno mean, for lack of tasks: {', '.join(lacking)}" if lacking else "")


def _scatter(
    figure: Any, points: Sequence[Point], places: Sequence[float], looks: Looks, said: str, lacking: Sequence[str]
) -> Any:
    axes = figure.subplots()
    for point, place in zip(points, places, strict=True):
        axes.errorbar(
            place, 100 * point.mean.value, _error(point.mean), ls="", ms=7, capsize=2, lw=1.1, label=point.label,
            **looks[point.label],
        )  # fmt: skip
    means = [point.mean for point in points]
    axes.set(ylabel=f"{said}, {means[0].name}")
    axes.set_title(_title(means, lacking), fontsize=9)
    axes.grid(alpha=0.6)
    figure.legend(loc="outside right center", fontsize=9)
    return axes


def _over_parameters(figure: Any, points: Sequence[Point], looks: Looks, said: str, lacking: Sequence[str]) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    some = [point.cost for point in points if point.cost > 0] or [1.0]
    decades = 10.0 ** np.arange(np.floor(np.log10(min(some))), np.ceil(np.log10(max(some))) + 1)
    nothing = decades[0] / 4
    axes = _scatter(figure, points, [point.cost or nothing for point in points], looks, said, lacking)
    axes.set_xscale("log")
    ticks = ([nothing] if any(not point.cost for point in points) else []) + list(decades)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    written = EngFormatter(sep="")
    axes.set_xticks(ticks, ["0" if tick == nothing else written(tick) for tick in ticks])
    axes.set(xlim=(ticks[0] / 1.6, max(ticks[-1], *some) * 1.6), xlabel="trained parameters without the head")


def _over_time(figure: Any, points: Sequence[Point], looks: Looks, said: str, lacking: Sequence[str]) -> None:
    minutes = [point.cost / 60 for point in points]
    axes = _scatter(figure, points, minutes, looks, said, lacking)
    axes.set(xlim=(0, 1.06 * max(minutes)), xlabel="minutes of one training, mean over the tasks")


def _bars(
    figure: Any,
    groups: Mapping[str, Mapping[str, Mean]],
    names: Sequence[str],
    looks: Looks,
    said: str,
    lacking: Sequence[str],
) -> None:
    from matplotlib.patches import Patch

    axes = figure.subplots()
    width = 0.84 / len(groups)
    handles = []
    for number, (label, means) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        # Colours repeat after ten methods, and hatching tells the rounds apart.
        face = {"facecolor": looks[label]["color"], "hatch": HATCHES[number // len(COLOURS) % len(HATCHES)]}
        for name, mean in means.items():
            axes.bar(
                names.index(name) + offset, 100 * mean.value, 0.9 * width, edgecolor="white", lw=0,
                yerr=_error(mean), error_kw={"lw": 0.9, "ecolor": INK}, **face,
            )  # fmt: skip
        handles.append(Patch(edgecolor="white", lw=0, label=label, **face))
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=said, ylim=(0, 100))
    axes.set_title(_title([mean for means in groups.values() for mean in means.values()], lacking), fontsize=9)
    axes.grid(alpha=0.6, axis="y")
    axes.tick_params(axis="x", length=0)
    figure.legend(handles=handles, loc="outside right center", fontsize=9)


def _curves(
    figure: Any, panels: Mapping[str, Mapping[str, Sequence[tuple[int, Mean]]]], columns: int, looks: Looks, said: str
) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharey=True).ravel()
    numbers = sorted({shots for panel in panels.values() for curve in panel.values() for shots, _ in curve})
    for axes, (name, panel) in zip(grid, panels.items(), strict=False):
        for label, curve in panel.items():
            if curve:
                errors = np.hstack([_error(mean) for _, mean in curve])
                places, values = [shots for shots, _ in curve], [100 * mean.value for _, mean in curve]
                axes.errorbar(
                    places, values, errors, ms=4.5, lw=1.5, elinewidth=0.9, capsize=2, label=label, **looks[label]
                )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(numbers))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_title(name)
        axes.grid(alpha=0.6)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("training images per class", fontsize=10)
    means = [mean for panel in panels.values() for curve in panel.values() for _, mean in curve]
    figure.supylabel(f"{said}, {_interval(means)}", fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)


def _shifts(
    figure: Any, sets: Mapping[str, Mapping[str, tuple[Mean, Mean]]], tasks: Mapping[str, int], looks: Looks, said: str
) -> None:
    """Draw each method's way from the test images to each shifted test set."""
    labels = list(dict.fromkeys(label for rows in sets.values() for label in rows))
    panels = figure.subplots(1, len(sets), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, rows) in zip(panels, sets.items(), strict=True):
        for label, (plain, shifted) in rows.items():
            height, colour = labels.index(label), looks[label]["color"]
            axes.plot([100 * plain.value, 100 * shifted.value], [height] * 2, color=colour, lw=1.4, alpha=0.6)
            for mean, filled in ((plain, True), (shifted, False)):
                axes.errorbar(
                    100 * mean.value, height, xerr=_error(mean), marker="o", ms=6.5, color=colour, lw=1, capsize=2,
                    mfc=colour if filled else "white",
                )  # fmt: skip
        over = next(iter(rows.values()))[1].name
        axes.set_title(f"{name}, {over}" if tasks[name] > 1 else name)
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel=said, ylim=(len(labels) - 0.5, -0.5))
        axes.grid(alpha=0.6, axis="x")
    kinds = _interval([mean for rows in sets.values() for both in rows.values() for mean in both])
    for filled, words in ((True, "test images"), (False, "shifted test set")):
        panels[0].plot([], [], ls="", marker="o", ms=6.5, color=INK, mfc=INK if filled else "white", label=words)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, title=kinds, title_fontsize=9)


def _heat_map(label: str, found: Overlap) -> Paint:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        others = np.where(np.eye(len(found.tasks), dtype=bool), np.nan, found.shares)
        top = float(np.nanmax(others))
        shown = axes.imshow(100 * others, cmap="Blues", vmin=0, vmax=min(150 * top, 100) or 1)
        axes.set_facecolor(GRID)
        for row, column in np.ndindex(found.shares.shape):
            share = found.shares[row, column]
            text = "–" if np.isnan(share) else f"{100 * share:.0f}"
            dark = row != column and share > min(0.9 * top, 0.6)
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else INK, fontsize=9)
        axes.set_xticks(range(len(found.tasks)), found.tasks, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(found.tasks)), found.tasks)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        chance = "" if found.chance is None else f"\nchance: {100 * found.chance:.1f} %"
        axes.set_title(f"{label}: channels that the other task chose too, mean over blocks{chance}", fontsize=9.5)
        figure.colorbar(shown, ax=axes, label="% of the row's channels", shrink=0.8)

    return paint
