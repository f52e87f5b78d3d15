"""One way to read labelled images, whatever holds them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visgraft.data.dataset import Dataset, Split
from visgraft.data.folders import read_folder
from visgraft.data.hub import read_hub
from visgraft.data.label_columns import LabelColumns
from visgraft.data.mirror import mirrored
from visgraft.data.shards import read_shards
from visgraft.data.table import LABEL, LABELS, read_table, table_header
from visgraft.data.table_lines import column_names, folded
from visgraft.data.task_folders import joined_tasks
from visgraft.data.task_table import read_task_table, with_tasks
from visgraft.data.tasks import LabelTask
from visgraft.data.urls import is_url
from visgraft.errors import DataError, nearest
from visgraft.files import HUB_PREFIX, WDS_PREFIX

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where labelled images are: `location` is a folder or its address, a .csv, .tsv or .parquet file,
    `hf:NAME_OR_PATH` or `wds:PATTERN`.

    With `table`, a file of these kinds, `location` is the folder that its relative paths start from; None: the table's
    own. `labels` names the columns of a table that are to be learned, in place of label or labels. With `tasks`, pairs
    of a task's name and a location, images of several places are learned together, each for its own task.

    Raises:
        DataError: options that do not go together.
    """

    location: str | Path | None = None
    table: Path | None = None
    labels: LabelColumns | None = None
    tasks: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.tasks and (self.location or self.table or self.labels):
            raise DataError(
                "--task names all images, so that no DATA, no --csv and no label columns go with it; leave those out"
            )
        names = [folded(name) for name, _ in self.tasks]
        twice = next((name for name, _ in self.tasks if names.count(folded(name)) > 1), None)
        if twice is not None:
            raise DataError(f"--task {twice} is given twice; give each task a name of its own")

    def __str__(self) -> str:
        return " ".join(f"{name}={place}" for name, place in self.tasks) or str(self.table or self.location)


AnySource = Source | str | Path
_DEFAULT_SPLIT = Split()
LOG = logging.getLogger(__name__)


def read_data(
    source: AnySource,
    split: Split = _DEFAULT_SPLIT,
    known: Sequence[str] | None = None,
    tasks: Sequence[LabelTask] = (),
) -> Dataset:
    """Read a folder (see `read_folder`), a table (`read_table`), a Hugging Face data set or shards.

    The latter two are read by `read_hub` and `read_shards`.

    A folder may be at an address that fsspec opens, e.g. s3://BUCKET/FOLDER: it is copied into the cache folder once.

    With the classes that a model is `known` to have, images to measure it on are read: their labels are numbered as
    its outputs, by name, and they may be of one class or of some; with the `tasks` of a model, labels of some of these
    suffice. What is passed over is logged.

    Raises:
        DataError: it cannot be used, or nothing was given.
    """
    source = source if isinstance(source, Source) else Source(source)
    labelled = source.tasks or source.labels or tasks
    dataset = _read_tasks(source, split, tasks, known) if labelled else _read(source, split, known)
    for note in (*dataset.notes, *(() if tasks else map(str, dataset.tasks))):
        LOG.info("%s: %s", dataset.root, note)
    return dataset


def _read_tasks(
    source: Source, split: Split, known: Sequence[LabelTask], known_classes: Sequence[str] | None
) -> Dataset:
    """Read images with labels for several tasks, perhaps those of a model, or with one column of classes."""
    if not source.tasks:
        columns = source.labels or _columns_of(source, known)
        table, folder = _table_of(source, columns)
        return with_tasks(read_task_table(table, folder, split, columns, known, known_classes), known)
    strange = next((name for name, _ in source.tasks if known and name not in {task.name for task in known}), None)
    if strange is not None:
        names = [task.name for task in known]
        raise DataError(f"the adapter has no task {strange}, only {', '.join(names)}{nearest(strange, names, 1)}")
    classes = {task.name: task.classes for task in known}
    found = {}
    for name, place in source.tasks:
        if is_url(place):
            raise DataError(f"--task {name}: {place} is an address; copy the folder to this machine first")
        found[name] = _read(Source(place), split, classes.get(name))
    return joined_tasks(found, known)


def with_column(source: AnySource, name: str, several: bool) -> Source:
    """Return a source whose classes are in the column of this name, if it is a table; else as it is.

    A table that lacks it may have them in `label`, as tables usually do.
    """
    source = source if isinstance(source, Source) else Source(source)
    columns = LabelColumns((name,), {}, (name,) if several else (), () if several else (name,))
    try:
        table, _ = _table_of(source, columns)
    except DataError:
        return source
    names = column_names(table) or ()
    usual = not names or bool(folded(name) not in names and {LABEL, LABELS} & set(names))
    return source if usual else replace(source, labels=columns)


def _columns_of(source: Source, known: Sequence[LabelTask]) -> LabelColumns:
    """Return the columns of a table that answer a model's tasks, those that it has.

    Raises:
        DataError: it has none of them.
    """
    try:
        table, _ = _table_of(source, LabelColumns.of(known))
    except DataError as error:
        named = next((task.name for task in known if task.classes), None)
        folder = f", or name what a folder answers: --task {named}=FOLDER" if named else ""
        raise DataError(f"{error}{folder}") from None
    header = table_header(table)
    there = [task for task in known if folded(task.name) in header]
    if not there:
        names = ", ".join(task.name for task in known)
        raise DataError(f"{table} has none of the adapter's label columns {names}; its columns are {', '.join(header)}")
    return LabelColumns.of(there)


def _table_of(source: Source, columns: LabelColumns) -> tuple[Path, str | None]:
    """Return the table of a source whose label columns are named, and the folder that its paths start from.

    Raises:
        DataError: it is no table.
    """
    location = str(source.location or "")
    if source.table is not None:
        return source.table, location or None
    if Path(location).suffix.lower() in TABLE_EXTENSIONS and not Path(location).is_dir():
        return Path(location), None
    raise DataError(
        f"{location or 'nothing'} is no table, and the labels {', '.join(columns.names)} are columns of one; give a "
        ".csv, .tsv or .parquet file, or --csv FILE"
    )


def _read(source: Source, split: Split, known: Sequence[str] | None) -> Dataset:
    location = str(source.location or "")
    if source.table is not None:
        if location.startswith((HUB_PREFIX, WDS_PREFIX)):
            raise DataError(f"{location} and the table {source.table} were both given; give one of them")
        return read_table(source.table, location or None, split, known)
    if not location:
        raise DataError("no data was given; give a folder of class folders, a .csv table or hf:NAME_OR_PATH")
    if is_url(location):
        root, mirror = mirrored(location)
        return replace(_read(Source(root), split, known), mirror=mirror)
    if location.startswith(HUB_PREFIX):
        return read_hub(location, split, known)
    if location.startswith(WDS_PREFIX):
        return read_shards(location, split, known)
    if Path(location).suffix.lower() in TABLE_EXTENSIONS and not Path(location).is_dir():
        return read_table(location, None, split, known)
    shares = {"val_fraction": split.val_fraction, "test_fraction": split.test_fraction}
    return read_folder(location, **shares, seed=split.seed, known=known)
