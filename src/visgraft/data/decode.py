"""Image files to RGB pictures, and which files count as images."""

import contextlib
import io
import os
import re
import stat
import warnings
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from visgraft.data.dataset import Example
from visgraft.data.urls import is_url, read_url
from visgraft.errors import DataError, VisgraftError

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Pillow recognises these containers of data and video, but decodes none of them.
UNDECODED_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG"}
# Images even where nothing that decodes them is installed: refused with a remedy, rather than overlooked.
HEIF_EXTENSIONS = frozenset({".heic", ".heif", ".hif", ".avif"})
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
LONGEST_RATIO = 500  # of the sides; making a longer picture square would take gigabytes
PHOTOMETRIC, WHITE_IS_ZERO, ORIENTATION = 262, 0, 274  # tags of TIFF and EXIF

# Pillow warns from MAX_IMAGE_PIXELS on and refuses at twice that; only the refusal is of use here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # of damaged EXIF data


def max_pixels() -> int:
    """Return the most pixels (width times height) that are decoded: twice `PIL.Image.MAX_IMAGE_PIXELS`, 178,956,970."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def open_image(source: str | Path | Example, background: str = "white", most_pixels: int | None = None) -> Image.Image:
    """Decode an image file, or the first picture of several, to RGB and upright by EXIF; a text may be a URL.

    Transparent places show `background`, a colour's name or #rrggbb. Grey levels of 16 bit become 8 bit by dividing by
    257, and floating-point grey levels from 0 to 1 by multiplying by 255; nothing is stretched picture by picture. Of a
    picture with more than `most_pixels` only the header is read.

    Raises:
        DataError: the file does not decode to a whole image, has too many pixels or is a mere line, or there is no
            such colour.
        VisgraftError: URLs of this kind cannot be opened here.
    """
    colour = colour_of(background)
    name = source.path if isinstance(source, Example) else source
    start = b""
    try:
        with _file(source) as file:
            start = file.read(16)
            file.seek(0)
            with Image.open(file) as stored:
                _check_ratio(stored.size, str(name))
                _check_pixels(stored.size, str(name), most_pixels)
                inverted = getattr(stored, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
                image = _upright(stored)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bit(image, inverted, str(name))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image.convert("RGBA"))
        return image.convert("RGB")
    except VisgraftError:
        raise
    except Image.DecompressionBombError as error:  # raised on the header, before anything is decoded
        size = re.search(r"\d+(?= pixels)", str(error))
        found = f"{int(size[0]):,} pixels, more than" if size else "more pixels than"
        raise DataError(f"{name} has {found} the {max_pixels():,} that are decoded; scale it down") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not a readable image ({_unknown(start)}") from error
    except Exception as error:  # on damaged files, Pillow's decoders raise nearly every kind of exception
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(
            f"{name} is not a readable image ({reason or type(error).__name__}); remove it or replace it"
        ) from error


def _check_ratio(size: tuple[int, int], name: str) -> None:
    """Raise a DataError where a picture is a mere line; only its header has been read."""
    if max(size) > LONGEST_RATIO * min(size):
        raise DataError(
            f"{name} is {size[0]:,} × {size[1]:,} pixels, more than {LONGEST_RATIO} times as long as wide; cut it into "
            "pieces, or leave it out"
        )


def _check_pixels(size: tuple[int, int], name: str, most: int | None) -> None:
    if most is not None and size[0] * size[1] > most:
        raise DataError(
            f"{name} has {size[0] * size[1]:,} pixels, more than the {most:,} that are decoded here; scale it down"
        )


@cache
def colour_of(name: str) -> tuple[int, int, int]:
    """Return red, green and blue of a colour's name or #rrggbb.

    Raises:
        DataError: there is no such colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise DataError(f"background is {name!r}, which is no colour; use a name such as white, or #rrggbb") from error
    return red, green, blue


def _file(source: str | Path | Example) -> IO[bytes]:
    if is_url(source):
        return io.BytesIO(read_url(source))
    if not isinstance(source, Example):
        return open(source, "rb")
    return open(source.path, "rb") if source.content is None else io.BytesIO(source.content())


def _upright(image: Image.Image) -> Image.Image:
    """Return a decoded copy, turned as EXIF says; a picture whose EXIF data is damaged stays as it is stored."""
    image.load()
    try:
        image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raises nearly every kind of exception
        return image.copy()
    return ImageOps.exif_transpose(image)


def _eight_bit(image: Image.Image, inverted: bool, name: str) -> Image.Image:
    """Return grey levels of 16 bit, or of floating point from 0 to 1, as 8 bit; with alpha where one level is clear.

    Raises:
        DataError: a level is out of range.
    """
    levels = np.asarray(image)
    top, kind = (1, "floating-point") if image.mode == "F" else (65535, "whole-number")
    low, high = levels.min(), levels.max()
    if not (low >= 0 and high <= top):  # written so that NaN is refused too
        remedy = f"scale them to 0 to {top}, or save it with 8 bit"
        raise DataError(f"{name} has {kind} grey levels from {low:g} to {high:g}; {remedy}")
    if inverted:  # Pillow turns these over in 8 bit only
        levels = top - levels
    scaled = np.rint(levels * np.float64(255 / top)).astype(np.uint8)
    grey, clear = Image.fromarray(scaled), image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    return grey


def _unknown(start: bytes) -> str:
    """Say why a file that begins with these bytes is of no known format, and what helps."""
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    if brand in HEIF_BRANDS:
        return "HEIC needs one more package); run pip install 'visgraft[heic]'"
    if brand in (b"avif", b"avis"):
        return "this Pillow has no AVIF); run pip install --upgrade pillow"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return "damaged, or a kind of TIFF that Pillow does not read); replace it, or save it as 8-bit RGB"
    return "its content is of no known image format); remove it or replace it"


@cache
def image_extensions() -> frozenset[str]:
    """Return the extensions that mark a file as an image, in lower case with the dot."""
    extensions = Image.registered_extensions()
    # Pillow opens MPO files (two views of a stereo camera) by way of JPEG, so they are not in its table.
    openable = (Image.OPEN.keys() | {"MPO"}) - UNDECODED_FORMATS
    known = frozenset(extension.lower() for extension, kind in extensions.items() if kind in openable)
    return known | HEIF_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's own: hidden, or left behind by an operating system."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_image(path: str) -> bool:
    """Whether a file is an image by its extension or, where it has none, by its content."""
    extension = os.path.splitext(path)[1].lower()
    if extension:
        return extension in image_extensions()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading from a pipe would wait for ever
            return False
        with Image.open(path) as stored:  # reads the header only
            return stored.format not in UNDECODED_FORMATS
    except Exception:  # of what is no image, Pillow's readers raise nearly every kind of exception
        return False
