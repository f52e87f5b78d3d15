"""One way to read labelled images, whatever holds them."""

from dataclasses import dataclass
from pathlib import Path

from visgraft.data.dataset import Dataset, Split
from visgraft.data.folders import read_folder

HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Source:
    """Where labelled images are: `location` is a folder, a .csv file or `hf:NAME_OR_PATH`.

    With `table`, a .csv file, `location` is the folder that its relative paths start from; None: the table's own.
    """

    location: str | Path | None = None
    table: Path | None = None

    def __str__(self) -> str:
        return str(self.table or self.location)


AnySource = Source | str | Path
_DEFAULT_SPLIT = Split()


def read_data(source: AnySource, split: Split = _DEFAULT_SPLIT) -> Dataset:
    """Read a folder of class folders (see `read_folder`).

    Raises:
        DataError: it cannot be used.
    """
    source = source if isinstance(source, Source) else Source(source)
    assert source.location is not None
    return read_folder(
        source.location, val_fraction=split.val_fraction, test_fraction=split.test_fraction, seed=split.seed
    )
