"""One picture with four labels at once: location, orientation, count and distance, as `sprites` draws one each.

Above a horizon, each in a field of its own, hang a shape whose horizontal position is asked for, 3 to 10 small ones,
and one with a front that points somewhere; on the ground stands a body. The labels are drawn apart, and all of their
combinations in the same way, so that no label tells another. Nothing covers anything that is asked for.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visgraft.drawn.painting import Curve, Scene, Solid, paint
from visgraft.drawn.sprites import (
    FEWEST,
    LOCATIONS,
    MARGIN,
    ORIENTATIONS,
    POINTED,
    SMALLEST_SIZE,
    STYLES,
    SYMMETRIC,
    TASKS,
    WOBBLE,
    Generator,
    class_name,
    depth_of,
    in_bin,
    pick,
    standing,
    turned,
)
from visgraft.drawn.table import PARTS, Drawn, check_counts, write_tables
from visgraft.errors import DataError, nearest

FOCUS = 0.38  # picture heights, as in `sprites`, but with a lower horizon, so that there is room above it
EDGE, GAP = 0.02, 0.044  # what is left free at the border and between any two shapes, at least: 4 pixels of 98
BAND, WALL = 0.2, 0.6  # where the field of the located shape ends, and below it, to the left, that of the counted ones
TRIES = 40  # places that are tried for a shape before all begin anew


class Arranged(NamedTuple):
    """A scene and its labels as numbers."""

    scene: Scene
    numbers: dict[str, float]


def arrange_scene(labels: Mapping[str, int], rng: Generator) -> Arranged:
    """Return the scene of four labels: where all is, not how it looks.

    The numbers are `location_percent` of the picture's width, `count_number` and `distance_heights`, in camera heights.
    What points somewhere has none, because an angle begins anew after a turn.

    Raises:
        DataError: a label is missing or out of range.
    """
    for task, classes in TASKS.items():
        if not 0 <= labels.get(task, -1) < classes:
            raise DataError(f"the label of {task} must be 0 to {classes - 1}, got {labels.get(task)}")
    x = MARGIN + (1 - 2 * MARGIN) * in_bin(labels["location"], LOCATIONS, rng)
    angle = labels["orientation"] * 360 / ORIENTATIONS + float(rng.uniform(-WOBBLE, WOBBLE))
    depth, horizon = depth_of(labels["distance"], rng), float(rng.uniform(0.55, 0.61))
    count, base = FEWEST + labels["count"], rng.uniform(0.024, 0.032)
    located = turned(pick(SYMMETRIC, rng), rng.uniform(0, 360), rng.uniform(0.06, 0.08), 0j)
    pointed = turned(pick(POINTED, rng), angle, rng.uniform(0.09, 0.115), 0j)
    small = [
        turned(pick(SYMMETRIC, rng), rng.uniform(0, 360), base * rng.uniform(0.85, 1.15), 0j) for _ in range(count)
    ]
    sky, below = horizon - EDGE, BAND + GAP
    hanging = (
        *_hang([located], (x, EDGE, x, BAND), rng, inside=False),
        *_hang([pointed], (WALL + GAP, below, 1 - EDGE, sky), rng),
        *_hang(small, (EDGE, below, WALL, sky), rng),
    )
    solids = (standing(depth, horizon, rng, FOCUS), *map(Solid.flat, hanging))
    numbers = {"location_percent": 100 * x, "count_number": count, "distance_heights": depth}
    return Arranged(Scene(solids, horizon), numbers)


def _hang(
    shapes: list[Curve], field: tuple[float, float, float, float], rng: Generator, inside: bool = True
) -> list[Curve]:
    """Return the shapes, given around 0, at places in a field (left, top, right, bottom) where none touches another.

    Not `inside`, they are only in the field's height, with their centres in its width.
    """
    reaches = [float(np.abs(shape).max()) for shape in shapes]
    left, top, right, bottom = field
    while True:
        places = list[complex]()
        for reach in reaches:
            own = reach if inside else 0.0
            for _ in range(TRIES):
                at = complex(rng.uniform(left + own, right - own), rng.uniform(top + reach, bottom - reach))
                if all(abs(at - there) > reach + its + GAP for there, its in zip(places, reaches, strict=False)):
                    places.append(at)
                    break
            else:
                break
        if len(places) == len(shapes):
            return [at + shape for at, shape in zip(places, shapes, strict=True)]


def draw_scene(labels: Mapping[str, int], rng: Generator, size: int, style: str = "plain") -> Image.Image:
    """Return one RGB picture of `size` × `size` pixels.

    The arrangement and the look come from two generators that `rng` spawns, as in `draw_sprite`.

    Raises:
        DataError: a label is missing or out of range, there is no such style, or `size` is too small.
    """
    return _drawn(labels, rng, size, style)[0]


def _drawn(labels: Mapping[str, int], rng: Generator, size: int, style: str) -> tuple[Image.Image, dict[str, float]]:
    if style not in STYLES:
        raise DataError(f"unknown style {style!r}{nearest(style, STYLES)}; choose one of {', '.join(STYLES)}")
    if size < SMALLEST_SIZE:
        raise DataError(f"a scene of {size} pixels cannot be seen; use a size of at least {SMALLEST_SIZE}")
    arrangement, look = rng.spawn(2)
    scene, numbers = arrange_scene(labels, arrangement)
    return paint(scene, look, size, restyled=style == "restyled"), numbers


def draw_labels(count: int, rng: Generator) -> dict[str, NDArray[np.int64]]:
    """Return labels of each task [count]: every class equally often, in orders that know nothing of each other."""
    return {task: rng.permutation(np.arange(count) % classes) for task, classes in TASKS.items()}


def draw_scenes(
    root: str | Path,
    *,
    train: int = 600,
    val: int = 200,
    test: int = 400,
    restyled: int = 400,
    size: int = 98,
    seed: int = 0,
) -> Path:
    """Draw scenes into `root` as a table with a column per label, and a table of restyled ones; returns `root`.

    The columns are location, orientation, count and distance, and the numbers of `arrange_scene`. The classes of each
    come equally often in a part, in an order of their own. A picture depends on `seed`, its part, its number and the
    part's size alone. See `write_tables` for the files.

    Raises:
        DataError: a count or `seed` is negative, or `size` is too small.
        VisgraftError: `root` holds something else, or cannot be written.
    """
    counts = dict(zip(PARTS, (train, val, test, restyled), strict=True))
    check_counts(counts, seed)

    def drawn() -> Iterator[Drawn]:
        for number, (part, count) in enumerate(counts.items()):
            labels = draw_labels(count, np.random.default_rng([seed, number, 0, 2]))
            for index in range(count):
                rng = np.random.default_rng([seed, number, index, 1])
                own = {task: int(order[index]) for task, order in labels.items()}
                picture, numbers = _drawn(own, rng, size, "restyled" if part == "restyled" else "plain")
                named = {task: class_name(task, label) for task, label in own.items()}
                yield Drawn(part, picture, {**named, **{name: round(value, 3) for name, value in numbers.items()}})

    return write_tables(Path(root), drawn())
