"""Any data set that visgraft reads as a protocol: of one task, or of one for each number of shots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visgraft.data.dataset import PARTS, Dataset, Example, Split, listed
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import TABLE_EXTENSIONS, Source, read_data
from visgraft.errors import DataError
from visgraft.files import HUB_PREFIX
from visgraft.protocols.row import TEST, Parts, Protocol, Task
from visgraft.protocols.shots import check_shots, draw_shots, draw_up_to

MOST_VALIDATION = 4  # images per class, where shots are drawn
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
    label: str | None = None,
) -> Protocol:
    """Make a protocol of one data set: a folder, a .csv or .tsv table or hf:NAME_OR_PATH, see `visgraft.data.read`.

    Args:
        root: the data set; pass the same to `open_task`.
        shots: make a task for each: so many training images of each class, and up to min(shots, 4) validation images.
        shifted: further test sets by their names: data sets with classes of the same names. Of one that has a test
            part, that part is taken, of another all images. Images of classes that `root` lacks are left out, and the
            protocol's title names these classes.
        split: how validation and test images are drawn where the data set does not say.
        label: the column of a table that holds one class per image, of the further test sets' tables too; None: label.

    Raises:
        DataError: a data set cannot be used, has no validation or test images, several classes per image or numbers,
            shares no class, or has too few images for the shots.
    """
    shifted = dict(shifted or {})
    for name in shifted:
        if name in PARTS or not name:
            raise DataError(f"a further test set is called {name!r}; give it another name than {', '.join(PARTS)}")
    for count in shots:
        check_shots(count)
    data = _read(root, split, label)
    sets = {name: _read_shifted(folder, data, label) for name, folder in shifted.items()}
    title = f"{_name(root)}-{label}" if label else _name(root)
    open_it = partial(open_folder, shifted=shifted, split=split, label=label)
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
    folder: Path, task: Task, seed: int, *, shifted: Mapping[str, Path], split: Split, label: str | None = None
) -> Parts:
    """Read the data set anew and draw the shots; `seed` is of the shots alone, the parts follow `split`.

    Raises:
        DataError: see `folder_protocol`.
    """
    data = _read(folder, split, label)
    others = {name: _read_shifted(other, data, label).examples for name, other in shifted.items()}
    tests = {TEST: data.part("test"), **others}
    return Parts(data.classes, *_drawn(data, task.shots, seed), tests)


def _drawn(data: Dataset, shots: int, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    if not shots:
        return data.part("train"), data.part("val")
    train = draw_shots(data.part("train"), shots, seed, classes=data.classes)
    return train, draw_up_to(data.part("val"), min(shots, MOST_VALIDATION), seed)


def _read(source: Path, split: Split, label: str | None) -> Dataset:
    table = source.suffix.lower() in TABLE_EXTENSIONS and not source.is_dir()
    columns = LabelColumns.parsed(label, None, None, None) if table else None
    data = read_data(Source(source, labels=columns), split)
    if data.tasks:
        raise DataError(
            f"{source}: benchmarks measure one class per image, but {'; '.join(map(str, data.tasks))}; give --label "
            "one column of classes, or measure all of them with `visgraft compare` or `visgraft train --folds 5`"
        )
    if data.multi_label:
        raise DataError(f"{source} has several classes per image; benchmarks need a column label with one")
    return data


def _read_shifted(source: Path, data: Dataset, column: str | None) -> Shifted:
    other = _read(source, _WHOLE, column)
    label = {name: index for index, name in enumerate(data.classes)}
    if not label.keys() & set(other.classes):
        known, theirs = listed(data.classes), listed(other.classes)
        raise DataError(f"{source} shares no class with {data.root}: {theirs} there, {known} here; rename its folders")
    chosen = other.test or other.all
    names = [other.classes[int(e.label)] for e in chosen]  # type: ignore[arg-type]
    examples = [e._replace(label=label[name]) for e, name in zip(chosen, names, strict=True) if name in label]
    if not examples:
        raise DataError(f"{source} has no test image of a class of {data.root}; add some")
    left_out = tuple(name for name in other.classes if name not in label)
    return Shifted(tuple(sorted(examples, key=lambda e: (e.label, str(e.path)))), left_out)


def _name(source: Path) -> str:
    """Return what a data set is called, as a file's name can be."""
    text = str(source)
    path = Path(text.removeprefix(HUB_PREFIX)) if text.startswith(HUB_PREFIX) else source.absolute()
    return path.stem if path.suffix in (".csv", ".tsv", ".parquet") else path.name
