"""What is kept of every image: numbers about its file and its picture, but not its pixels."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from visgraft.data.dataset import Example
from visgraft.data.decode import ORIENTATION, open_image
from visgraft.data.identity import mapped_in_order
from visgraft.errors import DataError

OnStage = Callable[[str, int, int], None]  # the stage in words, how much is done, and of how much

HASH_SIDE = 16
MINIATURE_SIDE = 16
STATISTICS_SIDE = 64
LARGEST_SIDE = 512  # larger pictures are reduced first, which changes neither the hash nor the colours visibly


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one readable image.

    `digest` is the SHA-256 of its bytes, `hash` its perceptual hash [32 bytes], `miniature` its picture as 16 × 16 RGB
    bytes. `width` and `height` are pixels after turning by EXIF. `quality` is the mean of a JPEG's quantisation tables
    for brightness and for colour, 0 for other formats. `colour` is the mean red, green, blue and the standard
    deviation of brightness, 0 to 255.
    """

    digest: bytes
    size: int
    width: int
    height: int
    format: str
    mode: str
    deep: bool
    alpha: bool
    frames: int
    turned: bool
    grey: bool
    quality: tuple[float, float]
    colour: tuple[float, float, float, float]
    hash: bytes
    miniature: bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why an image cannot be read."""

    reason: str


def gather(examples: Sequence[Example], on_progress: OnStage | None = None) -> list[Facts | Unreadable]:
    """Read and decode every image once, in threads; memory holds a kilobyte or two per image.

    An image that cannot be read does not stop the others.
    """
    found: list[Facts | Unreadable] = []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for one in mapped_in_order(pool, read_facts, examples):
            found.append(one)
            if on_progress:
                on_progress("reading images", len(found), len(examples))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted check should not read on
    return found


def read_facts(example: Example) -> Facts | Unreadable:
    """Read one image; what is wrong with its file is returned, not raised."""
    import imagehash  # slow, and only needed here

    try:
        content = example.path.read_bytes() if example.content is None else example.content()
    except OSError as error:
        return Unreadable(error.strerror or str(error) or type(error).__name__)
    except DataError as error:
        return Unreadable(str(error))
    try:
        picture = open_image(example._replace(content=lambda: content))
    except DataError as error:
        return Unreadable(_reason(str(error).removeprefix(f"{example.path} ")))
    width, height = picture.size
    small = picture.reduce(max(1, max(picture.size) // LARGEST_SIDE))
    pixels = np.asarray(small.resize((STATISTICS_SIDE, STATISTICS_SIDE), Image.Resampling.BOX), dtype=np.int16)
    red, green, blue = (float(value) for value in pixels.mean(axis=(0, 1)))
    miniature = small.resize((MINIATURE_SIDE, MINIATURE_SIDE), Image.Resampling.BOX)
    with Image.open(io.BytesIO(content)) as file:  # opens the header only
        tables = getattr(file, "quantization", None) or {}
        return Facts(
            digest=hashlib.sha256(content).digest(),
            size=len(content),
            width=width,
            height=height,
            format=file.format or "unknown",
            mode=file.mode,
            deep=file.mode == "F" or file.mode.startswith("I"),
            alpha=file.has_transparency_data,
            frames=_frames(file),
            turned=_orientation(file) not in (None, 1),
            grey=int(np.ptp(pixels, axis=2).max()) <= 2,  # JPEG may round the channels of a grey picture apart
            quality=(float(np.mean(tables.get(0, 0))), float(np.mean(tables.get(1, 0)))),
            colour=(red, green, blue, float(pixels.mean(axis=2).std())),
            hash=np.packbits(imagehash.phash(small, hash_size=HASH_SIDE).hash).tobytes(),
            miniature=miniature.tobytes(),
        )


def _reason(message: str) -> str:
    """Take the reason out of "is not a readable image (REASON); REMEDY"; the common remedies are the finding's own."""
    reason, _, remedy = message.removeprefix("is not a readable image (").partition("); ")
    return reason if remedy.startswith(("remove", "replace")) else f"{reason}; {remedy}".removesuffix("; ")


def _frames(file: Image.Image) -> int:
    try:
        return int(getattr(file, "n_frames", 1))
    except Exception:  # later frames may be damaged; only the first is used, and that one decoded
        return 1


def _orientation(file: Image.Image) -> int | None:
    try:
        return file.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data raises nearly every kind of exception; such a picture is not turned
        return None
