"""Which adapters answer which images, of the arguments of `predict`."""

import glob
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from visgraft.data.image_table import ADAPTER, ImageTable, is_table
from visgraft.errors import AdapterError, DataError, nearest

LOG = logging.getLogger(__name__)
STDIN = "-"


def split_arguments(arguments: Sequence[str], zoo: str | None = None) -> tuple[dict[str, str], list[str]]:
    """Return the adapters by name, those given as arguments and those below the folder `zoo`; and what names images.

    Raises:
        AdapterError: there is no adapter, and images are no table.
        DataError: nothing names images, or two adapters have one name.
    """
    from visgraft.adapters.directory import CONFIG, read_record
    from visgraft.adapters.hub import on_hub
    from visgraft.bank.opening import find_adapters

    given = [path for path in arguments if on_hub(path) or os.path.isfile(os.path.join(path, CONFIG))]
    images = [argument for argument in arguments if argument not in given]
    adapters = {path: path for path in given}
    for name, path in find_adapters(zoo).items() if zoo else ():
        if name in adapters and os.path.realpath(adapters[name]) != os.path.realpath(path):
            raise DataError(f"{adapters[name]} and {path} are both called {name}; rename one, or run each apart")
        adapters[name] = str(path)
    if not zoo and not is_work(images) and arguments[0] not in given:
        read_record(arguments[0])
    if not images:
        raise DataError("no images are given; add files, a folder, a quoted pattern, a table, or - for standard input")
    return adapters, images


def is_work(images: Sequence[str]) -> bool:
    """Whether what names images is one table."""
    return len(images) == 1 and is_table(images[0])


def find_work(images: Sequence[str], adapters: Mapping[str, str], ensemble: bool) -> "Work | None":
    """Return the table that says which adapter answers which image, if that is what is given.

    Raises:
        AdapterError: there is none, and no adapter either.
        DataError: it cannot be used, or one answer of all adapters is asked for.
    """
    work = ImageTable(images[0]) if is_work(images) else None
    if work is None or not work.mixed:
        if not adapters:
            raise AdapterError(f"no adapter is given; name one, or add a column {ADAPTER} to {images[0]}")
        return None
    if ensemble:
        raise DataError(f"{images[0]} names an adapter for each image, so there is no ensemble; leave out --ensemble")
    return Work(work, adapters)


class Work:
    """A table whose rows name their adapters, checked before anything is loaded.

    Raises:
        DataError: a row names none of the adapters; or one that is no adapter, where none are given.
    """

    def __init__(self, table: ImageTable, adapters: Mapping[str, str]) -> None:
        from visgraft.adapters.directory import read_record
        from visgraft.adapters.hub import on_hub

        self.table, self.rows = table, _counted(table)
        self.adapters: dict[str, str] = {}
        for row in table.rows():
            name = row.adapter or ""
            if name in self.adapters:
                continue
            if adapters and name not in adapters:
                known = f"none of the {len(adapters)} given{nearest(name, adapters)}"
                raise DataError(f"{row.where}: adapter {name} is {known}; correct the name, or give that adapter too")
            path = adapters.get(name) or (name if on_hub(name) else os.path.join(table.path.parent, name))
            try:
                read_record(path)
            except AdapterError as error:
                raise DataError(f"{row.where}: {error}") from error
            self.adapters[name] = path

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the image's path and the adapter's name of each row."""
        return ((row.path, row.adapter or "") for row in self.table.rows())


MOST_COMPARED = 256
"""Pictures on which adapters are compared; beyond, they are taken evenly from all."""


def spread_images(argument: str) -> list[str]:
    """Return the paths of the images that an argument names, at most so many.

    Raises:
        DataError: it leads to no image.
    """
    paths = list(find_images([argument])[0])
    if len(paths) <= MOST_COMPARED:
        return paths
    return [paths[i * len(paths) // MOST_COMPARED] for i in range(MOST_COMPARED)]


def find_images(arguments: Sequence[str]) -> tuple[Iterator[str], int | None]:
    """Return the paths of images in the order of the arguments, and their number; None where standard input tells.

    Raises:
        DataError: an argument leads to no image.
    """
    parts = [_part(argument) for argument in arguments]
    counts = [count for _, count in parts]
    total = None if None in counts else sum(count or 0 for count in counts)
    return chain.from_iterable(paths for paths, _ in parts), total


def _part(argument: str) -> tuple[Iterable[str], int | None]:
    """Return the images that an argument names, and their number."""
    if argument == STDIN:
        return (name for name in (line.rstrip("\r\n") for line in sys.stdin) if name), None
    if not is_table(argument):
        found = _matching(argument)
        return found, len(found)
    table = ImageTable(argument)
    if table.mixed:
        raise DataError(f"{argument} names adapters, so no other images can be given beside it; run each apart")
    return (row.path for row in table.rows()), _counted(table)


def _counted(table: ImageTable) -> int:
    """Return the number of a table's rows, every one of which is read once for it."""
    count = sum(1 for _ in table.rows())
    if not count:
        raise DataError(f"{table.path} has no rows below its header; add one for each image")
    return count


def _matching(argument: str) -> list[str]:
    """Return the images that an argument names: a file as it is, those below a folder, those that match a pattern."""
    from visgraft.data.decode import is_image
    from visgraft.data.folders import passed_over

    if os.path.isdir(argument):
        others = list[str]()
        found = list(_images_below(argument, others))
        told = passed_over(others) if others else ""
        if not found:
            why = f" ({told})" if told else ""
            raise DataError(
                f"{argument} holds no images{why}, and no adapter_config.json of an adapter; check the path"
            )
        if told:
            LOG.info("%s: %s", argument, told)
        return found
    if os.path.exists(argument):
        return [argument]
    if not glob.has_magic(argument):
        raise DataError(f"{argument}: No such file or folder; pass images, a folder, a quoted pattern, or -")
    matches = sorted(glob.glob(argument, recursive=True))
    found = [path for path in matches if not os.path.isdir(path) and is_image(path)]
    if not found:
        ignored = f" ({len(matches)} others do)" if matches else ""
        raise DataError(f"no images match {argument}{ignored}; check the pattern")
    return found


def _images_below(folder: str, others: list[str], above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the images at any depth, sorted by name, through links too; as text, which for a million is far smaller.

    The names of all other files go to `others`.
    """
    from visgraft.data.decode import is_hidden, is_image

    here = os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder} is a link to a folder above it; remove the link")
    try:
        with os.scandir(folder) as entries:
            shown = sorted((entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
    for name, is_folder in shown:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _images_below(path, others, above | {here})
        elif is_image(path):
            yield path
        else:
            others.append(name)
