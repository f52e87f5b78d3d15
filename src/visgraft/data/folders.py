"""Image folders: which images belong to which class, and to training, validation or test.

Two layouts are read. "split" is `ROOT/{train,val,test}/<class>/*`, where `val` may also be called `valid` or
`validation`, and only `train` is required; "flat" is `ROOT/<class>/*`, from which all three parts are drawn.

Images are found at any depth below a class folder, by extension: files with any other extension are ignored, and a
file with an image extension that does not decode is an error of `open_image`. Names with a leading dot and `__MACOSX`
are skipped. The parts are drawn class by class, so that rare classes are in each part too. The draw depends on the
seed and the sorted names below ROOT, not on where ROOT is.
"""

from pathlib import Path

from visgraft.data.dataset import PARTS, Dataset, Example, Split, divide, fingerprint, listed
from visgraft.data.decode import image_extensions
from visgraft.errors import DataError

Files = dict[str, list[Path]]  # the images of each class

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
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
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            raise DataError(f"{root} {problem}; give a folder that holds one folder of images per class")
        parts = _part_folders(root)
        folders = parts or {"train": root}
        files = {part: _class_images(folder) for part, folder in folders.items()}
        images = [path for classes in files.values() for paths in classes.values() for path in paths]
        mark = fingerprint((path.relative_to(root).as_posix(), path.stat().st_size) for path in images)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
    classes = _checked_classes(folders, files)
    found = {part: _examples(inside, classes) for part, inside in files.items()}
    if "val" not in found:
        asked = Split(val_fraction, 0.0, seed) if parts else split
        drawn = divide(found.pop("train"), classes, asked, str(folders["train"]))
        found = drawn | found
    train, val, test = (found.get(part, ()) for part in PARTS)
    return Dataset(root, classes, train, val, test, "split" if parts else "flat", mark, None if parts else split)


def _examples(files: Files, classes: tuple[str, ...]) -> tuple[Example, ...]:
    return tuple(Example(path, label) for label, name in enumerate(classes) for path in files.get(name, ()))


def _part_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each part in the split layout, or nothing for a flat folder."""
    folders, images = _contents(root)
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
    files = {entry.name: sorted(_images_below(entry), key=Path.as_posix) for entry in classes}
    if not any(files.values()):
        common = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".gif")
        extensions = f"{' '.join(common)} or {len(image_extensions() - set(common))} others that Pillow opens"
        raise DataError(f"{folder} holds no images; put them in {folder}/<class>/, with an extension of {extensions}")
    empty = listed(name for name, paths in files.items() if not paths)
    if empty:
        raise DataError(f"{folder} has class folders without images: {empty}; fill or remove them")
    return files


def _check_no_loose_images(folder: Path, images: list[Path], parent: Path) -> None:
    loose = listed(image.name for image in images)
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
            raise DataError(f"{folder} has classes that {train} lacks: {listed(unknown)}; add or remove them")
    return classes
