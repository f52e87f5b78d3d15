"""One way to read labelled images, whatever holds them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visgraft.data.dataset import Dataset, Split
from visgraft.data.folders import read_folder
from visgraft.data.hub import read_hub
from visgraft.data.mirror import mirrored
from visgraft.data.shards import read_shards
from visgraft.data.table import read_table
from visgraft.data.urls import is_url
from visgraft.errors import DataError
from visgraft.files import HUB_PREFIX, WDS_PREFIX

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where labelled images are: `location` is a folder or its address, a .csv, .tsv or .parquet file,
    `hf:NAME_OR_PATH` or `wds:PATTERN`.

    With `table`, a file of these kinds, `location` is the folder that its relative paths start from; None: the table's
    own.
    """

    location: str | Path | None = None
    table: Path | None = None

    def __str__(self) -> str:
        return str(self.table or self.location)


AnySource = Source | str | Path
_DEFAULT_SPLIT = Split()
LOG = logging.getLogger(__name__)


def read_data(source: AnySource, split: Split = _DEFAULT_SPLIT, known: Sequence[str] | None = None) -> Dataset:
    """Read a folder (see `read_folder`), a table (`read_table`), a Hugging Face data set or shards.

    The latter two are read by `read_hub` and `read_shards`.

    A folder may be at an address that fsspec opens, e.g. s3://BUCKET/FOLDER: it is copied into the cache folder once.

    With the classes that a model is `known` to have, images to measure it on are read: their labels are numbered as
    its outputs, by name, and they may be of one class or of some. What is passed over is logged.

    Raises:
        DataError: it cannot be used, or nothing was given.
    """
    dataset = _read(source, split, known)
    for note in dataset.notes:
        LOG.info("%s: %s", dataset.root, note)
    return dataset


def _read(source: AnySource, split: Split, known: Sequence[str] | None) -> Dataset:
    source = source if isinstance(source, Source) else Source(source)
    location = str(source.location or "")
    if source.table is not None:
        if location.startswith((HUB_PREFIX, WDS_PREFIX)):
            raise DataError(f"{location} and the table {source.table} were both given; give one of them")
        return read_table(source.table, location or None, split, known)
    if not location:
        raise DataError("no data was given; give a folder of class folders, a .csv table or hf:NAME_OR_PATH")
    if is_url(location):
        root, mirror = mirrored(location)
        return replace(_read(root, split, known), mirror=mirror)
    if location.startswith(HUB_PREFIX):
        return read_hub(location, split, known)
    if location.startswith(WDS_PREFIX):
        return read_shards(location, split, known)
    if Path(location).suffix.lower() in TABLE_EXTENSIONS and not Path(location).is_dir():
        return read_table(location, None, split, known)
    shares = {"val_fraction": split.val_fraction, "test_fraction": split.test_fraction}
    return read_folder(location, **shares, seed=split.seed, known=known)
