"""Data sets of the Hugging Face `datasets` library: by name, or on disk."""

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visgraft.data.dataset import (
    SPLIT_NAMES,
    Dataset,
    Example,
    Split,
    check_train,
    fill_parts,
    fingerprint,
    known_names,
    listed,
    match_classes,
)
from visgraft.errors import DataError, nearest
from visgraft.files import HUB_PREFIX

ROWS_AT_A_TIME = 1000  # in reading the images' sizes
_DEFAULT_SPLIT = Split()
Names = tuple[str, ...]  # of the classes that one image has


@dataclass(frozen=True)
class Content:
    """Reads the bytes of one image when called; several threads may do so at once."""

    rows: Any
    column: str
    index: int

    def __call__(self) -> bytes:
        """Return the bytes, from inside the data set or from the file that it names.

        Raises:
            DataError: the row has no image.
        """
        stored = self.rows[self.index][self.column]
        if stored is None:
            raise DataError(f"row {self.index} of the data set has no image; remove it")
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def read_hub(location: str | Path, split: Split = _DEFAULT_SPLIT, known: Sequence[str] | None = None) -> Dataset:
    """Read a data set of the `datasets` library: `hf:NAME`, `hf:NAME:CONFIG` or `hf:PATH`.

    PATH is a folder that `save_to_disk` wrote or that `load_dataset` reads, or a .parquet file. It needs one column of
    images and one of labels: ClassLabel (or a list of them, in a multi-label data set), or text or whole numbers
    called label. Splits called train, validation and test are taken as they are; a missing validation part is drawn
    from the training images. Splits of other names, and parts without labels, are not read. Where there is only one
    split, all parts are drawn from it. Where a model is measured, the classes are the `known` ones, in its order, and
    the images may be of one of them or of some.

    Raises:
        DataError: the library is missing, or the data set cannot be loaded or used.
    """
    where = HUB_PREFIX + str(location).removeprefix(HUB_PREFIX)
    splits = _splits(_load(where), where, known is not None)
    features = next(iter(splits.values())).features
    image, label = _image_column(features, where), _label_column(features, where)
    spell = known_names(known)
    labels = {
        part: [None if names is None else tuple(map(spell, names)) for names in _labels(rows, label)]
        for part, rows in splits.items()
    }
    labels = {part: found for part, found in labels.items() if part == "train" or any(n is not None for n in found)}
    if not labels:
        raise DataError(f"{where} has no image with a label in its column {label}, so nothing can be measured on it")
    used = {name for found in labels.values() for names in found for name in names or ()}
    classes = tuple(name for name in _order(features[label], used) if name in used)
    if known is not None:
        classes = match_classes(used, known, where, _is_list(features[label]))
    elif len(classes) < 2:
        found = f"only one class, {classes[0]}" if classes else "no class at all"
        raise DataError(f"{where} has {found}, in its column {label}; at least two are needed")
    multi_label = _is_list(features[label])
    images = {part: _undecoded(splits[part], image) for part in labels}
    examples = {
        part: _examples(images[part], labels[part], classes, multi_label, f"{where}/{part}", image) for part in labels
    }
    sizes = (size for part in images for size in _sizes(images[part], image, part, where))
    marks = (";".join(names or ()) for found in labels.values() for names in found)
    mark = fingerprint(sizes, marks)
    flat = list(splits) == ["train"]
    if known is None:
        check_train(examples["train"], classes, where)
    parts, drawn_by = fill_parts(examples, classes, split, flat, where)
    if known is None:
        check_train(parts["train"], classes, where)
    layout: Literal["split", "flat"] = "flat" if flat else "split"
    return Dataset(
        Path(where), classes, parts["train"], parts["val"], parts["test"], layout, mark, drawn_by, multi_label
    )


def _load(where: str) -> Any:
    """Return a `datasets.Dataset`, or a mapping of them."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{where} needs the datasets library; run pip install 'visgraft[datasets]'") from error
    name, _, config = where.removeprefix(HUB_PREFIX).partition(":")
    path = Path(name)
    if not name:
        raise DataError(f"{where} names no data set; use hf:NAME, hf:NAME:CONFIG or hf:PATH")
    if not path.exists() and (path.is_absolute() or name[0] in ".~" or len(path.parts) > 2):  # not a name on the hub
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{where}: {path} does not exist; repair the path{nearest(path.name, beside)}")
    try:
        with _quiet():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return datasets.load_from_disk(name)
            if path.is_file():
                return datasets.load_dataset("parquet", data_files=name)
            return datasets.load_dataset(name, config or None)
    except Exception as error:  # what the library raises depends on the builder, the network and the data
        reason = textwrap.shorten(str(error.__cause__ or error) or type(error).__name__, 300)
        remedy = (
            "give a folder that datasets.load_dataset reads, or a .parquet file"
            if path.exists()
            else "check the name, the configuration and the network, or give a folder written by save_to_disk"
        )
        raise DataError(f"{where} cannot be loaded ({reason}); {remedy}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own reports of failures, and bars off a terminal, away from the one line of error."""
    import datasets
    from huggingface_hub.utils import logging

    before, data_before = logging.get_verbosity(), datasets.logging.get_verbosity()
    logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    bars = datasets.utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        datasets.logging.set_verbosity(data_before)
        if not bars:
            datasets.enable_progress_bars()


def _splits(loaded: Any, where: str, measured: bool) -> dict[str, Any]:
    """Return the splits that are a part, by the part's name; a single split is called train, whatever its name was.

    Where images are only measured on, none need be `train`.
    """
    if not isinstance(loaded, Mapping):
        return {"train": loaded}
    if len(loaded) == 1 and _part(next(iter(loaded))) not in ("val", "test"):
        return {"train": next(iter(loaded.values()))}
    found: dict[str, Any] = {}
    for name, rows in loaded.items():
        if _part(name) in found:
            raise DataError(f"{where} has two splits for {_part(name)} among {listed(loaded)}; keep one")
        if _part(name):
            found[_part(name)] = rows
    if "train" not in found and not (measured and found):
        raise DataError(f"{where} has the splits {listed(loaded)} but no train; name them train, validation and test")
    return found


def _part(name: str) -> str:
    return SPLIT_NAMES.get(str(name).casefold(), "")


def _image_column(features: Mapping[str, Any], where: str) -> str:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        remedy = "cast one with cast_column(NAME, datasets.Image()) and save it with save_to_disk"
        raise DataError(f"{where} has no column of images among {', '.join(features)}; {remedy}")
    if len(images) > 1:
        raise DataError(f"{where} has several columns of images, {listed(images)}; keep one (remove_columns)")
    return images[0]


def _label_column(features: Mapping[str, Any], where: str) -> str:
    import datasets

    known = [name for name, feature in features.items() if isinstance(_item(feature), datasets.ClassLabel)]
    if len(known) > 1:
        raise DataError(f"{where} has several columns of labels, {listed(known)}; keep one (remove_columns)")
    for name in (*known, "label", "labels"):
        plain = getattr(_item(features.get(name)), "dtype", "")
        if name in known or plain in ("string", "large_string", "bool") or plain.lstrip("u").startswith("int"):
            return name
    raise DataError(
        f"{where} has no column of labels among {', '.join(features)}; "
        "add a ClassLabel column, or call one of text or whole numbers label"
    )


def _is_list(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature")


def _item(feature: Any) -> Any:
    """Return what a list column is a list of, and any other column's feature as it is."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def _labels(rows: Any, column: str) -> list[Names | None]:
    """Return the names of each row's classes, or None for a row without a label (on the hub also -1)."""
    if column not in rows.column_names:
        return [None] * len(rows)
    feature = rows.features[column]
    names = getattr(_item(feature), "names", None)
    labels: list[Names | None] = []
    for stored in rows.with_format(None).select_columns([column])[:][column]:
        values = stored if _is_list(feature) else [stored]
        absent = values is None or any(value is None or (names and value < 0) for value in values)
        labels.append(None if absent else tuple(names[value] if names else str(value) for value in values))
    return labels


def _order(feature: Any, used: Iterable[str]) -> list[str]:
    """Return the classes in the order of ClassLabel, of the numbers, or else of their names."""
    item = _item(feature)
    if getattr(item, "names", None):
        return list(item.names)
    return sorted(used, key=int) if "int" in item.dtype else sorted(used)


def _undecoded(rows: Any, column: str) -> Any:
    import datasets

    return rows.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _examples(
    images: Any, labels: list[Names | None], classes: Names, multi_label: bool, name: str, column: str
) -> tuple[Example, ...]:
    """Return the examples ordered by class and then by row.

    Raises:
        DataError: a row has no label.
    """
    unlabelled = [index for index, names in enumerate(labels) if names is None]
    if unlabelled:
        raise DataError(
            f"{name} has {len(unlabelled)} rows without a label, the first being {unlabelled[0]}; remove them"
        )
    number = {known: index for index, known in enumerate(classes)}
    keyed = sorted((tuple(sorted({number[n] for n in names or ()})), index) for index, names in enumerate(labels))
    return tuple(
        Example(
            Path(name.removeprefix(HUB_PREFIX)) / f"{index:06}",
            label if multi_label else label[0],
            content=Content(images, column, index),
        )
        for label, index in keyed
    )


def _sizes(images: Any, column: str, part: str, where: str) -> Iterator[tuple[str, int]]:
    """Yield (name of the row, size in bytes) of each image without reading it.

    The library's own fingerprint would not do: it changes when a data set is moved or saved again.
    """
    import pyarrow.compute as pc

    index = 0
    for batch in images.with_format("arrow").iter(ROWS_AT_A_TIME):
        stored = batch.column(column)
        lengths = pc.binary_length(pc.struct_field(stored, "bytes")).to_pylist()
        paths = pc.struct_field(stored, "path").to_pylist()
        for length, path in zip(lengths, paths, strict=True):
            try:
                size = length if length is not None else os.stat(path).st_size if path else 0
            except OSError as error:
                raise DataError(f"{where}: {path} cannot be read ({error.strerror}); load the data set anew") from error
            yield f"{part}/{index:06}", size
            index += 1
