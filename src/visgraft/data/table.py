"""Tables (.csv, .tsv or .parquet) that name images with their labels, and optionally their parts and groups."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from visgraft.data.dataset import (
    PARTS,
    SPLIT_NAMES,
    Dataset,
    Split,
    check_classes,
    check_train,
    fill_parts,
    fingerprint_in_order,
    known_names,
    left_out_note,
    match_classes,
)
from visgraft.data.examples import AT_A_TIME, Coded, Columns, Example, Examples, Texts
from visgraft.data.folders import check_folder, inside
from visgraft.data.table_lines import BLANK, at_line, column_names, folded, is_parquet, records
from visgraft.data.table_paths import as_stored, file_size
from visgraft.errors import DataError, nearest

PATH, LABEL, LABELS, SPLIT, GROUP = "image_path", "label", "labels", "split", "group"
COLUMNS = (PATH, LABEL, LABELS, SPLIT, GROUP)
_DEFAULT_SPLIT = Split()


class LabelColumn(NamedTuple):
    """The column that holds the classes: its name, and whether an image may have several."""

    name: str
    several: bool


class TableRow(NamedTuple):
    """A row of a table: the line it ends on, the image's path as written, its file's size in bytes, and the rest.

    `labels` None: it is not known.
    """

    line: int
    name: str
    path: str
    size: int
    labels: tuple[str, ...] | None
    part: str | None
    group: str | None


@dataclass(frozen=True)
class TableColumns:
    """All rows of a table, in its order; `hashes` int64 [N] of the paths."""

    lines: np.ndarray
    names: Texts
    paths: Texts
    hashes: np.ndarray
    sizes: np.ndarray
    labels: Coded
    parts: Coded
    groups: Coded

    @classmethod
    def of(cls, rows: Iterable[TableRow]) -> "TableColumns":
        """Keep rows as they come, without holding many of them."""
        source, texts, numbers = iter(rows), list[tuple[Texts, Texts]](), [np.zeros((6, 0), np.int64)]
        seen: tuple[dict[Any, int], ...] = ({}, {}, {})
        while some := list(islice(source, AT_A_TIME)):
            texts.append((Texts(row.name for row in some), Texts(row.path for row in some)))
            codes = [
                [number.setdefault(row[place], len(number)) for row in some]
                for place, number in zip((4, 5, 6), seen, strict=True)
            ]
            facts = [[row.line for row in some], [hash(row.path) for row in some], [row.size for row in some]]
            numbers.append(np.array([*facts, *codes], np.int64))
        lines, hashes, sizes, *coded = np.concatenate(numbers, axis=1)
        labels, parts, groups = (Coded(c.astype(np.int32), tuple(n)) for c, n in zip(coded, seen, strict=True))
        names, paths = (Texts.joined([pair[i] for pair in texts]) for i in (0, 1))
        return cls(lines, names, paths, hashes, sizes, labels, parts, groups)


def read_table(
    table: str | Path,
    folder: str | Path | None = None,
    split: Split = _DEFAULT_SPLIT,
    known: Sequence[str] | None = None,
    label: LabelColumn | None = None,
) -> Dataset:
    """Read images from a table with the columns image_path and label, and optionally split and group.

    A column labels instead of label makes a multi-label data set: names separated by ";" (or by "|", where no cell has
    a ";"), or nothing. The delimiter (comma, semicolon or tab) follows from the header, whose names may be in upper or
    lower case; other columns are not read. Relative paths start at `folder`, or else at the table's own; a name with
    accents is found however Unicode writes them. With a column split, a missing validation part is drawn from the
    training images and a missing test part stays empty; without one, all parts are drawn. Images of one group stay in
    one part. Classes are ordered by name; where a model is measured, they are the `known` ones, in its order, and the
    images may be of one of them or of some. `label` names the column in place of label or labels; in one that is named,
    a blank cell is a label that is not known, and its row is left out, which `notes` says.

    Raises:
        DataError: the table cannot be used; the message names the line.
    """
    table = Path(table)
    header = _renamed(table_header(table), label)
    _check_header(table, header, known is not None)
    spell, multi_label = known_names(known), LABELS in header
    rows = table_rows(table, folder, header, blanks=label is not None)
    labels = [None if names is None else tuple(map(spell, names)) for names in rows.labels.values]
    labelled = np.array([names is not None for names in labels])[rows.labels.codes]
    if not labelled.any():
        raise DataError(f"{table} has no label in any row; fill in {label.name if label else LABEL}")
    used = {name for names in labels for name in names or ()}
    classes = (
        _classes(table, used, multi_label) if known is None else match_classes(used, known, str(table), multi_label)
    )
    by_name = rows_by_name(rows)
    by_name = by_name[labelled[by_name]]
    examples = _examples(rows, labels, classes, by_name, multi_label)
    given, flat, where = given_parts(table, rows, examples, known is not None)
    if known is None:
        check_train(given["train"], classes, str(table))
    found, drawn_by = fill_parts(given, classes, split, flat, where)
    if known is None:
        check_train(found["train"], classes, str(table))
    layout: Literal["split", "flat"] = "flat" if flat else "split"
    mark = table_fingerprint(rows, labels, by_name)
    return Dataset(
        table, classes, found["train"], found["val"], found["test"], layout, mark, drawn_by, multi_label,
        notes=left_out_note(labelled), label_column="" if label is None else label.name,
    )  # fmt: skip


def _examples(
    rows: TableColumns,
    labels: Sequence[tuple[str, ...] | None],
    classes: Sequence[str],
    by_name: np.ndarray,
    several: bool,
) -> Examples:
    """Return the examples ordered by class and then by name, so that the draw does not depend on the lines' order."""
    number = {name: index for index, name in enumerate(classes)}
    keys = [None if names is None else tuple(number[name] for name in names) for names in labels]
    distinct = sorted({key for key in keys if key is not None})
    rank = {key: place for place, key in enumerate(distinct)}
    # `by_name` has no row whose label is not known, so what stands there is never read.
    codes = np.array([0 if key is None else rank[key] for key in keys], np.int32)[rows.labels.codes]
    values = distinct if several else [key[0] for key in distinct]
    groups = None if set(rows.groups.values) == {None} else rows.groups
    columns = Columns(rows.paths, Coded(codes, values), groups, rows.sizes)
    return Examples(columns, by_name[np.argsort(codes[by_name], kind="stable")])


def rows_by_name(rows: TableColumns) -> np.ndarray:
    """Return the numbers of the rows, int64 [N], in the order of their images' names."""
    return np.array(sorted(range(len(rows.names)), key=list(rows.names).__getitem__))


def given_parts(
    table: Path, rows: TableColumns, examples: Examples, measured: bool
) -> tuple[dict[str, Sequence[Example]], bool, str]:
    """Return the examples of each part that the table names, whether it names none, and how errors call the rest.

    Raises:
        DataError: it names no training image, though nothing is only `measured` on it.
    """
    flat = None in rows.parts.values
    if not flat and "train" not in rows.parts.values and not measured:
        raise DataError(f"{table} has no row whose {SPLIT} is train; mark the images to learn from")
    given: dict[str, Sequence[Example]] = {"train": examples} if flat else {
        part: examples.take(np.flatnonzero(rows.parts.codes[examples.rows] == code))
        for code, part in enumerate(rows.parts.values)
    }  # fmt: skip
    return given, flat, str(table) if flat else f"the train part of {table}"


def table_header(table: Path) -> list[str]:
    """Return the column names in lower case.

    Raises:
        DataError: there are none, or none of image paths, or one that is read is there twice.
    """
    header = column_names(table)
    if header is None:
        raise DataError(f"{table} is empty; its first line must name the columns {PATH} and {LABEL}")
    if PATH not in header:
        others = [name for name in header if name not in COLUMNS]
        raise DataError(f"{table} has no column {PATH}; {_named(header)}{nearest(PATH, others, 1)}")
    twice = [name for name, count in Counter(header).items() if count > 1 and name in COLUMNS]
    if twice:
        raise DataError(f"{table} has two columns {twice[0]}; {_named(header)}; remove one")
    return header


def _named(header: Sequence[str]) -> str:
    return f"its first line names {', '.join(name or '(nothing)' for name in header)}"


def _renamed(header: list[str], label: LabelColumn | None) -> list[str]:
    """Return the columns with the one that holds the labels called label or labels, and no other."""
    if label is None:
        return header
    own = {folded(label.name): LABELS if label.several else LABEL}
    return [own.get(name, f"other {name}" if name in (LABEL, LABELS) else name) for name in header]


def _check_header(table: Path, header: Sequence[str], measured: bool) -> None:
    if not {LABEL, LABELS} & set(header):
        others = [name for name in header if name not in COLUMNS]
        asked = f"; name what to learn with --label {others[0]}" if others and not measured else ""
        remedy = nearest(LABEL, others, 1) or asked
        raise DataError(f"{table} has no column {LABEL} (or {LABELS}); {_named(header)}{remedy}")
    if LABEL in header and LABELS in header:
        raise DataError(f"{table} has both columns {LABEL} and {LABELS}; keep {LABEL} where an image has one class")


def _check_misspelt(table: Path, header: Sequence[str], labels: Sequence[str]) -> None:
    for name in (
        set(header) - set(COLUMNS) - set(labels)
    ):  # a misspelt split would otherwise be passed over, and the parts drawn
        meant = difflib.get_close_matches(name, (SPLIT, GROUP), 1, cutoff=0.8)
        if meant:
            raise DataError(
                f"{table} has a column {name}, which is not read; call it {meant[0]} if that is meant, or rename it"
            )


def table_rows(
    table: Path, folder: str | Path | None, header: Sequence[str], labels: Sequence[str] = (), *, blanks: bool = False
) -> TableColumns:
    """Read and check all rows; the labels of each are its cells in the columns `labels`, or the classes in its one.

    With `blanks`, a blank cell in that one is a label that is not known.

    Raises:
        DataError: a row cannot be used; the message names the line.
    """
    base = table.parent if folder is None else Path(folder)
    if folder is not None:
        check_folder(base, "the images")
    _check_misspelt(table, header, labels)
    missing = list[tuple[int, str]]()
    rows = TableColumns.of(_parsed(table, base, header, labels, missing, blanks))
    count = len(rows.lines)
    if not count:
        raise DataError(f"{table} has no rows below its header; add one for each image")
    _check_twice(table, header, rows)
    if missing:
        _refuse_missing(table, missing, count)
    if None in rows.parts.values and len(rows.parts.values) > 1:
        line = rows.lines[np.argmax(rows.parts.codes == rows.parts.values.index(None))]
        raise DataError(f"{at_line(table, line)} has no {SPLIT}, but others have; give all rows one, or none")
    _check_groups(table, rows)
    if LABEL in header and not labels:
        _ask_about_several(table, rows)
    return rows


def _parsed(
    table: Path,
    base: Path,
    header: Sequence[str],
    columns: Sequence[str],
    missing: list[tuple[int, str]],
    blanks: bool,
) -> Iterator[TableRow]:
    """Yield the rows; what is not there goes to `missing`."""
    separator, folders, start = _separator(table, header), dict[str, dict[str, str]](), inside(base, "")
    for line, fields in records(table, header, (*COLUMNS, *columns)):
        if len(fields) != len(header):
            remedy = "quote fields that contain the delimiter"
            raise DataError(f"{at_line(table, line)} has {len(fields)} fields, but the header {len(header)}; {remedy}")
        values = {name: field.strip() for name, field in zip(header, fields, strict=True)}
        if not values[PATH]:
            raise DataError(f"{at_line(table, line)} has no {PATH}; fill it in, or remove the line")
        name = os.path.normpath(values[PATH])
        path = as_stored(name if os.path.isabs(name) else start + name, folders)
        size = file_size(path, table, line)
        if size is None:
            missing.append((line, path))
        part = _part(table, line, values.get(SPLIT))
        cells = tuple(values[name] for name in columns)
        labels = cells or _labels(table, line, values, separator, blanks)
        yield TableRow(line, name.replace(os.sep, "/"), path, size or 0, labels, part, values.get(GROUP) or None)


def _check_twice(table: Path, header: Sequence[str], rows: TableColumns) -> None:
    """Refuse an image in two rows."""
    order = np.argsort(rows.hashes, kind="stable")
    alike = np.flatnonzero(np.diff(rows.hashes[order]) == 0)
    for later, earlier in sorted((int(order[place + 1]), int(order[place])) for place in alike):
        if rows.paths[later] == rows.paths[earlier]:
            lines = f"{'rows' if is_parquet(table) else 'lines'} {rows.lines[earlier]} and {rows.lines[later]}"
            written = next(fields for line, fields in records(table, header, COLUMNS) if line == rows.lines[later])
            name = written[header.index(PATH)].strip()
            raise DataError(f"{table} names {name} twice, in {lines}; remove one")


def _ask_about_several(table: Path, rows: TableColumns) -> None:
    """Refuse labels such as a|b beside a or b: an image with two classes would be learned as one of a third."""
    alone = {labels[0] for labels in rows.labels.values if labels}
    for code, label in ((code, labels[0]) for code, labels in enumerate(rows.labels.values) if labels):
        pieces = [piece.strip() for piece in re.split(r"[|;]", label)]
        known = [piece for piece in pieces if piece in alone]
        if len(pieces) > 1 and known:
            line = rows.lines[np.argmax(rows.labels.codes == code)]
            raise DataError(
                f"{at_line(table, line)} has the {LABEL} {label}, and {known[0]} is one by itself; call the "
                f"column {LABELS} if an image may have several classes, or rename this one"
            )


def _separator(table: Path, header: Sequence[str]) -> str:
    """Return what separates the names in a column of several, which takes a pass over the table."""
    if LABELS not in header:
        return ";"
    column, bars = header.index(LABELS), False
    for _, fields in records(table, header, COLUMNS):
        cell = fields[column] if column < len(fields) else ""
        if ";" in cell:
            return ";"
        bars = bars or "|" in cell
    return "|" if bars else ";"


def _refuse_missing(table: Path, missing: Sequence[tuple[int, str]], count: int) -> None:
    line, path = missing[0]
    some = f"{len(missing)} of {count} images do not exist, the first being" if len(missing) > 1 else "there is no"
    remedy = "repair the paths" if len(missing) < count else "relative paths start at the table's folder, or at DATA"
    slashes = ", and are written with / between folders" if "\\" in os.path.basename(path) else ""
    raise DataError(f"{at_line(table, line)}: {some} {path}; {remedy}{slashes}")


def _part(table: Path, line: int, value: str | None) -> str | None:
    if not value:
        return None
    if value.casefold() not in SPLIT_NAMES:
        wanted = f"use {', '.join(PARTS)}{nearest(value.casefold(), PARTS, 1)}"
        raise DataError(f"{at_line(table, line)}: {SPLIT} is {value!r}; {wanted}")
    return SPLIT_NAMES[value.casefold()]


def _labels(table: Path, line: int, values: dict[str, str], separator: str, blanks: bool) -> tuple[str, ...] | None:
    """Return the names of an image's classes, sorted; None where a cell may be blank and is."""
    if blanks and values[LABELS if LABELS in values else LABEL].casefold() in BLANK:
        return None
    if LABELS in values:
        return tuple(sorted({name.strip() for name in values[LABELS].split(separator)} - {""}))
    if not values[LABEL]:
        remedy = "fill it in, remove the line, or leave out all such lines by"
        raise DataError(f"{at_line(table, line)} has no {LABEL}; {remedy} --label {LABEL}")
    return (values[LABEL],)


def _check_groups(table: Path, rows: TableColumns) -> None:
    """Refuse a group in two parts: what is learned from its training images would be measured on the others."""
    groups, parts = rows.groups, rows.parts
    _, first = np.unique(groups.codes, return_index=True)
    named = np.array([name is not None for name in groups.values])
    wrong = np.flatnonzero((parts.codes != parts.codes[first][groups.codes]) & named[groups.codes])
    if len(wrong):
        here, there = int(wrong[0]), int(first[groups.codes[wrong[0]]])
        both = " and ".join(
            f"{parts.values[parts.codes[row]]} ({at_line(table, rows.lines[row]).rpartition(', ')[2]})"
            for row in (there, here)
        )
        raise DataError(f"{table}: group {groups.values[groups.codes[here]]} is in {both}; keep each group in one part")


def _classes(table: Path, used: Iterable[str], multi_label: bool) -> tuple[str, ...]:
    classes = tuple(sorted(used))
    check_classes(classes, str(table))
    if len(classes) < 2:
        found = f"only one class, {classes[0]}" if classes else "no class at all"
        remedy = f"; for images with and without it, name both classes in a column {LABEL}" if multi_label else ""
        raise DataError(f"{table} has {found}; at least two are needed{remedy}")
    return classes


def table_fingerprint(rows: TableColumns, labels: Sequence[tuple[str, ...] | None], by_name: np.ndarray) -> str:
    """Return the fingerprint of a table's images; `labels` are what stands for each of `rows.labels.values`."""
    parts, groups = rows.parts, rows.groups
    names = ((rows.names[row], size) for row, size in zip(by_name.tolist(), rows.sizes[by_name].tolist(), strict=True))
    codes = (column.codes[by_name].tolist() for column in (rows.labels, parts, groups))
    marks = (
        "\0".join((";".join(labels[label] or ()), parts.values[part] or "", groups.values[group] or ""))
        for label, part, group in zip(*codes, strict=True)
    )
    return fingerprint_in_order(names, marks)
