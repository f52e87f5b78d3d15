"""Image files to RGB pictures, and which files count as images."""

from functools import cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from visgraft.errors import DataError

# Pillow recognises these containers of data and video, but decodes none of them.
UNDECODED_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG"}


def open_image(path: str | Path) -> Image.Image:
    """Decode an image file, or an animation's first frame, to RGB: upright by EXIF, transparent places on white.

    Raises:
        DataError: the file does not decode to an image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # on damaged files, Pillow's decoders raise nearly every kind of exception
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its message only repeats the path
            reason = "its content is of no known image format"
        raise DataError(f"{path} is not a readable image ({reason}); remove it or replace it") from error


@cache
def image_extensions() -> frozenset[str]:
    """Return the extensions that mark a file as an image, in lower case with the dot."""
    extensions = Image.registered_extensions()
    # Pillow opens MPO files (two views of a stereo camera) by way of JPEG, so they are not in its table.
    openable = (Image.OPEN.keys() | {"MPO"}) - UNDECODED_FORMATS
    return frozenset(extension.lower() for extension, kind in extensions.items() if kind in openable)
