"""Image folders: which images belong to which class, and to training, validation or test.

Two layouts are read. "split" is `ROOT/{train,val,test}/<class>/*`, where `val` may also be called `valid` or
`validation`, and only `train` is required; "flat" is `ROOT/<class>/*`, from which all three parts are drawn.

Images are found at any depth below a class folder, by extension: files with any other extension are ignored, and a
file with an image extension that does not decode is an error of `open_image`. Names with a leading dot and `__MACOSX`
are skipped. The parts are drawn class by class, so that rare classes are in each part too. The draw depends on the
seed and the sorted names below ROOT, not on where ROOT is.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visgraft.errors import DataError, nearest

Files = dict[str, list[Path]]  # the images of each class

PARTS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# A folder made of these names only is a split that we cannot read, not a task with classes of these names.
UNREAD_SPLIT_NAMES = {"training", "testing", "tests", "validate", "eval", "evaluation", "dev"}
# Pillow recognises these containers of data and video, but decodes none of them.
UNDECODED_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG"}


class Example(NamedTuple):
    """An image file and the index of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Folder:
    """The images of a folder, in three parts, each ordered by class and then by name.

    `fingerprint` is the SHA-256 of the relative paths and sizes of all images. `split` holds the validation fraction,
    the test fraction and the seed of a flat folder; it is None for the split layout.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]
    layout: Literal["split", "flat"]
    fingerprint: str
    split: tuple[float, float, int] | None

    def part(self, name: str) -> tuple[Example, ...]:
        """Return the examples of "train", "val" or "test".

        Raises:
            DataError: the part is empty, or there is no part of this name.
        """
        parts = {"train": self.train, "val": self.val, "test": self.test}
        if name not in parts:
            raise DataError(f"{name!r} is not a part of {self.root}; use {', '.join(PARTS)}{nearest(name, PARTS)}")
        if not parts[name]:
            remedies = [f"set {name}_fraction above 0"] if self.layout == "flat" or name == "val" else []
            remedies += [f"add {self.root / name}/<class>/<images>"] if self.layout == "split" else []
            raise DataError(f"{self.root} has no {name} images; {' or '.join(remedies)}")
        return parts[name]


def read_folder(root: str | Path, *, val_fraction: float = 0.15, test_fraction: float = 0.2, seed: int = 0) -> Folder:
    """Find the classes and images below `root` and divide the images into training, validation and test.

    A flat folder is divided by both fractions. In the split layout, a missing validation part is drawn from the
    training images by `val_fraction`, and a missing test part stays empty. A fraction of 0 leaves its part empty.

    Raises:
        DataError: the folder cannot be used, or a fraction or the seed is out of range.
    """
    root = Path(root)
    _check_draw(val_fraction, test_fraction, seed)
    try:
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            raise DataError(f"{root} {problem}; give a folder that holds one folder of images per class")
        parts = _part_folders(root)
        folders = parts or {"train": root}
        files = {part: _class_images(folder) for part, folder in folders.items()}
        fingerprint = _fingerprint(root, files)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
    classes = _checked_classes(folders, files)
    if "val" not in files:
        drawn_test = 0.0 if parts else test_fraction
        files = _draw(folders["train"], files.pop("train"), val_fraction, drawn_test, seed) | files
    train, val, test = (
        tuple(Example(path, label) for label, name in enumerate(classes) for path in files.get(part, {}).get(name, ()))
        for part in PARTS
    )
    split = None if parts else (val_fraction, test_fraction, seed)
    return Folder(root, classes, train, val, test, "split" if parts else "flat", fingerprint, split)


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


def _check_draw(val_fraction: float, test_fraction: float, seed: int) -> None:
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        both = f"val_fraction ({val_fraction}) and test_fraction ({test_fraction})"
        raise DataError(f"{both} must each be at least 0, and their sum must be below 1")
    if seed < 0:
        raise DataError(f"seed is {seed}, but must not be negative")


def _part_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each part in the split layout, or nothing for a flat folder."""
    folders, images = _contents(root)
    names = {folder.name.casefold(): folder.name for folder in folders}
    if "train" not in names:
        if names and names.keys() <= SPLIT_NAMES.keys() | UNREAD_SPLIT_NAMES:
            raise DataError(f"{root} has {_listed(names.values())} but no train; name the folders train, val and test")
        return {}
    others = _listed(folder.name for folder in folders if folder.name.casefold() not in SPLIT_NAMES)
    if others:
        raise DataError(f"{root} mixes train with other folders ({others}); keep only train, val and test, or no train")
    _check_no_loose_images(root, images, root / names["train"])
    parts = {SPLIT_NAMES[folder.name.casefold()]: folder for folder in folders}
    if len(parts) < len(folders):
        found = _listed(folder.name for folder in folders)
        raise DataError(f"{root} has two folders for one part among {found}; keep one for each part")
    return parts


def _class_images(folder: Path) -> Files:
    """Return the images of each class folder in `folder`, sorted by their path."""
    classes, loose = _contents(folder)
    _check_no_loose_images(folder, loose, folder)
    files = {entry.name: sorted(_images_below(entry), key=Path.as_posix) for entry in classes}
    if not any(files.values()):
        common = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".gif")
        extensions = f"{' '.join(common)} or {len(image_extensions() - set(common))} others that Pillow opens"
        raise DataError(f"{folder} holds no images; put them in {folder}/<class>/, with an extension of {extensions}")
    empty = _listed(name for name, paths in files.items() if not paths)
    if empty:
        raise DataError(f"{folder} has class folders without images: {empty}; fill or remove them")
    return files


def _check_no_loose_images(folder: Path, images: list[Path], parent: Path) -> None:
    loose = _listed(image.name for image in images)
    if loose:
        raise DataError(f"{folder} has images outside of class folders: {loose}; put each in {parent}/<class>/")


def _images_below(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """Return the images at any depth below a class folder, through links too."""
    here = folder.resolve()
    if here in above:
        raise DataError(f"{folder} is a link to a folder above it; remove the link")
    folders, images = _contents(folder)
    return images + [path for inner in folders for path in _images_below(inner, above | {here})]


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the images directly in a folder, without hidden ones, sorted by name."""
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX")
    images = [path for path in visible if path.suffix.lower() in image_extensions() and not path.is_dir()]
    return [path for path in visible if path.is_dir()], images


def _checked_classes(folders: dict[str, Path], files: dict[str, Files]) -> tuple[str, ...]:
    train, classes = folders["train"], tuple(sorted(files["train"]))
    if len(classes) == 1:
        remedy = f"add a second class folder, or, if {classes[0]} itself holds the class folders, move them up"
        raise DataError(f"{train} has only one class, {classes[0]}; {remedy}")
    for part, folder in folders.items():
        unknown = files[part].keys() - classes
        if unknown:
            raise DataError(f"{folder} has classes that {train} lacks: {_listed(unknown)}; add or remove them")
    return classes


def _draw(folder: Path, files: Files, val_fraction: float, test_fraction: float, seed: int) -> dict[str, Files]:
    """Divide each class on its own, with at least one image in every part whose fraction is above zero.

    One stratified draw over all images would fail on rare classes, and change every part when one class grows.
    """
    asked = [name for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)) if value > 0]
    small = [f"{name} ({len(paths)})" for name, paths in files.items() if len(paths) <= len(asked)]
    if asked and small:
        remedy = f"give each at least {len(asked) + 1}, or set {' or '.join(asked)} to 0"
        raise DataError(f"{folder} has classes with too few images to divide: {_listed(small)}; {remedy}")
    parts: dict[str, Files] = {part: {} for part in PARTS}
    for index, (name, paths) in enumerate(sorted(files.items())):
        val, test = _counts(len(paths), val_fraction, test_fraction)
        order = np.random.default_rng((seed, index)).permutation(len(paths))
        for part, chosen in zip(("test", "val", "train"), np.split(order, [test, test + val]), strict=True):
            parts[part][name] = [paths[position] for position in sorted(chosen)]
    return parts


def _counts(count: int, *fractions: float) -> list[int]:
    """Return how many of a class's images go to each part with a fraction, leaving at least one to train on."""
    counts = [max(1, round(count * fraction)) if fraction > 0 else 0 for fraction in fractions]
    while sum(counts) >= count:
        counts[counts.index(max(counts))] -= 1
    return counts


def _fingerprint(root: Path, files: dict[str, Files]) -> str:
    paths = [path for classes in files.values() for images in classes.values() for path in images]
    sizes = sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in paths)
    text = "".join(f"{name}\0{size}\n" for name, size in sizes)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _listed(names: Iterable[str], most: int = 5) -> str:
    """Return the names in order, with the number of those beyond the first few."""
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
