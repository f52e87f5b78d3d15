"""Pictures that live inside the page: data URIs of figures, photographs, heat maps and small colour grids."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PixelArray = NDArray[np.uint8]
Values = NDArray[np.float64]

THUMBNAIL = 168
BLUE, ORANGE, RED = "#3b82c4", "#dd7f23", (214, 39, 40)
THEMES = {
    "light": {"ink": "#2b3138", "grid": "#d5dae0"},
    "dark": {"ink": "#d3d8de", "grid": "#454c55"},
}


@dataclass(frozen=True)
class Picture:
    """A picture as data URIs, one for light pages and one for dark ones, and the words that stand for it."""

    light: str
    dark: str
    alt: str


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def draw(paint: Callable[[Any, dict[str, str]], None], size: tuple[float, float], alt: str, kind: str) -> Picture:
    """Draw a figure once for light and once for dark pages.

    Args:
        paint: draws on the matplotlib figure it is given, with the theme's colours `ink` and `grid`.
        size: width and height in inches.
        alt: what the picture shows, for those who cannot see it.
        kind: `svg`, or `png` for what is made of pixels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    uris = {}
    for name, colours in THEMES.items():
        ink = colours["ink"]
        style = {
            "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": colours["grid"], "xtick.color": ink,
            "ytick.color": ink, "grid.color": colours["grid"], "axes.spines.top": False, "axes.spines.right": False,
            "font.size": 10, "axes.titlesize": 10.5, "legend.frameon": False, "text.parse_math": False,
            "svg.hashsalt": "visgraft",
        }  # fmt: skip
        with matplotlib.rc_context(style):
            figure, buffer = Figure(figsize=size, layout="constrained"), io.BytesIO()
            paint(figure, colours)
            facts = {"metadata": {"Date": None}} if kind == "svg" else {}
            figure.savefig(buffer, format=kind, transparent=True, dpi=170, **facts)
        uris[name] = _uri("svg+xml" if kind == "svg" else kind, buffer.getvalue())
    return Picture(uris["light"], uris["dark"], alt)


def photograph(pixels: PixelArray, alt: str, side: int = THUMBNAIL) -> Picture:
    """Return pixels [H, W, 3] as a JPEG of at most `side` pixels."""
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(buffer, "jpeg", quality=82, optimize=True)
    uri = _uri("jpeg", buffer.getvalue())
    return Picture(uri, uri, alt)


def heat_map(pixels: PixelArray, heat: Values, alt: str) -> Picture:
    """Return the picture in grey under a map [rows, columns] of values from 0 (clear) to 1 (red)."""
    height, width = pixels.shape[:2]
    small = Image.fromarray(np.clip(heat, 0, 1).astype(np.float32))
    opacity = 0.75 * np.clip(np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)), 0, 1)[..., None]
    grey = pixels.mean(axis=2, keepdims=True)
    return photograph((grey * (1 - opacity) + np.array(RED) * opacity).astype(np.uint8), alt)


def colour_grid(colours: Values, alt: str) -> Picture:
    """Return colours [rows, columns, 3] between 0 and 1 as a PNG with one pixel each, which the page enlarges."""
    buffer = io.BytesIO()
    Image.fromarray((255 * np.clip(colours, 0, 1)).round().astype(np.uint8)).save(buffer, "png", optimize=True)
    uri = _uri("png", buffer.getvalue())
    return Picture(uri, uri, alt)
