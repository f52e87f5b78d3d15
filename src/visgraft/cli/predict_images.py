"""Which adapters answer which images, of the arguments of `predict`."""

import glob
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby

from visgraft.data.image_list import ImageList, Named, in_order
from visgraft.data.image_table import ADAPTER, ENDINGS, ImageTable, is_table
from visgraft.data.urls import is_folder_url, is_url, list_url
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
    """Return the paths and URLs of images in the order of the arguments, and their number; None: standard input tells.

    Raises:
        DataError: an argument leads to no image.
    """
    parts: list[Iterable[Named]] = []
    for streamed, group in groupby(arguments, STDIN.__eq__):
        found = chain.from_iterable(map(_named, list(group)))
        parts.append(found if streamed else ImageList(found))
    total = None if STDIN in arguments else sum(len(part) for part in parts if isinstance(part, ImageList))
    return (image for image, _ in chain.from_iterable(parts)), total


def list_images(arguments: Sequence[str], work: Work | None, part_size: int) -> ImageList:
    """Return all images, those of a table with their adapters, in parts.

    Raises:
        DataError: an argument leads to no image.
    """
    if work:
        return ImageList(work.pairs(), part_size)
    found = ImageList(chain.from_iterable(map(_named, arguments)), part_size)
    if not len(found):
        raise DataError("standard input names no image")
    return found


def _named(argument: str) -> Iterator[Named]:
    """Yield the images that an argument names: all below a folder, a table's rows, a file as it is."""
    if argument == STDIN:
        found: Iterator[str] = (name for name in (line.rstrip("\r\n") for line in sys.stdin) if name)
    elif is_table(argument):
        found = _rows(argument)
    elif is_url(argument):
        found = _at(argument)
    elif os.path.isdir(argument):
        found = _in_folder(argument)
    elif os.path.exists(argument):
        found = iter((argument,))
    else:
        found = _matching(argument)
    return ((image, "") for image in found)


def _rows(argument: str) -> Iterator[str]:
    table = ImageTable(argument)
    if table.mixed:
        raise DataError(f"{argument} names adapters, so no other images can be given beside it; run each apart")
    return _some((row.path for row in table.rows()), lambda: _no_rows(table))


def _some(images: Iterator[str], none: Callable[[], DataError]) -> Iterator[str]:
    """Return images as they are, and raise where there is none."""
    first = next(images, None)
    if first is None:
        raise none()
    return chain((first,), images)


def _counted(table: ImageTable) -> int:
    """Return the number of a table's rows, every one of which is read once for it."""
    count = sum(1 for _ in table.rows())
    if not count:
        raise _no_rows(table)
    return count


def _no_rows(table: ImageTable) -> DataError:
    return DataError(f"{table.path} has no rows below its header; add one for each image")


def _at(url: str) -> Iterator[str]:
    if url.lower().endswith(ENDINGS):
        raise DataError(f"{url} is a table, which is read from a file of this machine only; download it")
    return _in_folder(url) if is_folder_url(url) else iter((url,))


def _matching(pattern: str) -> Iterator[str]:
    from visgraft.data.decode import is_image

    if not glob.has_magic(pattern):
        raise DataError(f"{pattern}: No such file or folder; pass images, a folder, a quoted pattern, or -")
    others = 0

    def images() -> Iterator[str]:
        nonlocal others
        matches = ((path, os.path.isdir(path)) for path in glob.iglob(pattern, recursive=True))
        for path, is_folder in in_order(matches):
            if is_folder or not is_image(path):
                others += 1
            else:
                yield path

    def none() -> DataError:
        ignored = f" ({others} others do)" if others else ""
        return DataError(f"no images match {pattern}{ignored}; check the pattern")

    return _some(images(), none)


def _in_folder(folder: str) -> Iterator[str]:
    from visgraft.data.folders import passed_over

    others = Counter[str]()

    def none() -> DataError:
        why = f" ({passed_over(others)})" if others else ""
        return DataError(f"{folder} holds no images{why}, and no adapter_config.json of an adapter; check the path")

    yield from _some(_images_below(folder, others), none)
    if others:
        LOG.info("%s: %s", folder, passed_over(others))


def _images_below(folder: str, others: Counter[str], above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the images at any depth, sorted by name, through links too; all other files are counted by kind."""
    from visgraft.data.decode import image_extensions, is_hidden, is_image
    from visgraft.data.folders import kind_of

    remote = is_url(folder)
    here = folder if remote else os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder} is a link to a folder above it; remove the link")
    entries = list_url(folder) if remote else _scanned(folder)
    for name, is_folder in in_order(entry for entry in entries if not is_hidden(entry[0])):
        path = f"{folder.rstrip('/')}/{name}" if remote else os.path.join(folder, name)
        if is_folder:
            yield from _images_below(path, others, above | {here})
        elif kind_of(name) in image_extensions() if remote else is_image(path):
            yield path
        else:
            others[kind_of(name)] += 1


def _scanned(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the name of each entry of a folder, and whether it is a folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name, entry.is_dir()
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); repair or remove it") from error
