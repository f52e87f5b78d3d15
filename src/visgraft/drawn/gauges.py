"""The demo task: analogue gauges in many styles, whose class is the position of the needle.

Everything but the needle is chance, so what a picture mostly shows (colours, shapes, light) says nothing about its
class. Position 0 points straight up; the 16 positions follow clockwise, 22.5 degrees apart.

A point of the dial is a complex number x + iy, so that a rotation is a product: the hub is 0, the edge of the face
has radius 1, y grows downwards. Point arrays have shape (count,); angles are in degrees clockwise from the top.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from visgraft.drawn.folder import new_folder
from visgraft.drawn.table import Drawn, check_counts, write_tables
from visgraft.errors import DataError

POSITIONS = 16
LOWEST, HIGHEST = 0.5, 15.5  # of readings that are numbers: a position's width is left out where the scale begins anew
# The three sources of a wrong reading add up to at most 2 + 3 + 3.7 = 8.7 degrees, under the half step of 11.25:
# a squeeze to 0.88 turns a direction by at most asin(0.12 / 1.88), which is 3.7 degrees.
NEEDLE_JITTER = 2.0
DIAL_ROTATION = 3.0
STRONGEST_SQUEEZE = 0.88
SMALLEST_SIZE = 48
SUPERSAMPLING = 4
UNITS = ("bar", "psi", "kPa", "rpm", "km/h", "V", "A", "°C", "%", "mbar")

Points = NDArray[np.complex128]
Colour = tuple[int, ...]  # red, green, blue and perhaps opacity, each 0..255
_load_font = cache(ImageFont.load_default)  # unpacking the font takes longer than drawing a label
SHADOW: Colour = (0, 0, 0, 70)
ZONES: tuple[Colour, ...] = ((40, 160, 70), (240, 190, 30), (210, 40, 40))
STRONG_COLOURS: tuple[Colour, ...] = (
    (200, 24, 30), (235, 92, 20), (250, 205, 40), (20, 130, 60), (90, 225, 120), (25, 70, 185), (95, 190, 250),
    (120, 30, 140), (245, 130, 190), (70, 42, 25), (15, 15, 18), (15, 15, 18), (250, 250, 246), (250, 250, 246),
)  # fmt: skip


@dataclass(frozen=True)
class _Pen:
    """Draws shapes given as points of the dial, as a slightly tilted camera sees them."""

    draw: ImageDraw.ImageDraw
    rotation: complex
    squeeze_axis: complex
    squeeze: float
    vanishing: complex
    scale: float = 1.0
    centre: complex = 0j

    def place(self, points: Points) -> NDArray[np.float64]:
        """Return where `points` are on the canvas, shape (count, 2), x and y in pixels."""
        turned = points * self.rotation
        squeezed = turned - (1 - self.squeeze) * self.squeeze_axis * (turned * self.squeeze_axis.conjugate()).real
        # This perspective only stretches each ray from the hub, so it cannot move the needle to another class.
        placed = self.centre + self.scale * squeezed / (1 + (squeezed * self.vanishing).real)
        return np.column_stack([placed.real, placed.imag])

    def fill(self, points: Points, colour: Colour) -> None:
        """Fill the polygon with the corners `points`."""
        self.draw.polygon(self.place(points).ravel().tolist(), fill=colour)

    def write(self, text: str, at: complex, height: float, colour: Colour) -> None:
        """Write `text` upright and centred on `at`, its letters about `height` dial radii high."""
        x, y = self.place(np.array([at]))[0]
        self.draw.text((float(x), float(y)), text, colour, _load_font(round(height * self.scale)), anchor="mm")


def draw_gauges(
    root: str | Path,
    *,
    train: int = 592,
    val: int = 160,
    test: int = 496,
    size: int = 128,
    seed: int = 0,
    positions: Sequence[int] = tuple(range(POSITIONS)),
) -> Path:
    """Draw the image folder `root/{train,val,test}/position_NN/NNNNN.png` and return `root`.

    Picture number i of a split has class i modulo 16, or the i-th of fewer `positions` in turn, and depends on `seed`,
    the split and i alone. Only the folders of classes that have pictures are made. `size` is the side of a picture in
    pixels.

    Raises:
        DataError: `root` exists and is not an empty folder, a count or `seed` is negative, or `size` is too small.
    """
    root = Path(root)
    if min(train, val, test, seed) < 0:
        raise DataError(f"gauge counts and seed must not be negative, got {train=}, {val=}, {test=}, {seed=}")
    with new_folder(root) as drawn:
        for split_number, (split, count) in enumerate([("train", train), ("val", val), ("test", test)]):
            for index in range(count):
                position = positions[index % len(positions)]
                folder = drawn / split / f"position_{position:02d}"
                folder.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([seed, split_number, index])
                draw_gauge(position, rng, size).save(folder / f"{index:05d}.png", compress_level=3)
    return root


def draw_gauge(position: float, rng: np.random.Generator, size: int, jitter: float = NEEDLE_JITTER) -> Image.Image:
    """Return one RGB picture, `size` × `size` pixels, of a gauge whose needle stands at `position` (0..15).

    It may stand between two positions; `jitter` degrees is how far off it is at most. The style comes from `rng`, in
    draws that do not depend on `position`: the same generator state gives the same gauge with another reading.

    Raises:
        DataError: `position` is outside 0..15, or `size` is too small to read.
    """
    if not 0 <= position < POSITIONS:
        raise DataError(f"gauge position must be 0 to {POSITIONS - 1}, got {position}")
    if size < SMALLEST_SIZE:
        raise DataError(f"a gauge of {size} pixels cannot be read; use a size of at least {SMALLEST_SIZE}")
    face, rim, ink, needle = _choose_colours(rng)
    canvas = draw_background(rng, size * SUPERSAMPLING)
    housing = _outline(float(rng.choice([2, 2, 2, 5, 14])), rng.uniform(1.06, 1.2))
    pen = _aim_camera(rng, canvas, housing)
    _draw_housing(pen, rng, face, rim, housing)
    _draw_scale(pen, rng, face, ink)
    angle = position * 360 / POSITIONS + rng.uniform(-jitter, jitter)
    _draw_needle(pen, rng, needle, rim, angle)
    return photograph(canvas.resize((size, size), Image.Resampling.LANCZOS), rng)


def draw_gauge_table(
    root: str | Path, *, train: int = 600, val: int = 200, test: int = 400, size: int = 98, seed: int = 0
) -> Path:
    """Draw gauges with the columns `position`, one of 16 classes, and `reading`, the true number; returns `root`.

    Readings are spread evenly from 0.5 to 15.5 on the scale, so that none is near the top, where the scale begins
    anew. The classes are 16 equal parts of that range, each 0.9375 wide. Picture i of a part has class i modulo 16 and
    depends on `seed`, the part and i alone. See `write_tables` for the files.

    Raises:
        DataError: a count or `seed` is negative, or `size` is too small.
        VisgraftError: `root` holds something else, or cannot be written.
    """
    counts = {"train": train, "val": val, "test": test}
    check_counts(counts, seed)

    def drawn() -> Iterator[Drawn]:
        for number, (part, count) in enumerate(counts.items()):
            for index in range(count):
                rng = np.random.default_rng([seed, number, index, 1])
                position = index % POSITIONS
                reading = LOWEST + (HIGHEST - LOWEST) * (position + float(rng.uniform())) / POSITIONS
                columns: dict[str, str | float] = {"position": f"part_{position:02d}", "reading": round(reading, 3)}
                yield Drawn(part, draw_gauge(reading, rng, size, jitter=0.0), columns)

    return write_tables(Path(root), drawn())


def _turn(angle: float) -> complex:
    """Return the factor that turns points clockwise by `angle`."""
    return complex(np.exp(1j * np.deg2rad(angle)))


def _outline(squareness: float, radius: float) -> Points:
    """Return a closed curve between a circle (`squareness` 2) and a square with round corners (above 10)."""
    circle = np.exp(2j * np.pi * np.arange(120) / 120)
    norm = (np.abs(circle.real) ** squareness + np.abs(circle.imag) ** squareness) ** (1 / squareness)
    return np.asarray(radius * circle / norm)


def _arc(inner: float, outer: float, start: float, stop: float) -> Points:
    """Return the part of a ring between two radii and two angles."""
    arc = -1j * np.exp(1j * np.deg2rad(np.linspace(start, stop, max(2, int((stop - start) / 3)))))
    return np.concatenate([outer * arc, inner * arc[::-1]])


def _strip(start: float, stop: float, first_half: float, last_half: float) -> Points:
    """Return an upward strip between two heights above the hub, with the half width at each."""
    return np.array([-first_half - 1j * start, first_half - 1j * start, last_half - 1j * stop, -last_half - 1j * stop])


def _aim_camera(rng: np.random.Generator, canvas: Image.Image, housing: Points) -> _Pen:
    """Choose rotation, tilt, scale and shift such that the whole housing is in the picture."""
    rotation, axis = _turn(rng.uniform(-DIAL_ROTATION, DIAL_ROTATION)), _turn(rng.uniform(0, 180))
    vanishing = complex(*rng.uniform(-0.08, 0.08, size=2))
    pen = _Pen(ImageDraw.Draw(canvas, "RGBA"), rotation, axis, rng.uniform(STRONGEST_SQUEEZE, 1.0), vanishing)
    corners = pen.place(housing)
    low, high = corners.min(axis=0), corners.max(axis=0)
    scale = canvas.width * rng.uniform(0.76, 0.96) / float((high - low).max())
    margin = (canvas.width - scale * (high - low)) / 2
    x, y = canvas.width / 2 - scale * (low + high) / 2 + rng.uniform(-0.8, 0.8, size=2) * margin
    return replace(pen, scale=scale, centre=complex(x, y))


def _colour(values: NDArray[np.float64]) -> Colour:
    return tuple(int(value) for value in np.clip(values, 0, 255))


def visible_on(face: Colour, rng: np.random.Generator, difference: float) -> Colour:
    """Return a strong colour whose lightness, 0 to 1, differs from `face`; black or white does so by at least 0.45."""
    candidates = [face, *(STRONG_COLOURS[number] for number in rng.permutation(len(STRONG_COLOURS)))]
    lightness = ((np.array(candidates) / 255) ** 2.2 @ np.array([0.2126, 0.7152, 0.0722])) ** (1 / 2.2)
    return candidates[int(np.argmax(np.abs(lightness - lightness[0]) >= difference))]


def _choose_colours(rng: np.random.Generator) -> tuple[Colour, Colour, Colour, Colour]:
    """Return the colours of face, rim, ink and needle."""
    darkest, lightest = ((205, 255), (12, 50), (30, 235))[int(rng.choice(3, p=[0.45, 0.3, 0.25]))]
    face = _colour(rng.uniform(darkest, lightest, size=3))
    rim = _colour(rng.uniform(20, 225) + rng.uniform(-20, 20, size=3))
    return face, rim, visible_on(face, rng, 0.35), visible_on(face, rng, 0.45)


def draw_background(rng: np.random.Generator, side: int) -> Image.Image:
    """Return a canvas with a gradient, clouds or a grain: a coarse grid of colours, stretched smoothly."""
    cells = int(rng.choice([2, 2, 3, 6, 12, 40]))
    base = rng.uniform(40, 215) + rng.uniform(-45, 45, size=3)
    waves = rng.normal(0, 1, size=(cells, cells, 1)) + rng.normal(0, 0.25, size=(cells, cells, 3))
    grid = base + rng.uniform(4, 30 if cells < 10 else 14) * waves
    return Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def _draw_housing(pen: _Pen, rng: np.random.Generator, face: Colour, rim: Colour, outer: Points) -> None:
    """Draw the housing with the outline `outer`, and on it the blank face, round or of the same shape."""
    pen.fill(outer + complex(*rng.uniform(-0.06, 0.06, size=2)), SHADOW)
    pen.fill(outer, rim)
    pen.fill(outer * 0.965, _colour(np.array(rim) * rng.uniform(0.65, 1.35)))
    pen.fill(outer / np.abs(outer).min() if rng.random() < 0.5 else _outline(2.0, 1.0), face)
    # The inner disc differs so little from the face that the needle stays visible on both.
    pen.fill(_outline(2.0, rng.uniform(0.4, 0.75)), _colour(np.array(face) * rng.uniform(0.92, 1.06)))


def _draw_scale(pen: _Pen, rng: np.random.Generator, face: Colour, ink: Colour) -> None:
    """Draw coloured zones, ticks, labels and a unit; a long tick stands at every position or at every other."""
    outer, length, half = rng.uniform(0.9, 0.96), rng.uniform(0.07, 0.14), rng.uniform(0.011, 0.022)
    if rng.random() < 0.4:
        edges = rng.uniform(0, 360) + np.cumsum(rng.uniform(30, 110, size=len(ZONES) + 1))
        for start, stop, colour in zip(edges[:-1], edges[1:], ZONES, strict=True):
            pen.fill(_arc(0.88, 0.97, float(start), float(stop)), colour)
    ticks = int(rng.choice([8, 16, 32, 64]))
    for number in range(ticks):
        share = 1.0 if number % max(1, ticks // POSITIONS) == 0 else 0.5
        pen.fill(_strip(outer - share * length, outer, share * half, share * half) * _turn(number * 360 / ticks), ink)
    labels = int(rng.choice([0, 4, 8, 16], p=[0.3, 0.25, 0.3, 0.15]))
    factor = 10 if labels < POSITIONS and rng.random() < 0.5 else 1
    height = rng.uniform(0.15, 0.2)
    for number in range(labels):
        at = -1j * (outer - length - 0.13) * _turn(number * 360 / labels)
        pen.write(str(factor * number * POSITIONS // labels), at, height, ink)
    if rng.random() < 0.5:
        pale = _colour((np.array(ink) + np.array(face)) / 2)  # because the needle may cross the unit
        pen.write(str(rng.choice(UNITS)), 1j * float(rng.choice([-0.32, 0.32])), height, pale)


def _draw_needle(pen: _Pen, rng: np.random.Generator, colour: Colour, rim: Colour, angle: float) -> None:
    """Draw shadow, needle and hub; a tail, where there is one, is at most a third of the needle and ends in a disc."""
    length, half = rng.uniform(0.6, 0.8), rng.uniform(0.028, 0.05)
    line = [_strip(0.0, length, half, half)]
    triangle = [_strip(0.0, length, 1.6 * half, 0.2 * half)]
    counterweight = [_strip(-0.2 * length, length, half, 0.35 * half), _outline(2.0, 1.6 * half) + 0.2j * length]
    arrow = [_strip(0.0, length - 0.2, half, 0.8 * half), _strip(length - 0.24, length, 2.6 * half, 0.0)]
    parts = [part * _turn(angle) for part in (line, triangle, counterweight, arrow)[int(rng.integers(4))]]
    for shift, paint in ((complex(*rng.uniform(-0.035, 0.035, size=2)), SHADOW), (0j, colour)):
        for part in parts:
            pen.fill(part + shift, paint)
    hub, paint = rng.uniform(0.06, 0.11), (colour, rim)[int(rng.integers(2))]
    pen.fill(_outline(2.0, hub), paint)
    pen.fill(_outline(2.0, 0.45 * hub), _colour(np.array(paint) * 0.6))


def photograph(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add what a camera adds: blur, a spot of glare, brightness and noise."""
    size = picture.width
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.007) * size)), dtype=np.float64)
    rows, columns = np.mgrid[0:size, 0:size] / size - rng.uniform(0.15, 0.85, size=(2, 1, 1))
    spread, strength = rng.uniform(0.06, 0.25), rng.choice([0.0, rng.uniform(0.1, 0.4)])
    glare = strength * np.exp(-(rows**2 + columns**2) / (2 * spread**2))
    lit = (pixels + (255 - pixels) * glare[:, :, None]) * rng.uniform(0.75, 1.12)
    noisy = lit + rng.normal(0, rng.uniform(0, 9), size=pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
