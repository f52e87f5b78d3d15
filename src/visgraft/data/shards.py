"""WebDataset shards (`wds:PATTERN`): tar files whose members lie side by side, an image with its label.

A shard is indexed once, member by member; from then on an image is read from its place in the file, so any order of
images costs the same and a run can go on where it stopped. Shards elsewhere are downloaded once. Labels are parsed as
numbers, names or JSON, and nothing from a shard is ever unpickled or run.
"""

import contextlib
import hashlib
import json
import os
import re
import tarfile
import time
import zipfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visgraft.data.dataset import (
    SPLIT_NAMES,
    Dataset,
    Split,
    check_classes,
    check_train,
    fill_parts,
    fingerprint_in_order,
    known_names,
    listed,
    match_classes,
)
from visgraft.data.decode import image_extensions, is_hidden
from visgraft.data.downloads import download, is_remote
from visgraft.data.examples import Coded, Columns, Examples, Texts
from visgraft.errors import DataError, nearest
from visgraft.files import WDS_PREFIX, cache_folder, new_file

LABEL, FIELD = "cls", "label"
LONGEST_LABEL = 1000  # characters
SETTLED = 2.0  # seconds after its last change from which on a file's times tell whether it changes again
_DEFAULT_SPLIT = Split()


@dataclass(frozen=True)
class ShardImage:
    """Reads one image from its place in a shard when called; several threads and processes may do so at once."""

    shard: str
    offset: int
    size: int

    def __call__(self) -> bytes:
        """Return the bytes.

        Raises:
            DataError: the shard is shorter than it was.
        """
        with open(self.shard, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), self.size, self.offset) if hasattr(os, "pread") else _read(file, self)
        if len(content) != self.size:
            raise DataError(f"{self.shard} has changed since it was read; give the command again")
        return content


def _read(file: Any, place: ShardImage) -> bytes:
    file.seek(place.offset)
    return bytes(file.read(place.size))


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard: names with the image's extension, the image's place and size, and the label's text."""

    names: Texts
    offsets: np.ndarray
    sizes: np.ndarray
    labels: Texts


class _Rows(Sequence[Any]):
    """What `make` returns for each sample of all shards, from the shard's path, its index and the number."""

    def __init__(self, shards: Sequence[tuple[str, ShardIndex]], make: Callable[[str, ShardIndex, int], Any]) -> None:
        self.shards, self.make = shards, make
        self.starts = np.cumsum([0, *(len(index.names) for _, index in shards)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = bisect_right(self.starts, row) - 1
        return self.make(*self.shards[number], int(row) - self.starts[number])


def _name(shard: str, index: ShardIndex, row: int) -> str:
    return f"{shard}/{index.names[row]}"


def _content(shard: str, index: ShardIndex, row: int) -> ShardImage:
    return ShardImage(shard, int(index.offsets[row]), int(index.sizes[row]))


def read_shards(location: str, split: Split = _DEFAULT_SPLIT, known: Sequence[str] | None = None) -> Dataset:
    """Read WebDataset shards: `wds:PATTERN`, braces expand as in `train-{0000..0009}.tar`, `::` joins patterns.

    A pattern is a path or a URL that fsspec opens. A sample is the members with one name up to its first dot: an image
    and `cls`, a number or a name, or `json` with a field `label`; another field is named behind `#`, as in
    `wds:PATTERN#species`. Classes are ordered by number where all are whole numbers, otherwise by name. Shards whose
    name begins with train, val or test, or whose folder is called so, are these parts; where none is, or all are of
    train, the parts are drawn.

    Raises:
        DataError: a library is missing, or a shard cannot be read or used.
    """
    where = WDS_PREFIX + location.removeprefix(WDS_PREFIX)
    pattern, _, field = where.removeprefix(WDS_PREFIX).partition("#")
    named = _expanded(pattern, where)
    parts = _parts(named, where, known is not None)
    shards = [(str(path), _indexed(path, field)) for path in map(_local, named)]
    counts = [len(index.names) for _, index in shards]
    spell = known_names(known)
    labels = Coded.of(spell(label) for _, index in shards for label in index.labels)
    classes = _classes(labels.values, where) if known is None else match_classes(labels.values, known, where)
    number = {name: code for code, name in enumerate(classes)}
    codes = np.array([number[name] for name in labels.values], np.int32)[labels.codes]
    columns = Columns(
        _Rows(shards, _name),
        Coded(codes, range(len(classes))),
        sizes=np.concatenate([index.sizes for _, index in shards]),
        contents=_Rows(shards, _content),
    )
    everything = Examples(columns, np.argsort(codes, kind="stable"))
    flat = set(parts) <= {"", "train"}
    part_of = np.repeat(["train" if flat else part for part in parts], counts)[everything.rows]
    given = {part: everything.take(np.flatnonzero(part_of == part)) for part in ("train", "val", "test")}
    if known is None:
        check_train(given["train"], classes, where)
    found, drawn_by = fill_parts(given, classes, split, flat, where)
    if known is None:
        check_train(found["train"], classes, where)
    layout: Literal["split", "flat"] = "flat" if flat else "split"
    sizes = (
        (f"{part}/{os.path.basename(shard)}/{name}", int(size))
        for part, (shard, index) in zip(parts, shards, strict=True)
        for name, size in zip(index.names, index.sizes, strict=True)
    )
    mark = fingerprint_in_order(sizes, (labels.values[code] for code in labels.codes))
    return Dataset(Path(where), classes, found["train"], found["val"], found["test"], layout, mark, drawn_by)


def _expanded(pattern: str, where: str) -> list[str]:
    """Return the paths and URLs that a pattern stands for."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError(f"{where} needs the webdataset library; run pip install 'visgraft[webdataset]'") from error
    if not pattern:
        raise DataError(f"{where} names no shards; use wds:PATTERN, such as wds:shards/train-{{0000..0009}}.tar")
    try:
        found = list(expand_urls(pattern))
    except Exception as error:  # of the library's own kinds
        raise DataError(f"{where} is no pattern of shards ({error}); close its braces") from error
    counts = Counter(name if is_remote(name) else os.path.realpath(name) for name in found)
    twice = listed(name for name, count in counts.items() if count > 1)
    if twice:
        raise DataError(f"{where} names a shard twice: {twice}; name each once")
    return found


def _parts(shards: Sequence[str], where: str, measured: bool) -> list[str]:
    """Return the part of each shard by the beginning of its name, or by its folder's; "" for all where none has one."""
    found = []
    for shard in shards:
        folder, _, name = shard.casefold().rpartition("/")
        words = (re.split(r"[^a-z]", name)[0], folder.rpartition("/")[2])
        found.append(next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), ""))
    named = set(found) - {""}
    if named and "" in found:
        other = shards[found.index("")]
        raise DataError(f"{where} mixes shards of {listed(named)} with {other}; call all of them train, val or test")
    if named and "train" not in named and not measured:
        raise DataError(f"{where} has shards of {listed(named)} but none of train; name those to learn from too")
    return found


def _local(name: str) -> Path:
    """Return the file of a shard, which is downloaded where it is a URL."""
    if is_remote(name):
        return download(name)
    path = Path(name)
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist; repair the pattern of shards{nearest(path.name, beside)}")
    return path


def _indexed(path: Path, field: str) -> ShardIndex:
    """Return the index of a shard, from the cache folder where an earlier run left it there."""
    facts = path.stat()
    key = json.dumps([str(path.absolute()), field, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns])
    file = cache_folder() / "shards" / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
    names = ("block", "ends", "offsets", "sizes", "label_block", "label_ends")
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged
        with np.load(file, allow_pickle=False) as kept:
            block, ends, offsets, sizes, label_block, label_ends = (kept[name] for name in names)
        return ShardIndex(Texts.kept(block, ends), offsets, sizes, Texts.kept(label_block, label_ends))
    index = index_shard(path, field)
    if time.time() - facts.st_ctime > SETTLED:
        texts = [(np.frombuffer(text.block, np.uint8), text.ends) for text in (index.names, index.labels)]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(file) as target:
                arrays: tuple[Any, ...] = (*texts[0], index.offsets, index.sizes, *texts[1])
                values: dict[str, Any] = dict(zip(names, arrays, strict=True))
                np.savez(target, **values)
        except OSError as error:
            raise DataError(f"{file.parent} cannot be written ({error.strerror}); set VISGRAFT_CACHE") from error
    return index


def index_shard(path: Path, field: str = "") -> ShardIndex:
    """Find the samples of a shard, reading headers and labels only.

    Raises:
        DataError: it is no whole tar file without compression, or a sample is not an image with a label.
    """
    names, places, labels, seen = list[str](), list[tuple[int, int]](), list[str](), set[str]()
    for key, members in _samples(path):
        where = f"{path}, sample {key}"
        images = [ext for ext in members if f".{ext.lower()}" in image_extensions()]
        if len(images) != 1:
            found = f"{len(images)} images ({', '.join(images)})" if images else f"no image among {', '.join(members)}"
            raise DataError(f"{where} has {found}; keep one (a sample's name ends at its first dot)")
        if key in seen:
            raise DataError(f"{where} is there twice; name each sample once, and keep its files side by side")
        seen.add(key)
        names.append(f"{key}.{images[0]}")
        places.append(members[images[0]][:2])
        labels.append(_label(members, field, where))
    if not names:
        raise DataError(f"{path} holds no samples; name an image and its label alike, such as 0001.jpg and 0001.cls")
    offsets, sizes = np.array(places, np.int64).T
    return ShardIndex(Texts(names), offsets, sizes, Texts(labels))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int, bytes]]]]:
    """Yield each sample's name and its members by extension: (offset, size, content), the latter of labels only."""
    from webdataset.tariterators import base_plus_ext

    current, members = "", dict[str, tuple[int, int, bytes]]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if not member.isreg() or not key or is_hidden(os.path.basename(key)) or key.startswith("__"):
                    continue
                if member.issparse():
                    raise DataError(
                        f"{path}: {member.name} is stored with gaps; pack the shard anew, without sparse files"
                    )
                if key != current and members:
                    yield current, members
                    members = {}
                file = tar.extractfile(member) if extension in (LABEL, "json") else None
                current = key
                members[extension] = (member.offset_data, member.size, file.read() if file else b"")
                tar.members = []  # type: ignore[attr-defined]  # it would keep every member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends without the mark that ends a tar file")  # which tarfile lets pass
    except (tarfile.TarError, EOFError) as error:
        remedy = "download or pack it anew, as .tar without compression"
        raise DataError(f"{path} is no whole tar file ({error}); {remedy}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); repair or remove it") from error
    if members:
        yield current, members


def _label(members: dict[str, tuple[int, int, bytes]], field: str, where: str) -> str:
    """Return the text of a sample's label."""
    if LABEL in members and not field:
        text = members[LABEL][2].decode("utf-8-sig", "replace").strip()
        if not text or len(text) > LONGEST_LABEL or "\ufffd" in text or not text.isprintable():
            raise DataError(f"{where} has a .{LABEL} that is not one line of text; write a number or a name there")
        return text
    if "json" not in members:
        wanted = f"json with the field {field}" if field else f".{LABEL} and no .json"
        raise DataError(f"{where} has no {wanted} among {', '.join(members)}; add its label, or leave it out")
    try:
        facts = json.loads(members["json"][2])
    except ValueError as error:
        raise DataError(f"{where} has a .json that is no JSON ({error}); repair it") from error
    name = field or FIELD
    value = facts.get(name) if isinstance(facts, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        fields = f" (it has {listed(facts)})" if isinstance(facts, dict) else ""
        raise DataError(f"{where} has no number or name in the field {name} of its .json{fields}; name one behind #")
    return str(value).strip()


def _classes(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the classes in the order of their numbers, or else of their names."""
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    classes = tuple(sorted(names, key=int) if numbers else sorted(names))
    check_classes(classes, where)
    if len(classes) < 2:
        raise DataError(f"{where} has only one class, {classes[0]}; at least two are needed")
    return classes
