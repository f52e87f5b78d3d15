"""Image folders: which images belong to which class, and to training, validation or test.

Two layouts are read. "split" is `ROOT/{train,val,test}/<class>/*`, where `val` may also be called `valid` or
`validation`, and only `train` is required; "flat" is `ROOT/<class>/*`, from which all three parts are drawn.

Images are found at any depth below a class folder, by extension: files with any other extension are ignored, and a
file with an image extension that does not decode is an error of `open_image`. Names with a leading dot and `__MACOSX`
are skipped. The parts are drawn class by class, so that rare classes are in each part too. The draw depends on the
seed and the sorted names below ROOT, not on where ROOT is.
"""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from visgraft.data.dataset import SPLIT_NAMES, Dataset, Example, Split, check_classes, fill_parts, fingerprint, listed
from visgraft.data.decode import image_extensions
from visgraft.errors import DataError, nearest


class Found(NamedTuple):
    """An image: its path as text, which is quick for 100,000 of them, and its size in bytes."""

    path: str
    size: int


Files = dict[str, list[Found]]  # the images of each class

# A folder made of these names only is a split that we cannot read, not a task with classes of these names.
UNREAD_SPLIT_NAMES = {"training", "testing", "tests", "validate", "eval", "evaluation", "dev"}


def read_folder(root: str | Path, *, val_fraction: float = 0.15, test_fraction: float = 0.2, seed: int = 0) -> Dataset:
    """Find the classes and images below `root` and divide the images into training, validation and test.

    A flat folder is divided by both fractions. In the split layout, a missing validation part is drawn from the
    training images by `val_fraction`, and a missing test part stays empty. A fraction of 0 leaves its part empty.

    Raises:
        DataError: the folder cannot be used, or a fraction or the seed is out of range.
    """
    root = Path(root)
    split = Split(val_fraction, test_fraction, seed)
    try:
        check_folder(root, "one folder of images per class")
        parts = _part_folders(root)
        folders = parts or {"train": root}
        files = {part: _class_images(folder) for part, folder in folders.items()}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
    below = len(inside(root, ""))
    images = (image for of_part in files.values() for found in of_part.values() for image in found)
    mark = fingerprint((image.path[below:].replace(os.sep, "/"), image.size) for image in images)
    classes = _checked_classes(folders, files)
    found = {part: _examples(of_part, classes) for part, of_part in files.items()}
    found, drawn_by = fill_parts(found, classes, split, not parts, str(folders["train"]))
    return Dataset(
        root, classes, found["train"], found["val"], found["test"], "split" if parts else "flat", mark, drawn_by
    )


def check_folder(folder: Path, contents: str) -> None:
    """Raise a DataError unless `folder` is one; its message asks for a folder that holds `contents`."""
    if folder.is_dir():
        return
    if folder.exists():
        raise DataError(f"{folder} is a file; give a folder that holds {contents}, a .csv table or hf:NAME_OR_PATH")
    beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    raise DataError(f"{folder} does not exist; give a folder that holds {contents}{nearest(folder.name, beside)}")


def _examples(files: Files, classes: tuple[str, ...]) -> tuple[Example, ...]:
    return tuple(
        Example(Path(image.path), label) for label, name in enumerate(classes) for image in files.get(name, ())
    )


def _part_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each part in the split layout, or nothing for a flat folder."""
    inner, images = _contents(root)
    folders = [Path(folder) for folder in inner]
    names = {folder.name.casefold(): folder.name for folder in folders}
    if "train" not in names:
        if names and names.keys() <= SPLIT_NAMES.keys() | UNREAD_SPLIT_NAMES:
            raise DataError(f"{root} has {listed(names.values())} but no train; name the folders train, val and test")
        return {}
    others = listed(folder.name for folder in folders if folder.name.casefold() not in SPLIT_NAMES)
    if others:
        raise DataError(f"{root} mixes train with other folders ({others}); keep only train, val and test, or no train")
    _check_no_loose_images(root, images, root / names["train"])
    parts = {SPLIT_NAMES[folder.name.casefold()]: folder for folder in folders}
    if len(parts) < len(folders):
        found = listed(folder.name for folder in folders)
        raise DataError(f"{root} has two folders for one part among {found}; keep one for each part")
    return parts


def _class_images(folder: Path) -> Files:
    """Return the images of each class folder in `folder`, sorted by their path."""
    classes, loose = _contents(folder)
    _check_no_loose_images(folder, loose, folder)
    files = {os.path.basename(inner): sorted(_images_below(inner)) for inner in classes}
    if not any(files.values()):
        common = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".gif")
        extensions = f"{' '.join(common)} or {len(image_extensions() - set(common))} others that Pillow opens"
        raise DataError(f"{folder} holds no images; put them in {folder}/<class>/, with an extension of {extensions}")
    empty = listed(name for name, images in files.items() if not images)
    if empty:
        raise DataError(f"{folder} has class folders without images: {empty}; fill or remove them")
    return files


def _check_no_loose_images(folder: Path, images: list[Found], parent: Path) -> None:
    loose = listed(os.path.basename(image.path) for image in images)
    if loose:
        raise DataError(f"{folder} has images outside of class folders: {loose}; put each in {parent}/<class>/")


def _images_below(folder: str, above: frozenset[str] = frozenset()) -> list[Found]:
    """Return the images at any depth below a class folder, through links too."""
    here = os.path.realpath(folder)
    if any(os.path.join(other, "").startswith(os.path.join(here, "")) for other in above):
        raise DataError(f"{folder} is a link to a folder above it; remove the link")
    folders, images = _contents(folder)
    for inner in folders:
        images += _images_below(inner, above | {here})
    return images


def _contents(folder: str | Path) -> tuple[list[str], list[Found]]:
    """Return the folders and the images directly in a folder, without hidden ones; the folders sorted by name."""
    extensions, folders, images = image_extensions(), list[str](), list[Found]()
    with os.scandir(folder) as entries:  # tells folders from files without a look at each
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = inside(folder, entry.name)
            if entry.is_dir():
                folders.append(path)
            elif os.path.splitext(entry.name)[1].lower() in extensions:
                facts = entry.stat()
                if not stat.S_ISREG(facts.st_mode):
                    raise DataError(f"{path} is neither a file nor a folder; remove it")
                images.append(Found(path, facts.st_size))
    return sorted(folders), images


def inside(folder: str | Path, name: str) -> str:
    """Return the path of `name` in `folder` as `Path` would write it: ./name is name."""
    return name if str(folder) == "." else os.path.join(folder, name)


def _checked_classes(folders: dict[str, Path], files: dict[str, Files]) -> tuple[str, ...]:
    train, classes = folders["train"], tuple(sorted(files["train"]))
    if len(classes) == 1:
        remedy = f"add a second class folder, or, if {classes[0]} itself holds the class folders, move them up"
        raise DataError(f"{train} has only one class, {classes[0]}; {remedy}")
    check_classes(classes, str(train))
    for part, folder in folders.items():
        unknown = files[part].keys() - classes
        if unknown:
            hint = nearest(min(unknown), classes, 1)
            raise DataError(f"{folder} has classes that {train} lacks: {listed(unknown)}; add or remove them{hint}")
    return classes
