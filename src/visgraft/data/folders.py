"""Image folders: which images belong to which class, and to training, validation or test.

Two layouts are read. "split" is `ROOT/{train,val,test}/<class>/*`, where `val` may also be called `valid` or
`validation`, and only `train` is required; "flat" is `ROOT/<class>/*`, from which all three parts are drawn.

Images are found at any depth below a class folder, by extension, and by content where a name has none. Files with any
other extension are passed over, which `Dataset.notes` says; a file with an image extension that does not decode is an
error of `open_image`. Names with a leading dot, `__MACOSX` and what Windows leaves in folders are skipped. A `val` or
`test` folder that holds images but no class folders is left to `predict`. The parts are drawn class by class, so that
rare classes are in each part too. The draw depends on the seed and the sorted names below ROOT, not on where ROOT is.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visgraft.data.dataset import (
    SPLIT_NAMES,
    Dataset,
    Split,
    check_classes,
    fill_parts,
    fingerprint_in_order,
    known_names,
    listed,
    match_classes,
)
from visgraft.data.decode import image_extensions, is_hidden, is_image
from visgraft.data.examples import Coded, Columns, Examples, Texts
from visgraft.errors import DataError, nearest


@dataclass(frozen=True)
class Found:
    """The images of a class: their paths, sorted, and their sizes in bytes, int64 [N]."""

    paths: Texts
    sizes: np.ndarray

    @classmethod
    def of(cls, sizes: dict[str, int]) -> "Found":
        """Keep paths with their sizes."""
        paths = sorted(sizes)
        return cls(Texts(paths), np.fromiter((sizes[path] for path in paths), np.int64, len(paths)))


Files = dict[str, Found]  # by class

# A folder made of these names only is a split that we cannot read, not a task with classes of these names.
UNREAD_SPLIT_NAMES = {"training", "testing", "tests", "validate", "eval", "evaluation", "dev"}


def read_folder(
    root: str | Path,
    *,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    seed: int = 0,
    known: Sequence[str] | None = None,
) -> Dataset:
    """Find the classes and images below `root` and divide the images into training, validation and test.

    A flat folder is divided by both fractions. In the split layout, a missing validation part is drawn from the
    training images by `val_fraction`, and a missing test part stays empty. A fraction of 0 leaves its part empty.

    Args:
        known: the classes of the model that is to be measured, in its order: images may then be of one of them or of
            some, and a folder may hold a test part alone.

    Raises:
        DataError: the folder cannot be used, or a fraction or the seed is out of range.
    """
    root = Path(root)
    split = Split(val_fraction, test_fraction, seed)
    try:
        check_folder(root, "one folder of images per class")
        parts = _part_folders(root, known is not None)
        unlabelled = _unlabelled(parts)
        folders = {part: folder for part, folder in parts.items() if part not in unlabelled}
        if parts and not folders:
            raise DataError(f"{root} has no labelled images; put those of {listed(unlabelled)} into folders by class")
        folders = folders or {"train": root}
        found = {part: _class_images(folder) for part, folder in folders.items()}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
    spell = known_names(known)
    files = {part: {spell(name): of_class for name, of_class in images.items()} for part, (images, _) in found.items()}
    mark = fingerprint_in_order(_names_below(root, files.values()))
    classes = _checked_classes(folders, files, known)
    examples = _examples(files, classes)
    drawn, drawn_by = fill_parts(examples, classes, split, not parts, str(next(iter(folders.values()))))
    beside = tuple(parts[part] for part in unlabelled)
    return Dataset(
        root, classes, drawn["train"], drawn["val"], drawn["test"], "split" if parts else "flat", mark, drawn_by,
        notes=_notes([name for _, others in found.values() for name in others], beside), unlabelled=beside,
    )  # fmt: skip


def kind_of(name: str) -> str:
    """Return a file's extension, in words where it has none."""
    return os.path.splitext(name)[1].lower() or "no extension"


def passed_over(kinds: Counter[str]) -> str:
    """Return one line on files that are no images by their names, counted by `kind_of`."""
    total = kinds.total()
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    more = f" and {len(kinds) - 5} other kinds" if len(kinds) > 5 else ""
    files = "file whose name is no image's" if total == 1 else "files whose names are no images'"
    return f"passed over {total:,} {files}: {counts}{more}"


def _notes(others: Sequence[str], unlabelled: Sequence[Path]) -> tuple[str, ...]:
    notes = [passed_over(Counter(map(kind_of, others)))] if others else []
    notes += [
        f"{folder} has no class folders, so nothing is measured on its images; predict can name them"
        for folder in unlabelled
    ]
    return tuple(notes)


def check_folder(folder: Path, contents: str) -> None:
    """Raise a DataError unless `folder` is one; its message asks for a folder that holds `contents`."""
    if folder.is_dir():
        return
    if folder.exists():
        raise DataError(f"{folder} is a file; give a folder that holds {contents}, a .csv table or hf:NAME_OR_PATH")
    beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    raise DataError(f"{folder} does not exist; give a folder that holds {contents}{nearest(folder.name, beside)}")


def _names_below(root: Path, files: Iterable[Files]) -> Iterator[tuple[str, int]]:
    """Yield the name below the root and the size of each image, sorted by name.

    Classes are sorted as wholes: the path of one class folder, with a separator behind it, never begins another's.
    """
    below = len(inside(root, ""))
    classes = [found for of_part in files for found in of_part.values() if found.paths]
    for found in sorted(classes, key=lambda found: found.paths[0].replace(os.sep, "/")):
        names = (path[below:].replace(os.sep, "/") for path in found.paths)
        pairs = zip(names, found.sizes.tolist(), strict=True)
        yield from pairs if os.sep == "/" else sorted(pairs)


def _examples(files: dict[str, Files], classes: tuple[str, ...]) -> dict[str, Examples]:
    """Return the examples of each part, ordered by class and then by path, as rows of the same columns."""
    found = [
        (part, label, of_part[name])
        for part, of_part in files.items()
        for label, name in enumerate(classes)
        if name in of_part
    ]
    counts = [len(images.paths) for _, _, images in found]
    columns = Columns(
        Texts.joined([images.paths for _, _, images in found]),
        Coded(np.repeat(np.array([label for _, label, _ in found], np.int32), counts), range(len(classes))),
        sizes=np.concatenate([images.sizes for _, _, images in found]),
    )
    ends = np.cumsum([sum(len(images.paths) for images in of_part.values()) for of_part in files.values()])
    rows = np.split(np.arange(len(columns.names)), ends[:-1])
    return dict(zip(files, (Examples(columns, of_part) for of_part in rows), strict=True))


def _part_folders(root: Path, measured: bool) -> dict[str, Path]:
    """Return the folder of each part in the split layout, or nothing for a flat folder.

    Where images are only measured on, no part need be `train`.
    """
    inner, images, _ = _contents(root)
    folders = [Path(folder) for folder in inner]
    names = {folder.name.casefold(): folder.name for folder in folders}
    if measured and names and names.keys() <= SPLIT_NAMES.keys():
        return {SPLIT_NAMES[folder.name.casefold()]: folder for folder in folders}
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


def _unlabelled(parts: dict[str, Path]) -> list[str]:
    """Return the parts that hold images but no class folders, as competitions hand out what is to be named."""
    found = []
    for part, folder in parts.items():
        folders, images, _ = _contents(folder)
        if part != "train" and images and not folders:
            found.append(part)
    return found


def _class_images(folder: Path) -> tuple[Files, list[str]]:
    """Return the images of each class folder in `folder`, sorted by their path, and the other files' names."""
    classes, loose, _ = _contents(folder)
    _check_no_loose_images(folder, loose, folder)
    files, others = Files(), list[str]()
    for inner in classes:
        images, passed = _images_below(inner)
        files[os.path.basename(inner)] = Found.of(images)
        others += passed
    if not any(images.paths for images in files.values()):
        common = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".gif")
        extensions = f"{' '.join(common)} or {len(image_extensions() - set(common))} others that Pillow opens"
        told = f" ({passed_over(Counter(map(kind_of, others)))})" if others else ""
        raise DataError(
            f"{folder} holds no images{told}; put them in {folder}/<class>/, with an extension of {extensions}"
        )
    empty = listed(name for name, images in files.items() if not images.paths)
    if empty:
        raise DataError(f"{folder} has class folders without images: {empty}; fill or remove them")
    return files, others


def _check_no_loose_images(folder: Path, images: Iterable[str], parent: Path) -> None:
    loose = listed(map(os.path.basename, images))
    if loose:
        raise DataError(f"{folder} has images outside of class folders: {loose}; put each in {parent}/<class>/")


def _images_below(folder: str, above: frozenset[str] = frozenset()) -> tuple[dict[str, int], list[str]]:
    """Return the images (path: size) at any depth below a class folder, through links too, and other files' names."""
    here = os.path.realpath(folder)
    if any(os.path.join(other, "").startswith(os.path.join(here, "")) for other in above):
        raise DataError(f"{folder} is a link to a folder above it; remove the link")
    folders, images, others = _contents(folder)
    for inner in folders:
        more, passed = _images_below(inner, above | {here})
        images |= more
        others += passed
    return images, others


def _contents(folder: str | Path) -> tuple[list[str], dict[str, int], list[str]]:
    """Return the folders (sorted), the images (path: size) and other files' names in a folder, without hidden ones."""
    folders, images, others = list[str](), dict[str, int](), list[str]()
    start, known = inside(folder, ""), image_extensions()
    with os.scandir(folder) as entries:  # tells folders from files without a look at each
        for entry in entries:
            name = entry.name
            if is_hidden(name):
                continue
            path = start + name
            if entry.is_dir():
                folders.append(path)
            elif name[name.rfind(".") :].lower() in known or is_image(path):
                facts = entry.stat()
                if not stat.S_ISREG(facts.st_mode):
                    raise DataError(f"{path} is neither a file nor a folder; remove it")
                images[path] = facts.st_size
            else:
                others.append(name)
    return sorted(folders), images, others


def inside(folder: str | Path, name: str) -> str:
    """Return the path of `name` in `folder` as `Path` would write it: ./name is name."""
    return name if str(folder) == "." else os.path.join(folder, name)


def _checked_classes(folders: dict[str, Path], files: dict[str, Files], known: Sequence[str] | None) -> tuple[str, ...]:
    if known is not None:
        found = {name for of_part in files.values() for name in of_part}
        return match_classes(found, known, ", ".join(map(str, folders.values())))
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
