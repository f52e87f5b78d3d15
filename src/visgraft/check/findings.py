"""What a check reports: findings with a severity, a remedy and the images concerned."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from visgraft.data.dataset import PARTS, Dataset, Example
from visgraft.data.examples import classes_of, counts_by_class
from visgraft.data.tasks import TaskLabels, written

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class DatasetImage:
    """An image of the data set, its part ("train", "val" or "test"), the names of its classes, and a detail on it."""

    example: Example
    part: str
    label: str
    detail: str = ""

    @property
    def path(self) -> str:
        """Its path as text; bytes that are no UTF-8 show as a replacement character."""
        return readable(str(self.example.path))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        facts = {"path": self.path, "part": self.part, "class": self.label}
        return (
            facts
            | ({"group": self.example.group} if self.example.group is not None else {})
            | ({"detail": self.detail} if self.detail else {})
        )


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing before training.

    `kind` names it for programs, `title` says it in words, `remedy` what to do. `sets` holds the images concerned: each
    set is one image, or images that belong together, such as copies of one another.
    """

    kind: str
    severity: Severity
    title: str
    remedy: str
    sets: tuple[tuple[DatasetImage, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        sets = [[picture.to_dict() for picture in together] for together in self.sets]
        return {"kind": self.kind, "severity": self.severity, "title": self.title, "remedy": self.remedy, "sets": sets}


@dataclass(frozen=True)
class FigureTable:
    """Figures of the data set as rows; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return one dict per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Report:
    """All findings on a data set, worst first, and tables of its figures by name ("classes", "sizes", ...)."""

    root: Path
    images: int
    findings: tuple[Finding, ...]
    tables: Mapping[str, FigureTable] = field(default_factory=dict)

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def closing(self) -> str:
        """The findings in one line."""
        errors, warnings = (counted(self.count(kind), kind) for kind in SEVERITIES[:2])
        return f"{errors}, {warnings} in {self.images:,} images"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "data": readable(str(self.root)),
            "images": self.images,
            **{f"{severity}s": self.count(severity) for severity in SEVERITIES},
            "findings": [finding.to_dict() for finding in self.findings],
            "tables": {name: table.to_dict() for name, table in self.tables.items()},
        }


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort by severity; findings of one severity keep their order."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def pictures(dataset: Dataset) -> list[DatasetImage]:
    """Return every image of the data set, in the order of `dataset.all`."""
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return [DatasetImage(example, part, label_text(dataset, example)) for part in PARTS for example in parts[part]]


def label_text(dataset: Dataset, example: Example) -> str:
    """Return the name of an image's class, or of all its classes; with several tasks, what is known for each."""
    if isinstance(example.label, TaskLabels):
        return ", ".join(task_texts(example.label)) or "no label"
    return ", ".join(dataset.classes[label] for label in classes_of(example.label)) or "no class"


def task_texts(labels: TaskLabels) -> list[str]:
    """Return what is known of an image as texts such as "colour=red", "tags=bar|dot" and "size=3.5 mm"."""
    told = []
    for task, value in zip(labels.tasks, labels.values, strict=True):
        if isinstance(value, tuple):
            told.append(f"{task.name}={'|'.join(task.classes[index] for index in value) or 'none'}")
        elif isinstance(value, int):
            told.append(f"{task.name}={task.classes[value]}")
        elif value is not None:
            told.append(f"{task.name}={written(value, task.std, 6)}{f' {task.unit}' if task.unit else ''}")
    return told


def of_task(everything: Sequence[DatasetImage], number: int) -> list[DatasetImage]:
    """Return the pictures whose class of the task with this number is known, each with that class as its label."""
    found = []
    for picture in everything:
        labels = picture.example.label
        value = labels.values[number] if isinstance(labels, TaskLabels) else None
        if isinstance(labels, TaskLabels) and isinstance(value, int):
            found.append(replace(picture, label=f"{labels.tasks[number].name}={labels.tasks[number].classes[value]}"))
    return found


def class_counts(dataset: Dataset, examples: Iterable[Example]) -> list[int]:
    """Return how many of the images have each class, in the order of `dataset.classes`."""
    return counts_by_class(examples, len(dataset.classes))


def varied(members: Sequence[DatasetImage], fact: Callable[[DatasetImage], str]) -> tuple[DatasetImage, ...]:
    """Return the pictures with the first of each part, class or other fact ahead, so that the first few tell most."""
    first = set({fact(member): place for place, member in reversed(list(enumerate(members)))}.values())
    order = sorted(range(len(members)), key=lambda place: place not in first)
    return tuple(members[place] for place in order)


def counted(number: int, noun: str) -> str:
    """Return the number with its noun in the singular or the plural."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def readable(text: str) -> str:
    """Return text that can be printed: file names may hold bytes that are no UTF-8."""
    return os.fsencode(text).decode("utf-8", "replace")
