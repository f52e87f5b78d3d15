"""What the files and pictures are like: sizes, shapes, formats and colours that deserve a look."""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from visgraft.check.facts import Facts
from visgraft.check.findings import DatasetImage, FigureTable, Finding, Severity, counted
from visgraft.data.dataset import Example

TYPICAL_INPUT = 224  # pixels, the side of what most backbones take
SMALL = TYPICAL_INPUT // 2
LONGISH = 1.3  # longer to shorter side, from which on a square loses or distorts what can matter
BLANK = 2.0  # standard deviation of brightness, of 255
MOST_PADDED = 30  # longer ones would hardly be seen, padded
LOOKED_AT = 200  # images whose headers a warning before training rests on
MANY = 0.1  # of these, from which on it warns
MIXED_SIZES = 3  # times as long a shorter side: the 95th of 100 images, beside the 5th


def cut_off(ratio: float) -> float:
    """Return which share of a picture of this ratio of its sides lies outside the square in its middle."""
    return 1 - 1 / max(ratio, 1 / ratio)


def shape_warning(examples: Sequence[Example], crop_mode: str) -> list[str]:
    """Return one line where making pictures square loses part of many, judged by the headers of some of them.

    Args:
        examples: the images that are trained on; evenly spaced ones are looked at, without decoding them.
        crop_mode: timm's: `center` cuts, `squash` distorts, and `border` does neither.
    """
    if crop_mode == "border":
        return []
    ratios = []
    for example in examples[:: max(1, len(examples) // LOOKED_AT)]:
        with contextlib.suppress(Exception):  # what does not open is named when it is decoded
            source = example.path if example.content is None else io.BytesIO(example.content())
            with Image.open(source) as picture:  # reads the header only
                ratios.append(max(picture.size) / min(picture.size))
    long = [ratio for ratio in ratios if LONGISH <= ratio <= MOST_PADDED]
    if len(long) < MANY * len(ratios) or not long:
        return []
    middle = float(np.median(long))
    loses = f"cuts off {cut_off(middle):.0%} of" if crop_mode != "squash" else "distorts"
    return [
        f"{len(long) / len(ratios):.0%} of the pictures are at least {LONGISH} times as long as wide; making them "
        f"square {loses} one of {middle:.2g} to 1; train with --crop-mode border, which shows all of it, padded"
    ]


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
        "they are enlarged and show no more for it; train with a smaller --image-size to be faster",
    ),
    _Look(
        "long",
        "warning",
        lambda f: max(f.width, f.height) >= LONGISH * min(f.width, f.height) and f"{f.width} × {f.height}",
        f"at least {LONGISH} times as long as wide",
        f"most models are shown the square in the middle, so {cut_off(LONGISH):.0%} or more of each is cut off; train "
        "with --crop-mode border, which shows all of it, padded",
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
