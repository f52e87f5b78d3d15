"""What the numbers of images say: rare classes, small parts, and groups that tell the class or sit in several parts."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from scipy.stats import binomtest

from visgraft.check.findings import (
    DatasetImage,
    FigureTable,
    Finding,
    class_counts,
    counted,
    of_task,
    readable,
    task_texts,
    varied,
)
from visgraft.data.dataset import PARTS, Dataset, listed
from visgraft.data.tasks import TaskLabels, output_slices

IMBALANCE = 5  # times as many images in the largest class as in the smallest
FEW_IN_CLASS = 10
FEW_IN_ALL = 50
TYPICAL_ACCURACY = 0.9  # at which the width of an interval is told
WIDE, VERY_WIDE = 0.10, 0.20  # of a 95 % interval
SHOWN_ROWS = 200


def class_tables(dataset: Dataset) -> dict[str, FigureTable]:
    """Return the images of each class in each part, the largest class first; with several tasks, a table for each."""
    parts = [class_counts(dataset, getattr(dataset, part)) for part in PARTS]
    totals = [sum(counts) for counts in zip(*parts, strict=True)]
    names = [task.name for task in dataset.tasks if task.kind != "number"]
    tables = {}
    for number, own in enumerate(class_outputs(dataset)):
        name = names[number] if names else ""
        rows = tuple(
            (readable(dataset.classes[i].removeprefix(f"{name}=" if name else "")), *(c[i] for c in parts), totals[i])
            for i in sorted(own, key=lambda i: -totals[i])
        )
        title = f"Classes of {readable(name)}" if name else "Classes"
        tables[f"classes {name}".strip()] = FigureTable(title, ("class", *PARTS, "all"), rows)
    return tables


def class_findings(dataset: Dataset) -> list[Finding]:
    """Find classes that are rare, alone or beside others of the same task, among the training images."""
    return [finding for own in class_outputs(dataset) for finding in _findings_among(dataset, own)]


def class_outputs(dataset: Dataset) -> list[range]:
    """Return the numbers of the outputs of each task that asks for classes; without tasks, of all outputs."""
    if not dataset.tasks:
        return [range(len(dataset.classes))]
    slices = zip(dataset.tasks, output_slices(dataset.tasks), strict=True)
    return [range(own.start, own.stop) for task, own in slices if task.kind != "number"]


def _findings_among(dataset: Dataset, own: range) -> list[Finding]:
    """Find rare classes among the outputs `own`."""
    counts = class_counts(dataset, dataset.train)[own.start : own.stop]
    names = [readable(dataset.classes[number]) for number in own]
    findings = []
    largest, smallest = counts.index(max(counts)), counts.index(min(counts))
    ratio = counts[largest] / max(counts[smallest], 1)
    if ratio >= IMBALANCE:
        findings.append(
            Finding(
                "imbalance",
                "warning",
                f"{names[largest]} has {ratio:.0f} times as many training images as {names[smallest]} "
                f"({counts[largest]:,} and {counts[smallest]:,})",
                "train with --class-weights balanced, and judge by macro-F1 rather than top-1, which a model that "
                "never answers the rare class can still make look good",
            )
        )
    few = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < FEW_IN_CLASS]
    if few:
        findings.append(
            Finding(
                "few_in_class",
                "warning",
                f"{counted(len(few), 'class')} with fewer than {FEW_IN_CLASS} training images: {listed(few)}",
                "add images of them, join them with a class alike, or expect them to be told poorly",
            )
        )
    for part in ("val", "test"):
        examples = getattr(dataset, part)
        there = class_counts(dataset, examples)[own.start : own.stop]
        absent = [name for name, count in zip(names, there, strict=True) if not count]
        if examples and absent:
            findings.append(
                Finding(
                    "class_not_measured",
                    "warning",
                    f"{counted(len(absent), 'class')} without {part} images: {listed(absent)}",
                    f"put images of them into {part}; until then its figures say nothing about them",
                )
            )
    return findings


def part_findings(dataset: Dataset) -> list[Finding]:
    """Find parts too small to train on or to measure with; the width of the interval is Wilson's."""
    findings = []
    if len(dataset.train) < FEW_IN_ALL:
        findings.append(
            Finding(
                "few_images",
                "warning",
                f"{counted(len(dataset.train), 'image')} to train on",
                f"collect at least {FEW_IN_ALL}, better some hundred; results on fewer depend on chance",
            )
        )
    purposes = {
        "val": "settings are chosen by it, or let train --folds 5 measure on all images in turn",
        "test": "it is the figure that counts",
    }
    for part, purpose in purposes.items():
        count = len(getattr(dataset, part))
        if not count:
            remedy = f"set {part}_fraction above 0" if dataset.layout == "flat" else f"mark images as {part}"
            findings.append(Finding("no_part", "note", f"no {part} images", f"{remedy}; {purpose}"))
            continue
        low, high = accuracy_interval(count)
        if high - low > WIDE:
            findings.append(
                Finding(
                    "small_part",
                    "warning" if high - low > VERY_WIDE else "note",
                    f"{counted(count, f'{part} image')}: an accuracy of about {TYPICAL_ACCURACY:.0%} would be known "
                    f"to lie between {low:.0%} and {high:.0%} only",
                    f"put more images into {part}, as {purpose}; do not tell apart models that differ by less",
                )
            )
    return findings


def accuracy_interval(count: int, accuracy: float = TYPICAL_ACCURACY) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy measured on so many images."""
    interval = binomtest(round(accuracy * count), count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def groups_of(pictures: Sequence[DatasetImage]) -> dict[str, list[DatasetImage]]:
    """Return the pictures of each group, the largest first; those without a group are left out."""
    groups: dict[str, list[DatasetImage]] = defaultdict(list)
    for picture in pictures:
        if picture.example.group is not None:
            groups[picture.example.group].append(picture)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def group_table(pictures: Sequence[DatasetImage]) -> FigureTable:
    """Return the images, parts and classes of each group, the largest group first."""
    rows = []
    for name, members in list(groups_of(pictures).items())[:SHOWN_ROWS]:
        classes = Counter(text for member in members for text in _classes(member))
        shown = ", ".join(f"{label} {count}" for label, count in classes.most_common(6))
        more = f" and {len(classes) - 6} more" if len(classes) > 6 else ""
        parts = ", ".join(part for part in PARTS if any(member.part == part for member in members))
        share = f"{len(members) / len(pictures):.1%}"
        rows.append((readable(name), len(members), share, parts, f"{shown}{more}"))
    return FigureTable("Groups", ("group", "images", "share", "parts", "classes"), tuple(rows))


def _classes(picture: DatasetImage) -> list[str]:
    """Return the class of a picture, or those of each task, without numbers."""
    labels = picture.example.label
    if not isinstance(labels, TaskLabels):
        return [picture.label]
    return task_texts(replace(labels, values=tuple(None if isinstance(v, float) else v for v in labels.values)))


def group_findings(everything: Sequence[DatasetImage], dataset: Dataset) -> list[Finding]:
    """Find groups in several parts, classes seen in one group only, and groups that hold one class only.

    With several tasks, the latter two are looked for in each that asks for one class.
    """
    leaks = _leak_findings(groups_of(everything))
    if not dataset.tasks:
        return leaks + _grouped_classes(groups_of(everything), dataset.classes)
    for number, task in enumerate(dataset.tasks):
        if task.kind == "one_class":
            leaks += _grouped_classes(groups_of(of_task(everything, number)), task.classes, f"{readable(task.name)}: ")
    return leaks


def _leak_findings(groups: Mapping[str, Sequence[DatasetImage]]) -> list[Finding]:
    """Find groups in several parts."""
    findings = []
    split = {
        name: varied(members, lambda member: member.part)
        for name, members in groups.items()
        if len({m.part for m in members}) > 1
    }
    if split:
        findings.append(
            Finding(
                "group_leak",
                "error",
                f"{counted(len(split), 'group')} with images in several parts: {listed(map(readable, split))}",
                "keep each group in one part; a model that knows the group from training is measured too well",
                tuple(split.values()),
            )
        )
    return findings


def _grouped_classes(
    groups: Mapping[str, Sequence[DatasetImage]], classes: Sequence[str], of: str = ""
) -> list[Finding]:
    """Find classes seen in one group only, and groups that hold one class only; `of` names the task."""
    if not groups:
        return []
    findings = []
    seen: dict[str, set[str]] = defaultdict(set)
    for name, members in groups.items():
        for member in members:
            seen[member.label].add(name)
    lonely = [f"{readable(label)} ({readable(next(iter(names)))})" for label, names in seen.items() if len(names) == 1]
    if lonely and len(groups) > 1:
        findings.append(
            Finding(
                "class_in_one_group",
                "warning",
                f"{counted(len(lonely), 'class')} seen in one group only: {listed(lonely)}",
                "add images of them from other groups; until then nobody can tell whether the class is learnt or "
                "the group",
            )
        )
    pure = [name for name, members in groups.items() if len({member.label for member in members}) == 1]
    if pure and len(classes) > 1:
        findings.append(
            Finding(
                "one_class_group",
                "note",
                f"{of}{len(pure):,} of {counted(len(groups), 'group')} hold one class only",
                "nothing is wrong where a group is one thing seen several times; where it is a camera, a place or a "
                "day, add images of other classes from it, or the model may learn the group instead",
                tuple((groups[name][0],) for name in pure),
            )
        )
    return findings
