"""Labelled images in three parts, wherever they come from, and how those parts are drawn.

The parts are drawn class by class, so that rare classes are in each part too; images of one group (one patient, one
camera, one film) are kept together. The draw depends on the seed and the order of the images alone.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from visgraft.data.examples import Coded, Example, Label, chosen, counts_by_class, groups_of, joined, labels_of
from visgraft.data.mirror import Mirror
from visgraft.data.stratify import draw_marked, joint_strata
from visgraft.data.tasks import LabelTask, TaskLabels
from visgraft.errors import CannotDivide, DataError, UnknownClasses, nearest

PARTS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TRUTHS = ("true", "false")
HASHED_AT_A_TIME = 4096  # names


@dataclass(frozen=True)
class Split:
    """How images are divided where their source does not say: shares of validation and test images, and a seed.

    Raises:
        DataError: a share below 0, no image left to train on, or a negative seed.
    """

    val_fraction: float = 0.15
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.val_fraction >= 0 and self.test_fraction >= 0 and self.val_fraction + self.test_fraction < 1):
            both = f"val_fraction ({self.val_fraction}) and test_fraction ({self.test_fraction})"
            raise DataError(f"{both} must each be at least 0, and their sum must be below 1")
        if self.seed < 0:
            raise DataError(f"seed is {self.seed}, but must not be negative")


@dataclass(frozen=True)
class Dataset:
    """Labelled images in three parts, each ordered by class and then by name.

    `root` is the folder, table or data set they come from. `layout` is "split" where the source says which image is in
    which part, "flat" where the parts were drawn; `split` says how parts were drawn, None where none was.
    `fingerprint` is a SHA-256 of the images' names and sizes, and of the labels where a table holds them. With
    `multi_label`, an image may have several classes or none; with `tasks`, it has a label for each of these, or for
    some, and `classes` are the names of all outputs. `notes` say in one line each what was passed over, and
    `unlabelled` are folders of images without classes that lie beside the parts. `mirror` says of
    which folder at an address `root` is this machine's copy. `label_column` is the column of a table that was named as
    that of the classes. `absent` says of tasks of a model, by name, why the source has no labels for them.
    """

    root: Path
    classes: tuple[str, ...]
    train: Sequence[Example]
    val: Sequence[Example]
    test: Sequence[Example]
    layout: Literal["split", "flat"]
    fingerprint: str
    split: Split | None
    multi_label: bool = False
    tasks: tuple[LabelTask, ...] = ()
    notes: tuple[str, ...] = ()
    unlabelled: tuple[Path, ...] = ()
    mirror: Mirror | None = None
    label_column: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def all(self) -> Sequence[Example]:
        """The examples of all parts."""
        return joined(self.train, self.val, self.test)

    def part(self, name: str) -> Sequence[Example]:
        """Return the examples of "train", "val" or "test".

        Raises:
            DataError: the part is empty, or there is no part of this name.
        """
        parts = {"train": self.train, "val": self.val, "test": self.test}
        if name not in parts:
            raise DataError(f"{name!r} is not a part of {self.root}; use {', '.join(PARTS)}{nearest(name, PARTS)}")
        if not parts[name]:
            remedies = [f"set {name}_fraction above 0"] if self.layout == "flat" or name == "val" else []
            if self.layout == "split":
                folder = self.root.is_dir()
                remedies += [f"add {self.root / name}/<class>/<images>" if folder else f"mark images as {name}"]
            raise DataError(f"{self.root} has no {name} images; {' or '.join(remedies)}")
        return parts[name]


def divide(
    examples: Sequence[Example],
    classes: Sequence[str],
    split: Split,
    where: str,
) -> dict[str, Sequence[Example]]:
    """Draw {"train", "val", "test"} from examples ordered by class; each keeps that order.

    Raises:
        DataError: too few images of a class, or too few groups, for every part whose fraction is above zero.
    """
    labels, groups = labels_of(examples), groups_of(examples)
    several_tasks = isinstance(next(iter(labels.values), None), TaskLabels)
    strata = (
        joint_strata(labels)
        if several_tasks
        else np.array([stratum(label) for label in labels.values], np.int64)[labels.codes]
    )
    if several_tasks and groups is None:
        if len(examples) < (1 + (split.val_fraction > 0) + (split.test_fraction > 0)):
            raise CannotDivide(f"{where} has too few images to divide ({len(examples)}); add some")
        parts = draw_marked(labels, split.val_fraction, split.test_fraction, split.seed)
    elif groups is None:
        parts = _draw_images(strata, classes, split, where)
    else:
        parts = _draw_groups(strata, groups, () if several_tasks else classes, split, where)
    return {part: chosen(examples, np.sort(numbers)) for part, numbers in parts.items()}


def fill_parts(
    given: Mapping[str, Sequence[Example]], classes: Sequence[str], split: Split, flat: bool, where: str
) -> tuple[dict[str, Sequence[Example]], Split | None]:
    """Draw from "train" what a source does not give, and say how: every part of a flat one, else the validation part.

    Raises:
        DataError: see `divide`.
    """
    parts = {part: given.get(part, ()) for part in PARTS}
    if parts["val"]:
        return parts, None
    asked = split if flat else replace(split, test_fraction=0.0)
    drawn = divide(parts["train"], classes, asked, where)
    return drawn | ({} if flat else {"test": parts["test"]}), asked


def stratum(label: Label) -> int:
    """What a draw keeps the shares of: the class; images with any number of classes are all drawn alike."""
    return label if isinstance(label, int) else 0


def _draw_images(strata: np.ndarray, classes: Sequence[str], split: Split, where: str) -> dict[str, np.ndarray]:
    """Divide each class on its own, with at least one image in every part whose fraction is above zero.

    One stratified draw over all images would fail on rare classes, and change every part when one class grows.
    """
    order = np.argsort(strata, kind="stable")
    present, starts = np.unique(strata[order], return_index=True)
    asked = [
        name
        for name, value in (("val_fraction", split.val_fraction), ("test_fraction", split.test_fraction))
        if value > 0
    ]
    members_of = dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
    small = [f"{classes[i]} ({len(members)})" for i, members in members_of.items() if len(members) <= len(asked)]
    if asked and small:
        remedy = f"give each at least {len(asked) + 1}, or set {' or '.join(asked)} to 0"
        raise CannotDivide(f"{where} has classes with too few images to divide: {listed(small)}; {remedy}")
    parts: dict[str, list[np.ndarray]] = {part: [np.zeros(0, np.int64)] for part in PARTS}
    for index, members in members_of.items():
        val, test = _counts(len(members), split.val_fraction, split.test_fraction)
        drawn = np.random.default_rng((split.seed, index)).permutation(len(members))
        for part, taken in zip(("test", "val", "train"), np.split(drawn, [test, test + val]), strict=True):
            parts[part].append(members[taken])
    return {part: np.concatenate(taken) for part, taken in parts.items()}


def _counts(count: int, *fractions: float) -> list[int]:
    """Return how many of a class's images go to each part with a fraction, leaving at least one to train on."""
    counts = [max(1, round(count * fraction)) if fraction > 0 else 0 for fraction in fractions]
    while sum(counts) >= count:
        counts[counts.index(max(counts))] -= 1
    return counts


def _draw_groups(
    labels: np.ndarray, named: Coded, classes: Sequence[str], split: Split, where: str
) -> dict[str, np.ndarray]:
    """Take whole groups out for the test part, then for the validation part, keeping the classes' shares if possible.

    An image without a group is a group of its own.
    """
    count = len(labels)
    names = [name if (name := named.values[code]) is not None else f"\0{i}" for i, code in enumerate(named.codes)]
    number = {name: index for index, name in enumerate(sorted(set(names)))}
    groups = np.fromiter((number[name] for name in names), np.int64, count)
    left, parts = np.arange(count), dict[str, np.ndarray]()
    for part, fraction in (("test", split.test_fraction), ("val", split.val_fraction)):
        parts[part] = np.zeros(0, np.int64)
        if fraction > 0:
            share = fraction * count / max(len(left), 1)
            folds = min(max(2, round(1 / share)), len(np.unique(groups[left])))
            if folds < 2:
                raise CannotDivide(
                    f"{where} has too few groups ({len(set(groups.tolist()))}) to draw {part} images; "
                    f"add groups, or set {part}_fraction to 0"
                )
            cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=split.seed)
            cuts = cutter.split(left, _known_shares(labels[left], folds), groups[left])
            wanted = fraction * count
            rest, taken = min(cuts, key=lambda cut: abs(len(cut[1]) - wanted))
            parts[part], left = left[taken], left[rest]
    parts["train"] = left
    missing = listed(classes[i] for i in set(labels.tolist()) - set(labels[left].tolist()) if classes)
    if missing:
        raise CannotDivide(
            f"{where}: drawing whole groups left no training image of {missing}; add groups, or take another seed"
        )
    return parts


def _known_shares(labels: np.ndarray, folds: int) -> np.ndarray:
    """Put classes too rare to be in every fold together: scikit-learn refuses to stratify by them."""
    counts = Counter(labels.tolist())
    rare = min(counts)
    return np.array([label if counts[label] >= folds else rare for label in labels.tolist()])


def match_classes(found: Iterable[str], known: Sequence[str], where: str, multi_label: bool = False) -> tuple[str, ...]:
    """Return the known classes, by which images are labelled that a model with these is measured on.

    Raises:
        UnknownClasses: images have a class that is not known.
    """
    extra = sorted(set(found) - set(known))
    if extra:
        hint = nearest(extra[0], known, 1) if len(extra) == 1 else ""
        raise UnknownClasses(
            f"{where} has classes that the adapter does not know: {listed(extra)} (it knows {listed(known)}); leave "
            f"them out, or train on these with train --init-from{hint}",
            multi_label,
            listed(extra),
        )
    return tuple(known)


def left_out_note(labelled: np.ndarray) -> tuple[str, ...]:
    """Return what is told about rows without a label, of which `labelled` says bool [N] that they have one."""
    count = int((~labelled).sum())
    return (f"left out {count:,} image{'s' * (count > 1)} without any label",) if count else ()


def known_names(known: Sequence[str] | None) -> Callable[[str], str]:
    """Return a function that spells a class as it is known: where Unicode can write its accents in another way.

    True and false, which every tool writes in a case of its own, are known in any.
    """
    spelled = {unicodedata.normalize("NFC", name): name for name in known or ()}
    truths = {name.casefold(): name for name in known or () if name.casefold() in TRUTHS}

    def spell(name: str) -> str:
        return spelled.get(unicodedata.normalize("NFC", name)) or truths.get(name.casefold(), name)

    return spell


def check_classes(classes: Iterable[str], where: str) -> None:
    """Raise a DataError where two classes differ only by case or by how Unicode writes them, or are not text at all."""
    alike: dict[str, str] = {}
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:  # would fail only after training, when the names are stored
            shown = name.encode("utf-8", "backslashreplace").decode()
            raise DataError(f"{where} has a class whose name is not valid UTF-8, {shown}; rename it") from error
        other = alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            how = "upper and lower case" if other.casefold() == name.casefold() else "how an accent is stored"
            raise DataError(f"{where} has classes that differ only by {how}: {other}, {name}; merge or rename them")


def check_train(train: Iterable[Example], classes: Sequence[str], where: str) -> None:
    """Raise a DataError where a class has no training image."""
    counts = counts_by_class(train, len(classes))
    absent = listed(name for name, count in zip(classes, counts, strict=True) if not count)
    if absent:
        raise DataError(f"{where} has classes without a train image: {absent}; add or move images, or change the seed")


def fingerprint(names: Iterable[tuple[str, int]], labels: Iterable[str] = ()) -> str:
    """Return the SHA-256 of images' names with sizes in bytes, and of labels where file names do not hold them."""
    return fingerprint_in_order(sorted(names), labels)


def fingerprint_in_order(names: Iterable[tuple[str, int]], labels: Iterable[str] = ()) -> str:
    """Return the `fingerprint` of images that come sorted by name, without holding all of them."""
    digest = hashlib.sha256()
    for lines in ((f"{name}\0{size}\n" for name, size in names), (f"{label}\n" for label in labels)):
        while text := "".join(islice(lines, HASHED_AT_A_TIME)):
            digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return the names in order, with the number of those beyond the first few."""
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
