"""The report as one page that needs nothing else: no scripts, no fonts, its pictures inside."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from visgraft.check.findings import DatasetImage, Finding, Report, readable
from visgraft.data.decode import open_image
from visgraft.errors import DataError, VisgraftError
from visgraft.files import new_file
from visgraft.pictures import photograph

THUMBNAIL = 160  # pixels
SETS_PER_FINDING = 8
SINGLES_PER_FINDING = 16
PICTURES_PER_SET = 4
MOST_PICTURES = 300  # of about 6 KB each, so that the page stays under a few MB
ROWS = 60
MOST_LINES = 1000


class Card(NamedTuple):
    """One picture on the page; `uri` is None where it cannot be shown."""

    uri: str | None
    path: str
    caption: str


class FindingSection(NamedTuple):
    """A finding on the page, with as many of its sets as are shown and the number of those that are not.

    `lines` stands for pictures that cannot be shown.
    """

    finding: Finding
    sets: list[list[Card]]
    lines: list[str]
    left: int
    pairs: bool


def write_page(report: Report, path: Path) -> Path:
    """Write the report as HTML.

    Raises:
        VisgraftError: the page cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("visgraft.check", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections, budget = [], MOST_PICTURES
    for finding in report.findings:
        section = _section(finding, report.root, budget)
        budget -= sum(len(cards) for cards in section.sets)
        sections.append(section)
    text = environment.get_template("page.html.j2").render(
        report=report, root=readable(str(report.root)), sections=sections, rows=ROWS
    )
    try:
        with new_file(path) as file:
            file.write(text.encode("utf-8", "replace"))
    except OSError as error:
        raise VisgraftError(f"{path} cannot be written ({error.strerror}); choose another --html") from error
    return path


def _section(finding: Finding, root: Path, budget: int) -> FindingSection:
    if finding.kind == "unreadable":
        lines = [f"{below(one, root)}: {one.detail}" for together in finding.sets for one in together]
        return FindingSection(finding, [], lines[:MOST_LINES], max(0, len(lines) - MOST_LINES), False)
    pairs = any(len(together) > 1 for together in finding.sets)
    shown: list[list[Card]] = []
    for together in finding.sets[: SETS_PER_FINDING if pairs else SINGLES_PER_FINDING]:
        if budget < len(together[:PICTURES_PER_SET]):
            break
        shown.append([_card(picture, root) for picture in together[:PICTURES_PER_SET]])
        budget -= len(shown[-1])
    return FindingSection(finding, shown, [], len(finding.sets) - len(shown), pairs)


def _card(picture: DatasetImage, root: Path) -> Card:
    path, caption = below(picture, root), " · ".join(filter(None, (picture.part, picture.label, picture.detail)))
    if picture.example.group is not None:
        caption += f" · group {picture.example.group}"
    try:
        pixels = np.asarray(open_image(picture.example), dtype=np.uint8)
    except (DataError, OSError):  # the page is about such files too
        return Card(None, path, readable(caption))
    return Card(photograph(pixels, path, THUMBNAIL).light, path, readable(caption))


def below(picture: DatasetImage, root: Path) -> str:
    """Return a picture's path, from the data's folder where it lies below."""
    folder = root if root.is_dir() else root.parent
    path = picture.example.path
    return readable(str(path.relative_to(folder) if path.is_relative_to(folder) else path))
