"""Where decoded images are kept: in memory, in a file that later runs share, or nowhere.

- `ram`: one tensor in memory;
- `disk`: files of some thousand images each in the user's cache folder, mapped into memory; every later run and every
  method that wants the same images in the same size reads them, whatever it trains, and a run that was cut short goes
  on behind the last whole file. Their name is a hash of the images' paths and contents and of the preprocessing, so a
  changed image is decoded anew, even where size and time stayed as they were;
- `none`: decoded again whenever they are asked for;
- `auto`: `ram` where the images take at most a quarter of the free memory, `disk` beyond, and where several processes
  of this machine want the same images.

All four give the same pixels.
"""

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from visgraft.data.examples import Example, chosen
from visgraft.data.identity import content_digests, mapped_in_order
from visgraft.errors import DataError, VisgraftError, nearest
from visgraft.executors.distributed import count_here, one_per_machine_first
from visgraft.files import cache_folder, new_file, write_json

CACHES = ("auto", "ram", "disk", "none")
DISK_LIMIT = 20 * 2**30
"""Bytes beyond which the files used longest ago are removed before a new one is written."""

IN_A_FILE = 8192
"""Images of a file on disk; one that is cut short has lost the decoding of so many."""

Broken = dict[int, str]


class Pixels(Protocol):
    """What `Images.pixels` can do: a tensor, or something that decodes when it is indexed; `shape` is [N, 3, H, W]."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: Any, /) -> Tensor: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Decode:
    """How an example becomes uint8 pixels [3, H, W], and the facts that decide what comes out."""

    function: Callable[[Example], Tensor]
    facts: Mapping[str, Any]

    def shape(self) -> tuple[int, ...]:
        """The shape of one image's pixels."""
        return tuple(self.facts["data_config"]["input_size"])


def hold_pixels(
    examples: Sequence[Example],
    decode: Decode,
    cache: str,
    skip_broken: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Pixels, Broken]:
    """Return the pixels of all examples that decode, and why the others do not, by their number.

    Raises:
        DataError: an image does not decode and `skip_broken` is off, or the cache cannot be written.
        VisgraftError: no such cache.
    """
    cache = choose_cache(cache, len(examples), decode)
    if cache == "disk":
        with one_per_machine_first():
            return _on_disk(examples, decode, skip_broken, on_progress)
    if cache == "ram":
        return _in_memory(examples, decode, skip_broken, on_progress)
    broken: Broken = {}
    if skip_broken:
        for _ in _decoded(examples, decode, broken, True, on_progress):
            pass
    return Decoded(chosen(examples, (i for i in range(len(examples)) if i not in broken)), decode), broken


def choose_cache(cache: str, count: int, decode: Decode) -> str:
    """Return the cache that so many images are kept in: `cache`, or what `auto` stands for.

    Raises:
        VisgraftError: no such cache.
    """
    if cache not in CACHES:
        raise VisgraftError(f"cache is {cache!r}, but must be one of {', '.join(CACHES)}{nearest(cache, CACHES)}")
    if cache != "auto":
        return cache
    if count_here() > 1:
        return "disk"  # decoded once, and mapped by all
    needed = count * torch.Size(decode.shape()).numel()
    return "ram" if needed <= psutil.virtual_memory().available // 4 else "disk"


def is_on_disk(examples: Sequence[Example], decode: Decode) -> bool:
    """Whether an earlier run left the decoded pixels of these images in the cache folder."""
    facts = _facts_file(examples, decode)
    done = len(_done(facts)[0])
    return done * IN_A_FILE >= len(examples)


def _decoded(
    examples: Sequence[Example],
    decode: Decode,
    broken: Broken,
    skip_broken: bool,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Tensor]:
    """Yield the pixels of the images in order; those that do not decode go to `broken`, or raise."""

    def attempt(example: Example) -> Tensor | DataError:
        try:
            return decode.function(example)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for number, result in enumerate(mapped_in_order(pool, attempt, examples)):
            if isinstance(result, DataError) and not skip_broken:
                raise result
            if isinstance(result, DataError):
                broken[number] = str(result)
            else:
                yield result
            if on_progress:
                on_progress(number + 1, len(examples))
    finally:
        pool.shutdown(cancel_futures=True)


def _in_memory(
    examples: Sequence[Example], decode: Decode, skip_broken: bool, on_progress: Callable[[int, int], None] | None
) -> tuple[Tensor, Broken]:
    pixels, broken, count = torch.empty(len(examples), *decode.shape(), dtype=torch.uint8), Broken(), 0
    for count, row in enumerate(_decoded(examples, decode, broken, skip_broken, on_progress), 1):
        pixels[count - 1] = row
    return pixels[:count], broken


def _on_disk(
    examples: Sequence[Example], decode: Decode, skip_broken: bool, on_progress: Callable[[int, int], None] | None
) -> tuple["Mapped", Broken]:
    """Map the files of these images into memory, after writing those that are not there yet."""
    facts, count = _facts_file(examples, decode), len(examples)
    counts, broken = _done(facts)
    if len(counts) * IN_A_FILE < count:
        try:
            facts.parent.mkdir(parents=True, exist_ok=True)
            _make_room(facts, count * torch.Size(decode.shape()).numel())
            for first in range(len(counts) * IN_A_FILE, count, IN_A_FILE):
                told = on_progress and partial(_told, on_progress, first, count)
                some, wrong = examples[first : first + IN_A_FILE], Broken()
                with new_file(_pixels_file(facts, len(counts))) as target:
                    for row in _decoded(some, decode, wrong, skip_broken, told):
                        target.write(row.contiguous().numpy().data)
                broken |= {first + number: reason for number, reason in wrong.items()}
                counts.append(len(some) - len(wrong))
                write_json(facts, {"broken": broken, "counts": counts})
        except OSError as error:
            raise DataError(
                f"the image cache {facts.parent} cannot be written ({error.strerror}); pass --cache none, or point "
                "VISGRAFT_CACHE elsewhere"
            ) from error
    if broken and not skip_broken:
        raise DataError(next(iter(broken.values())))
    with contextlib.suppress(OSError):
        os.utime(facts)  # marks it as used
    return Mapped([_pixels_file(facts, number) for number in range(len(counts))], counts, decode.shape()), broken


def _told(on_progress: Callable[[int, int], None], before: int, count: int, done: int, _: int) -> None:
    on_progress(before + done, count)


def _pixels_file(facts: Path, number: int) -> Path:
    return facts.with_name(f"{facts.stem}.{number:05}.uint8")


def _done(facts: Path) -> tuple[list[int], Broken]:
    """Return how many images each file holds that is there from the first on, and why others are in none."""
    try:
        kept = json.loads(facts.read_text(encoding="utf-8"))
    except OSError:  # there is none; where there can be none, writing says so
        return [], {}
    there = list(takewhile(lambda number: _pixels_file(facts, number).is_file(), range(len(kept["counts"]))))
    broken = {int(number): reason for number, reason in kept["broken"].items()}
    return kept["counts"][: len(there)], {n: reason for n, reason in broken.items() if n < len(there) * IN_A_FILE}


def _facts_file(examples: Sequence[Example], decode: Decode) -> Path:
    """Return the file beside that of these pixels; its name hashes all that decides them, the libraries included."""
    digest = hashlib.sha256(
        json.dumps([dict(decode.facts), IN_A_FILE, version("pillow"), version("torchvision")]).encode()
    )
    for example, content in zip(examples, content_digests(examples), strict=True):
        place = example.path.absolute() if example.content is None else ""
        digest.update(f"{place}\0{content}\n".encode("utf-8", "surrogateescape"))
    return cache_folder() / "images" / f"{digest.hexdigest()[:32]}.json"


def _make_room(mine: Path, needed: int) -> None:
    """Remove the images used longest ago, as far as the limit asks for it; but what is written already of `mine`."""
    files = sorted(mine.parent.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    room = DISK_LIMIT - needed
    for facts in files:
        pixels = list(mine.parent.glob(f"{facts.stem}.*uint8"))
        room -= 0 if facts == mine else sum(file.stat().st_size for file in pixels)
        if room < 0 and facts != mine:
            for file in (facts, *pixels):
                file.unlink(missing_ok=True)


class Mapped:
    """Pixels in files of the cache, mapped into memory; another process that is given them maps the same files.

    `counts` are the images in each file; an image's pixels have the shape `one`.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], one: tuple[int, ...]) -> None:
        self.files, self.counts, self.shape = files, counts, (sum(counts), *one)
        self.starts = torch.tensor([0, *counts]).cumsum(0)
        self.parts = [_mapped(file, (count, *one)) for file, count in zip(files, counts, strict=True)]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any, /) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0][index]
        rows = torch.arange(len(self))[index]
        if rows.ndim == 0:
            part = int(torch.searchsorted(self.starts, rows, right=True)) - 1
            return self.parts[part][int(rows - self.starts[part])]
        pixels = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        part_of = torch.searchsorted(self.starts, rows.contiguous(), right=True) - 1
        for part in part_of.unique().tolist():
            here = part_of == part
            pixels[here] = self.parts[part][rows[here] - self.starts[part]]
        return pixels

    def __reduce__(self) -> tuple[type["Mapped"], tuple[Any, ...]]:
        return Mapped, (self.files, self.counts, self.shape[1:])


def _mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel()
    try:
        found = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} is no longer in the image cache; load the images again") from error
    if found != size:
        raise DataError(f"{file} is damaged; remove it")
    if not size:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).view(shape)


class Decoded:
    """Pixels that are decoded whenever they are asked for, several at a time, in whatever process."""

    def __init__(self, examples: Sequence[Example], decode: Decode) -> None:
        self.examples, self.decode = examples, decode
        self.shape = (len(self.examples), *decode.shape())
        self.pool, self.process = ThreadPoolExecutor(os.cpu_count()), os.getpid()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any, /) -> Tensor:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            return self.decode.function(self.examples[int(index)])
        some = self.examples[index] if isinstance(index, slice) else [self.examples[int(i)] for i in index]
        if self.process != os.getpid():  # threads do not survive a fork, and what waits for them would wait forever
            self.pool, self.process = ThreadPoolExecutor(os.cpu_count()), os.getpid()
        return torch.stack(list(self.pool.map(self.decode.function, some)))

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickle.dumps((self.examples, self.decode))
            return Decoded, (self.examples, self.decode)
        except Exception as error:  # what cannot be pickled raises nearly every kind of exception
            reason = " ".join(str(error).split())
            raise DataError(
                f"images with cache='none' cannot be handed to another process, as what reads them cannot ({reason}); "
                "load them with cache='ram' or cache='disk'"
            ) from error
