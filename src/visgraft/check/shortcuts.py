"""Shortcuts: can the class be told from facts that should not tell it, such as the size of the file?

For each family of facts a small decision tree predicts the class, cross-validated. Where its balanced accuracy is well
above chance, a permutation test tells whether that may be luck: the labels are shuffled and the same is done again,
tree and folds included.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, permutation_test_score
from sklearn.tree import DecisionTreeClassifier

from visgraft.check.facts import Facts, OnStage
from visgraft.check.findings import DatasetImage, FigureTable, Finding, Severity
from visgraft.data.dataset import PARTS
from visgraft.data.folders import SPLIT_NAMES

FOLDS = 5
LEAST_PER_CLASS = 10  # independent images of a class, for two in every fold
MOST_IMAGES = 3000
PERMUTATIONS = 100
# A normal distribution exceeds 3.5 standard deviations once in 4,300 times: six families give one false alarm in 700
# data sets. Counting exceedances would need thousands of permutations for that.
SIGNIFICANT = 3.5
SHOWN = 3  # images of each class beside a finding
TABLE = "Shortcuts (luck: balanced accuracy on shuffled labels)"
COLUMNS = ("facts", "balanced accuracy", "chance", "deviations above luck", "found")
LEAST_SKILL = 0.25  # share of the way from chance to always right that is worth a word


@dataclass(frozen=True)
class Probe:
    """How well one family of facts predicts the class.

    `balanced_accuracy` is cross-validated, `chance` is one over the number of classes. `deviations` is by how many
    standard deviations it exceeds the mean of shuffled labels, or None where it was too low to be worth trying.
    `images` counts those looked at.
    """

    family: str
    balanced_accuracy: float
    chance: float
    deviations: float | None
    images: int
    found: bool


class _Family(NamedTuple):
    """Facts probed together, and what to say where they predict the class."""

    name: str
    severity: Severity
    values: Callable[[Sequence[DatasetImage], Sequence[Facts]], NDArray[np.float64]]
    describe: Callable[[Facts], str]
    remedy: str


def _sizes(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> NDArray[np.float64]:
    return np.array([(f.width, f.height, f.width / f.height) for f in facts], dtype=np.float64)


def _bytes(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> NDArray[np.float64]:
    return np.array([(f.size, f.size / (f.width * f.height)) for f in facts], dtype=np.float64)


def _types(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> NDArray[np.float64]:
    formats, modes = _codes([f.format for f in facts]), _codes([f.mode for f in facts])
    rest = [(f.alpha, f.turned, f.frames > 1, *f.quality) for f in facts]
    return np.column_stack([formats, modes, np.array(rest, dtype=np.float64)])


def _colours(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> NDArray[np.float64]:
    return np.array([f.colour for f in facts], dtype=np.float64)


def _names(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> NDArray[np.float64]:
    """First and last number in the name, digits, and the name's letters unless they say the class."""
    rows, words = [], []
    for picture in pictures:
        stem = picture.example.path.stem
        numbers = [float(number) for number in re.findall(r"\d{1,15}", stem)] or [-1.0]
        rows.append((numbers[0], numbers[-1], sum(letter.isdigit() for letter in stem)))
        word = re.sub(r"[\W\d_]+", "", stem).casefold()
        words.append("" if _says(word, picture.label) else word)
    return np.column_stack([np.array(rows, dtype=np.float64), _codes(words)])


def _folders(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> NDArray[np.float64]:
    """The folder of origin, without those named after the class or the part."""
    known = {*SPLIT_NAMES, *PARTS}
    parents = [str(picture.example.path.parent) for picture in pictures]
    shared = len(PurePath(os.path.commonpath(parents)).parts)
    origins = []
    for parent, picture in zip(parents, pictures, strict=True):
        folders = PurePath(parent).parts[shared:]
        origins.append("/".join(f for f in folders if f.casefold() not in known and not _says(f, picture.label)))
    return _codes(origins)[:, None]


def _codes(texts: Sequence[str]) -> NDArray[np.float64]:
    return np.unique(np.array(texts, dtype=object), return_inverse=True)[1].astype(np.float64)


def _says(word: str, label: str) -> bool:
    """Whether a word is the class's name, or one of both holds the other."""
    word, name = (re.sub(r"[\W_]+", "", text).casefold() for text in (word, label))
    return word == name or (min(len(word), len(name)) >= 3 and (word in name or name in word))


_LOOK = "look at the images of each class side by side; "
FAMILIES = (
    _Family(
        "image size",
        "warning",
        _sizes,
        lambda f: f"{f.width} × {f.height}",
        "bring all images to one size before training, or crop them alike; stretching and blur give the class away",
    ),
    _Family(
        "file type",
        "warning",
        _types,
        lambda f: f"{f.format} {f.mode}" + (f", quantisation {f.quality[0]:.0f}" if f.quality[0] else ""),
        "save all images the same way (format, colour mode, JPEG quality); traces of compression give the class away",
    ),
    _Family(
        "file size",
        "note",
        _bytes,
        lambda f: f"{f.size / 1000:.1f} KB",
        f"{_LOOK}if detail is what tells the classes, fine; if it is sharpness, noise or compression, save all alike",
    ),
    _Family(
        "mean colour",
        "note",
        _colours,
        lambda f: f"brightness {sum(f.colour[:3]) / 3:.0f}",
        f"{_LOOK}fine where colour belongs to the class, a shortcut where light, camera or background differ",
    ),
    _Family(
        "file name",
        "note",
        _names,
        lambda f: "",
        "the model never sees names; but if they tell when or by which camera images were taken, the classes were "
        "taken apart, and the model may learn that",
    ),
    _Family(
        "folder of origin",
        "note",
        _folders,
        lambda f: "",
        "if folders are cameras, places or days, name them as groups (a column of --csv), and add the classes missing",
    ),
)


def probe_shortcuts(
    pictures: Sequence[DatasetImage],
    facts: Sequence[Facts],
    units: Sequence[int],
    *,
    seed: int = 0,
    on_progress: OnStage | None = None,
) -> list[Probe]:
    """Try every family of facts that differs at all; nothing is returned where images are too few to tell.

    `facts` are those of `pictures`; images of one unit (one group, copies of one picture) are not independent, so
    that one image of each unit and class is taken, and of these at most `MOST_IMAGES`.
    """
    chosen = _independent([picture.label for picture in pictures], units, seed)
    labels = _codes([pictures[i].label for i in chosen]).astype(np.int64)
    if len(set(labels.tolist())) < 2:
        return []
    pictures, facts = [pictures[i] for i in chosen], [facts[i] for i in chosen]
    probes = []
    for done, family in enumerate(FAMILIES):
        if on_progress:
            on_progress("looking for shortcuts", done, len(FAMILIES))
        values = family.values(pictures, facts)
        if (values != values[0]).any():
            probes.append(_probe(family.name, values, labels, seed))
    if on_progress:
        on_progress("looking for shortcuts", len(FAMILIES), len(FAMILIES))
    return probes


def _independent(labels: Sequence[str], units: Sequence[int], seed: int) -> list[int]:
    """Draw one image of each unit and class, of classes that then have enough, and of all these not too many."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    chosen = sorted({(labels[i], units[i]): i for i in order}.values())
    counts = Counter(labels[i] for i in chosen)
    chosen = [i for i in chosen if counts[labels[i]] >= LEAST_PER_CLASS]
    if len(chosen) <= MOST_IMAGES:
        return chosen
    # Not below the least per class, so that rare classes stay in; frequent ones share what is left.
    share = MOST_IMAGES / len(chosen)
    places = set(chosen)
    taken: Counter[str] = Counter()
    kept = []
    for i in (i for i in order if i in places):
        if taken[labels[i]] < max(LEAST_PER_CLASS, share * counts[labels[i]]):
            taken[labels[i]] += 1
            kept.append(i)
    return sorted(kept)


def _probe(family: str, values: NDArray[np.float64], labels: NDArray[np.int64], seed: int) -> Probe:
    chance = 1 / len(set(labels.tolist()))
    # Leaves enough for every class, but of three images at least, so that single files are not learnt by heart.
    tree = DecisionTreeClassifier(
        max_leaf_nodes=max(16, round(2 / chance)), min_samples_leaf=3, class_weight="balanced", random_state=seed
    )
    test: dict[str, Any] = {
        "cv": StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
        "scoring": "balanced_accuracy",
        "random_state": seed,
    }
    accuracy = float(permutation_test_score(tree, values, labels, n_permutations=1, **test)[0])
    deviations = None
    if accuracy - chance >= LEAST_SKILL * (1 - chance):
        shuffled = permutation_test_score(tree, values, labels, n_permutations=PERMUTATIONS, **test)[1]
        deviations = round(float((accuracy - shuffled.mean()) / max(shuffled.std(), 1e-6)), 1)
    found = deviations is not None and deviations >= SIGNIFICANT
    return Probe(family, accuracy, chance, deviations, len(labels), found)


def shortcut_findings(
    probes: Sequence[Probe], pictures: Sequence[DatasetImage], facts: Sequence[Facts]
) -> list[Finding]:
    """Turn what the probes found into findings, with some images of every class."""
    by_class: dict[str, list[int]] = {}
    for place, picture in enumerate(pictures):
        by_class.setdefault(picture.label, []).append(place)
    families = {family.name: family for family in FAMILIES}
    findings = []
    for probe in (probe for probe in probes if probe.found):
        family = families[probe.family]
        shown = tuple(
            tuple(replace(pictures[i], detail=family.describe(facts[i])) for i in _spread(places))
            for places in by_class.values()
        )
        title = (
            f"{family.name} alone predicts the class with balanced accuracy {probe.balanced_accuracy:.2f} "
            f"(chance {probe.chance:.2f})"
        )
        findings.append(Finding("shortcut", family.severity, title, family.remedy, shown))
    return findings


def _spread(places: Sequence[int]) -> list[int]:
    """Take a few places from all over, since the first files of a class are often special."""
    step = len(places) / SHOWN
    return list(dict.fromkeys(places[int((i + 0.5) * step)] for i in range(SHOWN)))


def shortcut_table(probes: Sequence[Probe]) -> FigureTable:
    """Return what each family of facts reached."""
    rows = [
        (
            probe.family,
            round(probe.balanced_accuracy, 2),
            round(probe.chance, 2),
            probe.deviations,
            "yes" if probe.found else "no",
        )
        for probe in probes
    ]
    return FigureTable(TABLE, COLUMNS, tuple(rows))
