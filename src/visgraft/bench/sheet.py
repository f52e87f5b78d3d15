"""A table of texts, in Markdown or row by row, and how numbers are written in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: its head, the text of each row, and the numbers behind them where the largest is the best."""

    head: str
    texts: tuple[str, ...]
    values: tuple[float | None, ...] = ()

    @property
    def best(self) -> tuple[bool, ...]:
        """Which rows hold the largest number; none where there are not two to compare."""
        known = [value for value in self.values if value is not None]
        top = max(known) if len(known) > 1 else None
        return tuple(top is not None and value == top for value in self.values) or (False,) * len(self.texts)


@dataclass(frozen=True)
class Sheet:
    """A table of texts: what it shows, how its numbers came about, its columns, and notes on what is missing."""

    title: str
    caption: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()

    @property
    def heads(self) -> list[str]:
        """The columns' heads."""
        return [column.head for column in self.columns]

    @property
    def rows(self) -> list[list[str]]:
        """The texts row by row."""
        return [list(row) for row in zip(*(column.texts for column in self.columns), strict=True)]

    def markdown(self) -> str:
        """Return the table in Markdown, the best of a column in bold; without columns, its caption alone."""
        if not self.columns:
            return f"### {self.title}\n\n{self.caption}\n"
        bold = list(zip(*(column.best for column in self.columns), strict=True))
        lines = [
            [f"**{text}**" if best else text for text, best in zip(row, marks, strict=True)]
            for row, marks in zip(self.rows, bold, strict=True)
        ]
        rule = [":--", *["--:"] * (len(self.columns) - 1)]
        body = [_line(self.heads), _line(rule), *map(_line, lines)]
        notes = ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join([f"### {self.title}", self.caption, "\n".join(body), *notes]) + "\n"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in percent, "–" for None."""
    return NONE if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    """Return a difference of shares in points with its sign, "–" for None."""
    return NONE if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def cell(seeds: Mapping[int, float] | None) -> str:
    """Return the mean of the seeds in percent, with their standard deviation where there are several."""
    values = list((seeds or {}).values())
    if not values:
        return NONE
    spread = f" ± {percent(stdev(values))}" if len(values) > 1 else ""
    return percent(sum(values) / len(values)) + spread
