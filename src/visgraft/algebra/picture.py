"""A picture of how far apart two adapters are, block by block."""

from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from visgraft.algebra.apart import Apart
from visgraft.algebra.diff import AdapterDiff
from visgraft.errors import VisgraftError
from visgraft.files import check_writable, new_file
from visgraft.pictures import BLUE, ORANGE

LONGEST = 28
KINDS = (".png", ".svg", ".pdf")
GREEN, GREY = "#2f9e5b", "#8a9199"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False}


def check_picture(path: Path) -> None:
    """Raise a VisgraftError unless a picture can be written there, before anything is computed for it."""
    if path.suffix.lower() not in KINDS:
        raise VisgraftError(f"--out {path} is no picture's name; let it end in {', '.join(KINDS)}")
    if path.is_dir():
        raise VisgraftError(f"{path} is a folder; give --out the name of a picture in it")
    if not path.parent.is_dir():
        raise VisgraftError(f"the folder {path.parent} of --out does not exist; make it first")
    check_writable(path)


def paint_diff(diff: AdapterDiff, path: Path) -> None:
    """Write a PNG, SVG or PDF of a comparison: sizes, distances and, of maps, what their subspaces share.

    Raises:
        VisgraftError: it cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    check_picture(path)
    names = [part.name.removeprefix("block ") for part in diff.parts]
    maps = any(part.maps for part in diff.parts)
    features = any(part.features for part in diff.parts)
    overlaps = any(part.maps and part.maps.reads is not None for part in diff.parts)
    rows: list[Callable[[Any, AdapterDiff], None]] = []
    rows += [_map_sizes] * maps + [_feature_sizes] * features + [_distances] + [_overlaps] * overlaps
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.5, 2.5 + 0.45 * len(names)), 1.1 + 2.0 * len(rows)), layout="constrained")
        figure.suptitle("How far apart two adapters are", fontsize=12)
        axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        for row, axis in zip(rows, axes, strict=True):
            row(axis, diff)
            axis.grid(axis="y", alpha=0.35)
            axis.set_axisbelow(True)
        axes[-1].set_xticks(range(len(names)), names)
        axes[-1].set(xlabel="block", xlim=(-0.6, len(names) - 0.4))
        try:
            with new_file(path) as file:
                figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
        except OSError as error:
            raise VisgraftError(f"{path} cannot be written ({error.strerror}); choose another --out") from error


def _short(path: str) -> str:
    """The end of an adapter's path, as much of it as stands beside a picture."""
    name = Path(path).name
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _values(kind: Sequence[Apart | None], name: str) -> list[float]:
    """Values of every part; not a number where there is none, which matplotlib leaves out."""
    values = [None if apart is None else getattr(apart, name) for apart in kind]
    return [float("nan") if value is None else value for value in values]


def _sizes(axis: Any, diff: AdapterDiff, kind: Sequence[Apart | None], what: str) -> None:
    for shift, name, colour, label in ((-0.2, "first", BLUE, "A"), (0.2, "second", ORANGE, "B")):
        heights = [100 * value for value in _values(kind, name)]
        places = [number + shift for number in range(len(heights))]
        axis.bar(places, heights, 0.38, color=colour, label=f"{label}: {_short(getattr(diff, name))}")
    axis.set_title(f"how much each changes {what}", fontsize=10, loc="left")
    axis.set_ylabel("% of their norm")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _map_sizes(axis: Any, diff: AdapterDiff) -> None:
    _sizes(axis, diff, [part.maps for part in diff.parts], "the frozen weights")


def _feature_sizes(axis: Any, diff: AdapterDiff) -> None:
    _sizes(axis, diff, [part.features for part in diff.parts], f"the features of {diff.images} images")


def _distances(axis: Any, diff: AdapterDiff) -> None:
    kinds = (
        ("maps", [part.maps for part in diff.parts], "o", GREEN),
        ("features", [part.features for part in diff.parts], "s", GREY),
    )
    for label, kind, marker, colour in kinds:
        values = _values(kind, "distance")
        if not all(map(isnan, values)):
            axis.plot(range(len(values)), values, marker=marker, ms=5, lw=1.4, color=colour, label=label)
    axis.axhline(1, color="black", lw=0.8, ls=":", label="nothing in common")
    axis.set(ylim=(-0.05, 1.47), yticks=(0, 0.5, 1, 2**0.5))
    axis.set_yticklabels(["equal  0", "0.5", "1", "opposite  1.41"])
    axis.set_title("how far apart the changes are", fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _overlaps(axis: Any, diff: AdapterDiff) -> None:
    maps = [part.maps for part in diff.parts]
    for name, number, colour, shift, label in (
        ("reads", 0, BLUE, -0.2, "directions read"), ("writes", 1, ORANGE, 0.2, "directions added")
    ):  # fmt: skip
        places = [number_ + shift for number_ in range(len(maps))]
        axis.bar(places, [100 * value for value in _values(maps, name)], 0.38, color=colour, alpha=0.55, label=label)
        chance = [float("nan") if one is None or one.chance is None else 100 * one.chance[number] for one in maps]
        axis.hlines(
            chance, [place - 0.19 for place in places], [place + 0.19 for place in places], color="black", lw=1.3,
            label="what random ones share" if number else None,
        )  # fmt: skip
    axis.set(ylim=(0, 105), ylabel="% of the smaller")
    axis.set_title("what their subspaces share", fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
