"""Four drawn tasks whose classes are a matter of structure: location, orientation, count and distance.

In the spirit of VTAB-1k's structured group (dSprites, CLEVR, KITTI; arXiv:1910.04867): what a picture shows is
chance, how it is arranged is the label. A scene is arranged first, from the label and one generator, and then painted
by another, so that the look says nothing about the label. Painted "restyled" it is the same scene as chalk or ink
hatching: a test set of another domain.

A point of a picture is a complex number x + iy: 0 is the upper left corner, 1 + 1i the lower right one. Point arrays
have shape (count,).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from visgraft.drawn.folder import new_folder
from visgraft.drawn.painting import Curve, Scene, Solid, closed, paint
from visgraft.errors import DataError, nearest

SMALLEST_SIZE = 48
STYLES = ("plain", "restyled")
PARTS = ("train", "val", "test", "restyled")

LOCATIONS, MARGIN = 16, 0.15
ORIENTATIONS, WOBBLE = 16, 3.0  # degrees, of a step of 22.5
FEWEST, COUNTS = 3, 8
NEAREST, FARTHEST, DISTANCES = 1.1, 4.5, 6  # in camera heights above the ground
FOCUS = 0.55  # picture heights: what stands z away touches the ground FOCUS / z below the horizon
# Half the width of the two true sizes, in camera heights. They differ by two whole bins of distance: by any other ratio
# the apparent size alone would tell them apart, and with it the distance.
HALF_WIDTHS = (0.25, 0.25 * (FARTHEST / NEAREST) ** (2 / DISTANCES))
JITTER = 0.2  # of a bin: how far a value strays from the bin's middle, to either side at most

Generator = np.random.Generator
Faces = tuple[tuple[Curve, float], ...]
"""Outlines and how light each is, as in a `Solid`."""


def _polygon(corners: int, inner: float = 1.0, start: float = 0.0) -> Curve:
    """Return a regular polygon, or a star where `inner` is below 1."""
    turns = np.arange(2 * corners) / (2 * corners) + start
    radius = np.where(np.arange(2 * corners) % 2 == 0, 1.0, inner)
    points = radius * np.exp(2j * np.pi * turns) * -1j
    return np.asarray(points if inner < 1 else points[::2])


def _path(*corners: complex) -> Curve:
    return np.array(corners)


_HALF_PLANE = (
    -1j,
    0.12 - 0.75j,
    0.14 - 0.3j,
    0.95 + 0.2j,
    0.95 + 0.4j,
    0.14 + 0.22j,
    0.1 + 0.65j,
    0.4 + 0.9j,
    0.4 + 1j,
    1j,
)
SYMMETRIC: tuple[Curve, ...] = (
    _polygon(48), _polygon(4), _polygon(3), _polygon(5, 0.45), _polygon(6),
    _path(-0.3 - 1j, 0.3 - 1j, 0.3 - 0.3j, 1 - 0.3j, 1 + 0.3j, 0.3 + 0.3j, 0.3 + 1j, -0.3 + 1j, -0.3 + 0.3j, -1 + 0.3j,
          -1 - 0.3j, -0.3 - 0.3j),
    _polygon(48).real + 0.55j * _polygon(48).imag,
)  # fmt: skip
POINTED: tuple[Curve, ...] = (
    _path(-1j, 0.75 - 0.1j, 0.28 - 0.1j, 0.28 + 1j, -0.28 + 1j, -0.28 - 0.1j, -0.75 - 0.1j),
    np.append(-1j, 0.35j + 0.62 * np.exp(1j * np.deg2rad(np.linspace(-28, 208, 40)))),
    np.concatenate([_path(*_HALF_PLANE), -_path(*_HALF_PLANE[::-1]).conjugate()]),
)
"""Shapes with an unmistakable front, which points up: an arrow, a drop, an aeroplane."""


def centred(points: Curve) -> Curve:
    """Return a polygon moved so that the centre of its area is 0."""
    following = np.roll(points, -1)
    cross = (points.conjugate() * following).imag
    return np.asarray(points - ((points + following) * cross).sum() / (3 * cross.sum()))


def turned(shape: Curve, degrees: float, radius: float, at: complex) -> Curve:
    """Return a shape of a radius with the centre of its area `at` a place, turned clockwise."""
    return np.asarray(at + radius * centred(shape) * np.exp(1j * np.deg2rad(degrees)))


def in_bin(label: int, bins: int, rng: Generator) -> float:
    """Return a value between 0 and 1 near the middle of a bin."""
    return (label + 0.5 + float(rng.uniform(-JITTER, JITTER))) / bins


def pick(shapes: tuple[Curve, ...], rng: Generator) -> Curve:
    """Return one of the shapes."""
    return shapes[int(rng.integers(len(shapes)))]


def _location(label: int, rng: Generator) -> Scene:
    """One shape; the label is the bin of the horizontal position of the centre of its area."""
    x = MARGIN + (1 - 2 * MARGIN) * in_bin(label, LOCATIONS, rng)
    at, radius = complex(x, rng.uniform(MARGIN, 1 - MARGIN)), rng.uniform(0.06, 0.13)
    return Scene((Solid.flat(turned(pick(SYMMETRIC, rng), rng.uniform(0, 360), radius, at)),))


def _orientation(label: int, rng: Generator) -> Scene:
    """One shape with a front; the label is where that points, clockwise from the top in steps of 22.5 degrees."""
    angle = label * 360 / ORIENTATIONS + rng.uniform(-WOBBLE, WOBBLE)
    radius = rng.uniform(0.15, 0.26)
    at = complex(*rng.uniform(0.32, 0.68, size=2))
    return Scene((Solid.flat(turned(pick(POINTED, rng), angle, radius, at)),))


def _count(label: int, rng: Generator) -> Scene:
    """3 to 10 shapes that neither touch nor are cut off; the label is how many, less 3."""
    base, wanted = rng.uniform(0.045, 0.085), FEWEST + label
    places = list[tuple[complex, float]]()
    while len(places) < wanted:
        places = []
        for _ in range(60 * wanted):
            radius = base * rng.uniform(0.75, 1.25)
            at = complex(*rng.uniform(radius + 0.02, 0.98 - radius, size=2))
            if all(abs(at - other) > radius + its + 0.025 for other, its in places):
                places.append((at, radius))
            if len(places) == wanted:
                break
    solids = [Solid.flat(turned(pick(SYMMETRIC, rng), rng.uniform(0, 360), 0.95 * r, at)) for at, r in places]
    return Scene(tuple(solids))


def depth_of(label: int, rng: Generator) -> float:
    """Return a distance in a bin, in camera heights; the bins are equally wide in its logarithm."""
    return float(NEAREST * (FARTHEST / NEAREST) ** in_bin(label, DISTANCES, rng))


def _distance(label: int, rng: Generator) -> Scene:
    """Solids that stand on the ground; the label is the bin of how far away the nearest one stands."""
    horizon = rng.uniform(0.28, 0.42)
    near = depth_of(label, rng)
    depths = [near, *(near * rng.uniform(1.25, 2.2, size=int(rng.integers(2, 6))))]
    solids = [standing(float(depth), horizon, rng) for depth in sorted(depths, reverse=True)]
    return Scene(tuple(solids), horizon)


def standing(depth: float, horizon: float, rng: Generator, focus: float = FOCUS) -> Solid:
    """Return a ball, a box or a cylinder, as wide as high, of one of two true sizes.

    Its lowest point in the picture is where it touches the ground, `depth` away, and its front is as wide as its true
    size is at that distance. All are lower than the camera, so that it sees their tops.
    """
    half = float(rng.choice(HALF_WIDTHS))
    radius = focus * half / depth
    ground = horizon + focus / depth
    at = complex(rng.uniform(radius, 1 - radius), ground - radius)
    disc = closed(48)
    shadow = at + 1j * radius + radius * (1.15 * disc.real + 0.3j * disc.imag)
    kind = int(rng.integers(3))
    if kind == 0:
        light = at + radius * (-0.35 - 0.4j) + 0.3 * radius * disc
        return Solid(((at + radius * disc, 1.0), (light, 1.3)), shadow, depth)
    faces = _cylinder if kind == 1 else _box
    return Solid(faces(at, radius, half, depth, horizon), shadow, depth)


def _cylinder(at: complex, radius: float, half: float, depth: float, horizon: float) -> Faces:
    """Return the wall and the lid of a cylinder around `at`, whose circles are as flat as the camera sees them."""
    disc = closed(48)
    back = depth / (depth + 2 * half)  # how much smaller the far end of a circle looks
    foot, lid = (((y - horizon) * (1 - back) / 2) for y in (at.imag + radius, at.imag - radius))
    bottom = at + 1j * (radius - foot) + radius * disc.real + 1j * foot * disc.imag
    top = at - 1j * (radius + lid) + radius * disc.real + 1j * lid * disc.imag
    lower = disc.imag > -1e-9
    wall = np.concatenate([bottom[lower], top[lower][::-1]])
    return (wall, 0.85), (top, 1.2)


def _box(at: complex, radius: float, half: float, depth: float, horizon: float) -> Faces:
    """Return the front of a box around `at`, its top, and the side that the camera, in the middle, sees."""
    front = at + radius * _path(-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j)
    vanishing = complex(0.5, horizon)
    behind = vanishing + (front - vanishing) * depth / (depth + 2 * half)
    seen = [((0, 1), 1.2)]  # corners of the edge at which a face leaves the front, and how light that face is
    if front[1].real < vanishing.real:
        seen.append(((1, 2), 0.65))
    if front[0].real > vanishing.real:
        seen.append(((3, 0), 0.65))
    receding = [(_path(front[i], front[j], behind[j], behind[i]), light) for (i, j), light in seen]
    return (front, 0.85), *receding


_ARRANGE: dict[str, tuple[int, Callable[[int, Generator], Scene]]] = {
    "location": (LOCATIONS, _location),
    "orientation": (ORIENTATIONS, _orientation),
    "count": (COUNTS, _count),
    "distance": (DISTANCES, _distance),
}
TASKS: dict[str, int] = {task: classes for task, (classes, _) in _ARRANGE.items()}
"""The number of classes of each task."""


def class_name(task: str, label: int) -> str:
    """Return the name of a class, e.g. `count_03` for three objects."""
    return f"{task}_{label + (FEWEST if task == 'count' else 0):02d}"


def arrange(task: str, label: int, rng: Generator) -> Scene:
    """Return the scene of a label: where the shapes are, not how they look.

    Raises:
        DataError: there is no such task or label.
    """
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}{nearest(task, TASKS)}; choose one of {', '.join(TASKS)}")
    classes, function = _ARRANGE[task]
    if not 0 <= label < classes:
        raise DataError(f"the label of {task} must be 0 to {classes - 1}, got {label}")
    return function(label, rng)


def draw_sprite(task: str, label: int, rng: Generator, size: int, style: str = "plain") -> Image.Image:
    """Return one RGB picture of `size` × `size` pixels.

    The arrangement and the look come from two generators that `rng` spawns: a new generator of the same seed gives the
    same scene in both styles, and the same look to every label.

    Raises:
        DataError: there is no such task, label or style, or `size` is too small to see anything.
    """
    if style not in STYLES:
        raise DataError(f"unknown style {style!r}{nearest(style, STYLES)}; choose one of {', '.join(STYLES)}")
    if size < SMALLEST_SIZE:
        raise DataError(f"a sprite of {size} pixels cannot be seen; use a size of at least {SMALLEST_SIZE}")
    arrangement, look = rng.spawn(2)
    return paint(arrange(task, label, arrangement), look, size, restyled=style == "restyled")


def draw_sprites(
    task: str,
    root: str | Path,
    *,
    train: int = 450,
    val: int = 150,
    test: int = 500,
    restyled: int = 500,
    size: int = 98,
    seed: int = 0,
) -> Path:
    """Draw `root/images/{train,val,test}/CLASS/NNNNN.png` and `root/restyled/CLASS/NNNNN.png`, and return `root`.

    Picture i of a part has class i modulo the classes and depends on `seed`, the task, the part and i alone. Parts of 0
    pictures are left out. The folder is there whole or not at all.

    Raises:
        DataError: `root` exists and is not an empty folder, there is no such task, a count or `seed` is negative, or
            `size` is too small.
    """
    root = Path(root)
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}{nearest(task, TASKS)}; choose one of {', '.join(TASKS)}")
    counts = dict(zip(PARTS, (train, val, test, restyled), strict=True))
    if min(*counts.values(), seed) < 0:
        raise DataError(f"numbers of sprites and the seed must not be negative, got {counts}, seed {seed}")
    with new_folder(root) as drawn:
        for number, (part, count) in enumerate(counts.items()):
            style = "restyled" if part == "restyled" else "plain"
            for index in range(count):
                label = index % TASKS[task]
                folder = drawn / (part if part == "restyled" else f"images/{part}") / class_name(task, label)
                folder.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([seed, list(TASKS).index(task), number, index])
                draw_sprite(task, label, rng, size, style).save(folder / f"{index:05d}.png", compress_level=3)
    return root
