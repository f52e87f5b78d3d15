"""Tables (.csv or .tsv) that name images with their labels, and optionally their parts and groups."""

import csv
import difflib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from visgraft.data.dataset import (
    PARTS,
    SPLIT_NAMES,
    Dataset,
    Example,
    Split,
    check_classes,
    check_train,
    fill_parts,
    fingerprint,
    known_names,
    match_classes,
)
from visgraft.data.folders import check_folder, inside
from visgraft.errors import DataError, nearest

PATH, LABEL, LABELS, SPLIT, GROUP = "image_path", "label", "labels", "split", "group"
COLUMNS = (PATH, LABEL, LABELS, SPLIT, GROUP)
DELIMITERS = ",;\t"
_DEFAULT_SPLIT = Split()


@dataclass(frozen=True)
class TableRow:
    """A row of a table: the line it ends on, the image's path as written, its file's size in bytes, and the rest."""

    line: int
    name: str
    path: str
    size: int
    labels: tuple[str, ...]
    part: str | None
    group: str | None


def read_table(
    table: str | Path,
    folder: str | Path | None = None,
    split: Split = _DEFAULT_SPLIT,
    known: Sequence[str] | None = None,
) -> Dataset:
    """Read images from a table with the columns image_path and label, and optionally split and group.

    A column labels instead of label makes a multi-label data set: names separated by ";" (or by "|", where no cell has
    a ";"), or nothing. The delimiter (comma, semicolon or tab) follows from the header, whose names may be in upper or
    lower case; other columns are not read. Relative paths start at `folder`, or else at the table's own; a name with
    accents is found however Unicode writes them. With a column split, a missing validation part is drawn from the
    training images and a missing test part stays empty; without one, all parts are drawn. Images of one group stay in
    one part. Classes are ordered by name; where a model is measured, they are the `known` ones, in its order, and the
    images may be of one of them or of some.

    Raises:
        DataError: the table cannot be used; the message names the line.
    """
    table = Path(table)
    base = table.parent if folder is None else Path(folder)
    if folder is not None:
        check_folder(base, "the images")
    header, records = _records(table)
    spell = known_names(known)
    rows = [replace(row, labels=tuple(map(spell, row.labels))) for row in _rows(table, base, header, records)]
    multi_label = LABELS in header
    classes = _classes(table, rows, multi_label) if known is None else _match(table, rows, known, multi_label)
    number = {name: index for index, name in enumerate(classes)}
    # Sorted, so that the draw does not depend on the order of the lines.
    rows.sort(key=lambda row: (tuple(number[name] for name in row.labels), row.name))
    parts: dict[str | None, list[Example]] = {}
    for row in rows:
        label = tuple(number[name] for name in row.labels)
        parts.setdefault(row.part, []).append(Example(Path(row.path), label if multi_label else label[0], row.group))
    flat = None in parts
    if not flat and "train" not in parts and known is None:
        raise DataError(f"{table} has no row whose {SPLIT} is train; mark the images to learn from")
    given = {"train": parts[None]} if flat else {part or "": examples for part, examples in parts.items()}
    where = str(table) if flat else f"the train part of {table}"
    if known is None:
        check_train(given["train"], classes, str(table))
    found, drawn_by = fill_parts(given, classes, split, flat, where)
    if known is None:
        check_train(found["train"], classes, str(table))
    layout: Literal["split", "flat"] = "flat" if flat else "split"
    mark = _fingerprint(rows)
    return Dataset(table, classes, found["train"], found["val"], found["test"], layout, mark, drawn_by, multi_label)


def read_lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, fields) of each row that is not empty, the header first; the header tells the delimiter.

    Raises:
        DataError: the table cannot be read; the message names the line.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(DELIMITERS, key=first.count), strict=True)
            try:
                yield from ((reader.line_num, fields) for fields in reader if any(field.strip() for field in fields))
            except csv.Error as error:
                raise DataError(f"{table}, line {reader.line_num}: {error}; repair the quotes there") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 text; save it as CSV UTF-8") from error
    except FileNotFoundError as error:
        beside = [path.name for path in table.parent.iterdir()] if table.parent.is_dir() else []
        raise DataError(f"{table} does not exist; give the path of a .csv file{nearest(table.name, beside)}") from error
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror}); give the path of a .csv file") from error


def _records(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the column names in lower case and (line, fields) of each row that is not empty."""
    records = list(read_lines(table))
    if not records:
        raise DataError(f"{table} is empty; its first line must name the columns {PATH} and {LABEL}")
    header = [name.strip().casefold() for name in records[0][1]]
    _check_header(table, header)
    if len(records) == 1:
        raise DataError(f"{table} has no rows below its header; add one for each image")
    return header, records[1:]


def _check_header(table: Path, header: Sequence[str]) -> None:
    found = f"its first line names {', '.join(name or '(nothing)' for name in header)}"
    for wanted, names in ((PATH, (PATH,)), (f"{LABEL} (or {LABELS})", (LABEL, LABELS))):
        if not set(names) & set(header):
            others = [name for name in header if name not in COLUMNS]
            raise DataError(f"{table} has no column {wanted}; {found}{nearest(names[0], others, 1)}")
    twice = [name for name, count in Counter(header).items() if count > 1 and name in COLUMNS]
    if twice:
        raise DataError(f"{table} has two columns {twice[0]}; {found}; remove one")
    if LABEL in header and LABELS in header:
        raise DataError(f"{table} has both columns {LABEL} and {LABELS}; keep {LABEL} where an image has one class")
    for name in set(header) - set(COLUMNS):  # a misspelt split would otherwise be passed over, and the parts drawn
        meant = difflib.get_close_matches(name, (SPLIT, GROUP), 1, cutoff=0.8)
        if meant:
            raise DataError(
                f"{table} has a column {name}, which is not read; call it {meant[0]} if that is meant, or rename it"
            )


def _rows(table: Path, base: Path, header: Sequence[str], records: Sequence[tuple[int, list[str]]]) -> list[TableRow]:
    rows, seen, missing, without_split = list[TableRow](), dict[str, int](), list[tuple[int, str]](), list[int]()
    separator, folders = _separator(header, records), dict[str, dict[str, str]]()
    for line, fields in records:
        where = f"{table}, line {line}"
        if len(fields) != len(header):
            remedy = "quote fields that contain the delimiter"
            raise DataError(f"{where} has {len(fields)} fields, but the header {len(header)}; {remedy}")
        values = {name: field.strip() for name, field in zip(header, fields, strict=True)}
        if not values[PATH]:
            raise DataError(f"{where} has no {PATH}; fill it in, or remove the line")
        name = os.path.normpath(values[PATH])
        path = _as_stored(inside(base, name), folders)
        other = seen.setdefault(path, line)
        if other != line:
            raise DataError(f"{table} names {values[PATH]} twice, in lines {other} and {line}; remove one")
        size = _size(path, where)
        if size is None:
            missing.append((line, path))
        part = _part(where, values.get(SPLIT))
        if part is None:
            without_split.append(line)
        labels = _labels(where, values, separator)
        rows.append(TableRow(line, name.replace(os.sep, "/"), path, size or 0, labels, part, values.get(GROUP) or None))
    if missing:
        _refuse_missing(table, missing, len(rows))
    if without_split and len(without_split) < len(rows):
        raise DataError(f"{table}, line {without_split[0]} has no {SPLIT}, but others have; give all rows one, or none")
    _check_groups(table, rows)
    if LABEL in header:
        _ask_about_several(table, rows)
    return rows


def _as_stored(path: str, folders: dict[str, dict[str, str]]) -> str:
    """Return a path as the disk writes it, where Unicode can write its accents in another way; else as it is.

    `folders` keeps, for each folder looked into, its names by their composed form.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    parent, name = os.path.split(path)
    parent = _as_stored(parent, folders) if parent and parent != path else parent
    if parent not in folders:
        try:
            folders[parent] = {unicodedata.normalize("NFC", other): other for other in os.listdir(parent or ".")}
        except (OSError, ValueError):
            folders[parent] = {}
    return os.path.join(parent, folders[parent].get(unicodedata.normalize("NFC", name), name))


def _ask_about_several(table: Path, rows: Sequence[TableRow]) -> None:
    """Refuse labels such as a|b beside a or b: an image with two classes would be learned as one of a third."""
    alone = {row.labels[0] for row in rows}
    for row in rows:
        pieces = [piece.strip() for piece in re.split(r"[|;]", row.labels[0])]
        known = [piece for piece in pieces if piece in alone]
        if len(pieces) > 1 and known:
            raise DataError(
                f"{table}, line {row.line} has the {LABEL} {row.labels[0]}, and {known[0]} is one by itself; call the "
                f"column {LABELS} if an image may have several classes, or rename this one"
            )


def _separator(header: Sequence[str], records: Sequence[tuple[int, list[str]]]) -> str:
    """Return what separates the names in a column of several."""
    column = header.index(LABELS) if LABELS in header else None
    cells = [fields[column] for _, fields in records if column is not None and column < len(fields)]
    return "|" if any("|" in cell for cell in cells) and not any(";" in cell for cell in cells) else ";"


def _size(path: str, where: str) -> int | None:
    """Return the size of a file in bytes, or None where there is none."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{where}: {path!r} cannot be read ({reason}); repair the path or the file") from error
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{where}: {path} is no file; give the path of an image")
    return facts.st_size


def _refuse_missing(table: Path, missing: Sequence[tuple[int, str]], count: int) -> None:
    line, path = missing[0]
    some = f"{len(missing)} of {count} images do not exist, the first being" if len(missing) > 1 else "there is no"
    remedy = "repair the paths" if len(missing) < count else "relative paths start at the table's folder, or at DATA"
    slashes = ", and are written with / between folders" if "\\" in os.path.basename(path) else ""
    raise DataError(f"{table}, line {line}: {some} {path}; {remedy}{slashes}")


def _part(where: str, value: str | None) -> str | None:
    if not value:
        return None
    if value.casefold() not in SPLIT_NAMES:
        raise DataError(f"{where}: {SPLIT} is {value!r}; use {', '.join(PARTS)}{nearest(value.casefold(), PARTS, 1)}")
    return SPLIT_NAMES[value.casefold()]


def _labels(where: str, values: dict[str, str], separator: str) -> tuple[str, ...]:
    """Return the names of an image's classes, sorted."""
    if LABELS in values:
        return tuple(sorted({name.strip() for name in values[LABELS].split(separator)} - {""}))
    if not values[LABEL]:
        raise DataError(f"{where} has no {LABEL}; fill it in, or remove the line")
    return (values[LABEL],)


def _check_groups(table: Path, rows: Iterable[TableRow]) -> None:
    """Refuse a group in two parts: what is learned from its training images would be measured on the others."""
    first: dict[str, TableRow] = {}
    for row in rows:
        if row.group is not None:
            other = first.setdefault(row.group, row)
            if other.part != row.part:
                both = f"{other.part} (line {other.line}) and {row.part} (line {row.line})"
                raise DataError(f"{table}: group {row.group} is in {both}; keep each group in one part")


def _classes(table: Path, rows: Iterable[TableRow], multi_label: bool) -> tuple[str, ...]:
    classes = tuple(sorted({name for row in rows for name in row.labels}))
    check_classes(classes, str(table))
    if len(classes) < 2:
        found = f"only one class, {classes[0]}" if classes else "no class at all"
        remedy = f"; for images with and without it, name both classes in a column {LABEL}" if multi_label else ""
        raise DataError(f"{table} has {found}; at least two are needed{remedy}")
    return classes


def _match(table: Path, rows: Iterable[TableRow], known: Sequence[str], multi_label: bool) -> tuple[str, ...]:
    return match_classes({name for row in rows for name in row.labels}, known, str(table), multi_label)


def _fingerprint(rows: Iterable[TableRow]) -> str:
    by_name = sorted(rows, key=lambda row: row.name)
    labels = ("\0".join((";".join(row.labels), row.part or "", row.group or "")) for row in by_name)
    return fingerprint(((row.name, row.size) for row in by_name), labels)
