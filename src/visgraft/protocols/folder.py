"""Any data set that visgraft reads as a protocol: of one task, or of one for each number of shots."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visgraft.data.dataset import PARTS, Dataset, Example, Split, listed
from visgraft.data.examples import classes_of
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import TABLE_EXTENSIONS, Source, read_data
from visgraft.errors import DataError, UnknownClasses
from visgraft.files import HUB_PREFIX
from visgraft.protocols.row import TEST, Parts, Protocol, Task
from visgraft.protocols.shots import check_shots, draw_shots, draw_up_to

MOST_VALIDATION = 4  # images per class, where shots are drawn
LONGEST_TITLE = 200  # bytes of a file's name, of which file systems take 255
_DEFAULT_SPLIT = Split()
_WHOLE = Split(val_fraction=0.0, test_fraction=0.0)


@dataclass(frozen=True)
class Shifted:
    """A further test set: its images of the classes that the task has, and the classes of it that the task lacks."""

    examples: tuple[Example, ...]
    left_out: tuple[str, ...]


def folder_protocol(
    root: Path,
    *,
    shots: Sequence[int] = (),
    shifted: Mapping[str, Path] | None = None,
    split: Split = _DEFAULT_SPLIT,
    labels: LabelColumns | None = None,
) -> Protocol:
    """Make a protocol of one data set: a folder, a .csv or .tsv table or hf:NAME_OR_PATH, see `visgraft.data.read`.

    Images may have one class or several, or, in a table, several labels and numbers.

    Args:
        root: the data set; pass the same to `open_task`.
        shots: make a task for each: so many training images of each class, and up to min(shots, 4) validation images.
        shifted: further test sets by their names: data sets with classes of the same names. Of one that has a test
            part, that part is taken, of another all images. Images of classes that `root` lacks are left out, and the
            protocol's title names these classes; with several labels these must be the same.
        split: how validation and test images are drawn where the data set does not say.
        labels: the columns of a table to learn, of the further test sets' tables too; None: label, or labels.

    Raises:
        DataError: a data set cannot be used, has no validation or test images, lacks a label in one of these, shares no
            class, or has too few images for the shots, or more than one class for each image and shots are asked for.
    """
    shifted = dict(shifted or {})
    for name in shifted:
        if name in PARTS or not name:
            raise DataError(f"a further test set is called {name!r}; give it another name than {', '.join(PARTS)}")
    for count in shots:
        check_shots(count)
    data = _read(root, labels, split)
    if shots and (data.tasks or data.multi_label):
        raise DataError(f"{root}: shots are drawn per class, so every image needs exactly one; leave --shots out")
    sets = {name: _read_shifted(folder, data, labels) for name, folder in shifted.items()}
    title = _file_name("-".join([_name(root), *(labels.names if labels else ())]))
    open_it = partial(open_folder, shifted=shifted, split=split, labels=labels)
    bare = Task(title, title, len(data.classes), {}, ".", open_it, "class folders, a table or hf:NAME_OR_PATH")
    tests = {TEST: data.part("test"), **{name: one.examples for name, one in sets.items()}}
    tasks = []
    for count in dict.fromkeys(shots) if shots else (0,):
        train, val = _drawn(data, count, 0)
        parts = {"train": train, "val": val, **tests}
        images = {part: len(examples) for part, examples in parts.items()}
        name = f"{title}-{count}shot" if count else title
        tasks.append(Task(name, title, bare.classes, images, bare.folder, open_it, bare.layout, count))
    left_out = "".join(f"; {name} without {listed(one.left_out)}" for name, one in sets.items() if one.left_out)
    return Protocol(
        f"folder-{title}",
        f"the images of {title}{left_out}",
        tuple(tasks),
        str(root),
        final_parts="train" if shots else "train+val",
    )


def open_folder(
    folder: Path,
    task: Task,
    seed: int,
    *,
    shifted: Mapping[str, Path],
    split: Split,
    labels: LabelColumns | None = None,
) -> Parts:
    """Read the data set anew and draw the shots; `seed` is of the shots alone, the parts follow `split`.

    Raises:
        DataError: see `folder_protocol`.
    """
    data = _read(folder, labels, split)
    others = {name: _read_shifted(other, data, labels).examples for name, other in shifted.items()}
    tests = {TEST: data.part("test"), **others}
    return Parts(data.classes, *_drawn(data, task.shots, seed), tests)


def _drawn(data: Dataset, shots: int, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    if not shots:
        return data.part("train"), data.part("val")
    train = draw_shots(data.part("train"), shots, seed, classes=data.classes)
    return train, draw_up_to(data.part("val"), min(shots, MOST_VALIDATION), seed)


def _is_table(source: Path) -> bool:
    return source.suffix.lower() in TABLE_EXTENSIONS and not source.is_dir()


def _read(source: Path, labels: LabelColumns | None, split: Split) -> Dataset:
    if labels is not None:
        _check_table(source, labels)
    return read_data(Source(source, labels=labels), split)


def _check_table(source: Path, labels: LabelColumns) -> None:
    """Raise a DataError unless a data set can have these columns."""
    if not _is_table(source):
        names = ", ".join(labels.names)
        raise DataError(f"{source} is no table; give a .csv, .tsv or .parquet file with the columns {names}")


def _read_shifted(source: Path, data: Dataset, labels: LabelColumns | None) -> Shifted:
    if data.tasks:
        return _read_answered(source, data)
    other = _read(source, labels if _is_table(source) else None, _WHOLE)
    if other.tasks or other.multi_label != data.multi_label:
        raise DataError(f"{source} has labels of another kind than {data.root}; give images with the same labels")
    number = {name: index for index, name in enumerate(data.classes)}
    if not number.keys() & set(other.classes):
        known, theirs = listed(data.classes), listed(other.classes)
        raise DataError(f"{source} shares no class with {data.root}: {theirs} there, {known} here; rename its folders")
    numbers = [number.get(name) for name in other.classes]
    examples = [_numbered(example, numbers) for example in other.test or other.all]
    kept = [example for example in examples if example is not None]
    if not kept:
        raise DataError(f"{source} has no test image of a class of {data.root}; add some")
    left_out = tuple(name for name in other.classes if name not in number)
    return Shifted(tuple(sorted(kept, key=lambda e: (e.label, str(e.path)))), left_out)


def _numbered(example: Example, numbers: Sequence[int | None]) -> Example | None:
    """Return an image with its classes numbered anew; None where it has classes, but none that is known."""
    found = tuple(sorted(number for old in classes_of(example.label) if (number := numbers[old]) is not None))
    if isinstance(example.label, int):
        return example._replace(label=found[0]) if found else None
    return example._replace(label=found) if found or not classes_of(example.label) else None


def _read_answered(source: Path, data: Dataset) -> Shifted:
    """Read a further test set with the labels of several tasks; of classes it may lack some, but have no others."""
    columns = LabelColumns.of(data.tasks)
    _check_table(source, columns)
    try:
        other = read_data(Source(source, labels=columns), _WHOLE, tasks=data.tasks)
    except UnknownClasses as error:
        raise DataError(f"{source} has classes that {data.root} lacks: {error.found}; leave its rows out") from error
    return Shifted(tuple(sorted(other.test or other.all, key=lambda e: str(e.path))), ())


def _file_name(title: str) -> str:
    """Return a title as the name of a file of results can be; one that is changed ends with a digest of its own."""
    kept = re.sub(r"[/\\\x00-\x1f\x7f]", "_", title)
    mark = title.encode("utf-8", "surrogateescape")
    kept = kept[:40] if len(mark) > LONGEST_TITLE else kept
    return kept if kept == title else f"{kept}-{hashlib.sha256(mark).hexdigest()[:8]}"


def _name(source: Path) -> str:
    """Return what a data set is called, as a file's name can be."""
    text = str(source)
    path = Path(text.removeprefix(HUB_PREFIX)) if text.startswith(HUB_PREFIX) else source.absolute()
    return path.stem if path.suffix in (".csv", ".tsv", ".parquet") else path.name
