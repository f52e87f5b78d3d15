"""What the files and pictures are like: sizes, shapes, formats and colours that deserve a look."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from visgraft.check.facts import Facts
from visgraft.check.findings import DatasetImage, FigureTable, Finding, Severity, counted

TYPICAL_INPUT = 224  # pixels, the side of what most backbones take
SMALL = TYPICAL_INPUT // 2
LONGISH = 2.5  # longer to shorter side
BLANK = 2.0  # standard deviation of brightness, of 255
MIXED_SIZES = 3  # times as long a shorter side: the 95th of 100 images, beside the 5th


def size_table(facts: Sequence[Facts]) -> FigureTable:
    """Return the least, median and largest of width, height, shape and file size."""
    kinds: dict[str, list[float]] = {
        "width (pixels)": [one.width for one in facts],
        "height (pixels)": [one.height for one in facts],
        "width ÷ height": [round(one.width / one.height, 2) for one in facts],
        "file (KB)": [round(one.size / 1000, 1) for one in facts],
    }
    rows = []
    for name, values in kinds.items():
        whole = all(isinstance(value, int) for value in values)
        median = float(np.median(values))
        rows.append((name, min(values), int(median) if whole else round(median, 2), max(values)))
    return FigureTable("Sizes", ("", "smallest", "median", "largest"), tuple(rows))


def kind_table(facts: Sequence[Facts]) -> FigureTable:
    """Return how many images there are of each format and colour mode."""
    kinds = Counter((one.format, one.mode, "grey" if one.grey else "colour") for one in facts)
    rows = tuple((*kind, count) for kind, count in kinds.most_common())
    return FigureTable("Formats", ("format", "mode", "shows", "images"), rows)


class _Look(NamedTuple):
    """One question to every image: `test` returns a detail where the answer is yes."""

    kind: str
    severity: Severity
    test: Callable[[Facts], str | bool]
    what: str
    remedy: str


LOOKS = (
    _Look(
        "blank",
        "warning",
        lambda f: f.colour[3] < BLANK and "one colour",
        "of a single colour",
        "look at them; cameras that fail and exports that break leave such pictures",
    ),
    _Look(
        "small",
        "note",
        lambda f: min(f.width, f.height) < SMALL and f"{f.width} × {f.height}",
        f"with a side under {SMALL} pixels, half of what most backbones take ({TYPICAL_INPUT})",
        "they are enlarged and show no more for it; a smaller --image-size trains faster",
    ),
    _Look(
        "long",
        "note",
        lambda f: max(f.width, f.height) > LONGISH * min(f.width, f.height) and f"{f.width} × {f.height}",
        f"more than {LONGISH} times as long as wide",
        "their ends are cut off when they are made square; cut them into pieces if the ends matter",
    ),
    _Look(
        "turned",
        "note",
        lambda f: f.turned and "turned by EXIF",
        "that EXIF data says to turn",
        "nothing to do: they are turned; make sure that other programs do the same",
    ),
    _Look(
        "alpha",
        "note",
        lambda f: f.alpha and f.mode,
        "with transparent places",
        "these are painted white; see that this makes no difference between classes",
    ),
    _Look(
        "frames",
        "note",
        lambda f: f.frames > 1 and f"{f.frames} frames",
        "of several frames or pages",
        "only the first is used; save the others as files of their own if they matter",
    ),
    _Look(
        "deep",
        "note",
        lambda f: f.deep and f.mode,
        "with more than 8 bits per channel",
        "they are reduced to 8 bits over the whole range of the format; if they look black, stretch them first",
    ),
)


def look_findings(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> list[Finding]:
    """Find pictures of one colour, very small or long ones, and kinds of files that are turned into 8-bit RGB.

    `facts` are those of `pictures`, all readable.
    """
    if not facts:
        return []
    findings = []
    for kind, severity, test, what, remedy in LOOKS:
        told = [(picture, test(one)) for picture, one in zip(pictures, facts, strict=True)]
        found = tuple((_detailed(picture, str(detail)),) for picture, detail in told if detail)
        if found:
            title = f"{counted(len(found), 'image')} {what}"
            findings.append(Finding(kind, severity, title, remedy, found))
    return findings + _mixtures(pictures, facts)


def _mixtures(pictures: Sequence[DatasetImage], facts: Sequence[Facts]) -> list[Finding]:
    """Find grey pictures among colour ones, and large ones among small ones."""
    findings = []
    grey = [(picture,) for picture, one in zip(pictures, facts, strict=True) if one.grey]
    if 0 < len(grey) < len(facts):
        rarer = grey
        if 2 * len(grey) > len(facts):
            rarer = [(picture,) for picture, one in zip(pictures, facts, strict=True) if not one.grey]
        title = f"{len(grey):,} grey and {len(facts) - len(grey):,} colour pictures"
        remedy = "nothing is wrong where both come in every class; otherwise turn all of them grey"
        findings.append(Finding("grey_and_colour", "note", title, remedy, tuple(rarer)))
    sides = np.array([min(one.width, one.height) for one in facts])
    low, high = (int(side) for side in np.percentile(sides, [5, 95]))
    if high >= MIXED_SIZES * low:
        title = f"sizes differ: 5 % of the pictures have a side under {low} pixels, 5 % none under {high}"
        remedy = "all are brought to one size, so that the small ones look blurred; see that this is so in every class"
        order = np.argsort(sides, kind="stable")
        ends = [*order[:4].tolist(), *order[-4:].tolist()]
        shown = tuple((_detailed(pictures[i], f"{facts[i].width} × {facts[i].height}"),) for i in dict.fromkeys(ends))
        findings.append(Finding("mixed_sizes", "note", title, remedy, shown))
    return findings


def _detailed(picture: DatasetImage, detail: str) -> DatasetImage:
    return replace(picture, detail=detail)
