"""Paint a scene of solids: plain, like coloured paper under a camera, or restyled, like chalk and ink hatching."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from visgraft.drawn.gauges import SHADOW, SUPERSAMPLING, Colour, draw_background, photograph, visible_on

Curve = NDArray[np.complexfloating]
BOARDS: tuple[Colour, ...] = (
    (24, 52, 110),
    (28, 62, 50),
    (26, 26, 30),
    (240, 233, 214),
    (196, 164, 120),
    (250, 250, 248),
)
"""Blueprint, two blackboards, cream and brown paper, white."""
CHALKS: tuple[Colour, ...] = ((245, 245, 240), (250, 225, 130), (160, 215, 250), (250, 170, 160), (170, 235, 180))
INKS: tuple[Colour, ...] = ((20, 20, 25), (30, 50, 140), (150, 30, 40), (30, 100, 60), (90, 50, 20))


@dataclass(frozen=True)
class Solid:
    """A thing in a scene: faces with how light each is (1: its own colour), a shadow, and how far away it stands."""

    faces: tuple[tuple[Curve, float], ...]
    shadow: Curve | None = None
    depth: float = 1.0

    @classmethod
    def flat(cls, outline: Curve) -> Self:
        """Return a thing of one face."""
        return cls(((outline, 1.0),))


@dataclass(frozen=True)
class Scene:
    """Solids from the farthest to the nearest, and the height of the horizon where there is a ground."""

    solids: tuple[Solid, ...]
    horizon: float | None = None


def closed(points: int) -> Curve:
    """Return a circle of radius 1 around 0."""
    return np.asarray(np.exp(2j * np.pi * np.arange(points) / points))


def paint(scene: Scene, rng: np.random.Generator, size: int, *, restyled: bool) -> Image.Image:
    """Return the scene as an RGB picture of `size` × `size` pixels, antialiased."""
    side = size * SUPERSAMPLING
    picture = (_restyled if restyled else _plain)(scene, rng, side).resize((size, size), Image.Resampling.LANCZOS)
    return _grain(picture, rng) if restyled else photograph(picture, rng)


def _pixels(points: Curve, side: int) -> list[float]:
    return list(np.column_stack([points.real, points.imag]).ravel() * side)


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(int(min(255, value * factor)) for value in colour)


def _plain(scene: Scene, rng: np.random.Generator, side: int) -> Image.Image:
    """Coloured paper on a soft background, with shadows."""
    canvas = draw_background(rng, side)
    draw = ImageDraw.Draw(canvas, "RGBA")
    if scene.horizon is not None:
        ground = tuple(int(value) for value in rng.uniform(60, 200, size=3))
        draw.rectangle((0, scene.horizon * side, side, side), fill=ground)
    light = complex(*rng.uniform(-0.012, 0.012, size=2))
    rim = rng.random() < 0.5
    for solid in scene.solids:
        drawn_on = canvas.getpixel(_middle(solid, side))
        assert isinstance(drawn_on, tuple)
        colour = visible_on(drawn_on, rng, 0.3)
        shadow = solid.faces[0][0] + light if solid.shadow is None else solid.shadow
        draw.polygon(_pixels(shadow, side), fill=SHADOW)
        for outline, factor in solid.faces:
            edge = _shade(colour, 0.6) if rim else None
            draw.polygon(_pixels(outline, side), fill=_shade(colour, factor), outline=edge, width=SUPERSAMPLING)
    return canvas


def _middle(solid: Solid, side: int) -> tuple[int, int]:
    """Return the pixel in the middle of a solid's first face."""
    middle = solid.faces[0][0].mean()
    return int(min(max(middle.real, 0), 0.99) * side), int(min(max(middle.imag, 0), 0.99) * side)


def _restyled(scene: Scene, rng: np.random.Generator, side: int) -> Image.Image:
    """Outlines and hatching on a board or on paper."""
    board = BOARDS[int(rng.integers(len(BOARDS)))]
    canvas = Image.new("RGB", (side, side), board)
    pens = CHALKS if sum(board) < 384 else INKS
    draw = ImageDraw.Draw(canvas)
    if rng.random() < 0.4:
        _rule(draw, rng, side, board)
    if scene.horizon is not None:
        pen = pens[int(rng.integers(len(pens)))]
        draw.line((0, scene.horizon * side, side, scene.horizon * side), fill=pen, width=2 * SUPERSAMPLING)
    width = int(rng.integers(1, 3)) * SUPERSAMPLING
    for solid in scene.solids:
        pen = pens[int(rng.integers(len(pens)))]
        for outline, _ in solid.faces:
            _hatch(canvas, outline, pen, board, rng)
            corners = _pixels(np.append(outline, outline[:2]), side)
            ImageDraw.Draw(canvas).line(corners, fill=pen, width=width, joint="curve")
    return canvas


def _rule(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int, board: Colour) -> None:
    """Rule faint lines."""
    faint = _shade(board, 1.25 if sum(board) < 384 else 0.88)
    step = side * rng.uniform(0.06, 0.14)
    for at in np.arange(rng.uniform(0, step), side, step):
        draw.line((0, at, side, at), fill=faint, width=SUPERSAMPLING)
        draw.line((at, 0, at, side), fill=faint, width=SUPERSAMPLING)


def _hatch(canvas: Image.Image, outline: Curve, pen: Colour, board: Colour, rng: np.random.Generator) -> None:
    """Cover what lies behind a face with the board's colour and hatch it."""
    direction, period = np.exp(1j * rng.uniform(0, np.pi)), rng.uniform(0.02, 0.05) * canvas.width
    corners = outline * canvas.width
    left, top = int(corners.real.min()), int(corners.imag.min())
    size = int(corners.real.max()) - left + 1, int(corners.imag.max()) - top + 1  # only as much as the face covers
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(_pixels(corners - complex(left, top), 1), fill=255)
    canvas.paste(board, (left, top), mask)
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    lines = ((columns * direction.real + rows * direction.imag) / period) % 1 < 0.3
    canvas.paste(pen, (left, top), Image.fromarray(np.asarray(mask) * lines.astype(np.uint8)))


def _grain(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add the grain of board or paper."""
    pixels = np.asarray(picture, dtype=np.float64)
    noise = rng.normal(0, rng.uniform(6, 18), size=(*pixels.shape[:2], 1))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
