"""What the labels of several tasks say: which are known, what the numbers are like, and which task tells another."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from visgraft.check.findings import DatasetImage, FigureTable, Finding, counted, readable
from visgraft.data.dataset import PARTS, Dataset, listed
from visgraft.data.examples import Example, labels_of
from visgraft.data.tasks import LabelTask, written

Value = int | tuple[int, ...] | float | None

BINS = 12  # of a histogram
BAR = 24  # characters of the longest bar
FEW_LABELS = 50  # to train on
FENCE = 3.0  # interquartile ranges from the quartiles, beyond which Tukey calls a number far out
FAR = 10.0  # interquartile ranges from the median, beyond which any number is named
MARKS = {99, 999, 9999, 99999, 999999, -9, -99, -999, -9999, -99999}  # that stand for "not known" in many tables
BELOW = {-1, -9, -99, -999}  # the same where no other number is below 0
SAME = 0.9  # share of one number, from which on there is little to learn
LEAST_BOTH = 20  # images with both labels, from which on one task can be said to tell another
ALIKE = 0.9999  # correlation of two numbers that say the same


def values_of(examples: Sequence[Example], number: int) -> list[Value]:
    """Return the label of each example for the task with this number, None where it is not known."""
    labels = labels_of(examples)
    each = [value.values[number] for value in labels.values]
    return [each[code] for code in labels.codes.tolist()]


def numbers_of(examples: Sequence[Example], number: int) -> NDArray[np.float64]:
    """Return the known numbers of a task."""
    return np.array([value for value in values_of(examples, number) if isinstance(value, float)], np.float64)


def task_tables(dataset: Dataset) -> dict[str, FigureTable]:
    """Return the share of known labels of each task, a summary of the numbers, and a histogram of each."""
    rows = list[tuple[str | int | float | None, ...]]()
    for number, task in enumerate(dataset.tasks):
        counts = [sum(v is not None for v in values_of(getattr(dataset, part), number)) for part in PARTS]
        unknown = 1 - sum(counts) / max(len(dataset.all), 1)
        asks = str(task).removeprefix(f"{task.name}: ")
        rows.append((readable(task.name), readable(asks), *counts, sum(counts), f"{unknown:.1%}"))
    tables = {"tasks": FigureTable("Tasks", ("task", "asks for", *PARTS, "all", "unknown"), tuple(rows))}
    numbers = [(n, task) for n, task in enumerate(dataset.tasks) if task.kind == "number"]
    if numbers:
        columns = ("task", "smallest", "5 %", "median", "95 %", "largest", "mean", "deviation")
        summaries = tuple(_summary(task, numbers_of(dataset.all, n)) for n, task in numbers)
        tables["numbers"] = FigureTable("Numbers", columns, summaries)
    return tables | {f"numbers {task.name}": _histogram(task, numbers_of(dataset.all, n)) for n, task in numbers}


def _summary(task: LabelTask, found: NDArray[np.float64]) -> tuple[str | float, ...]:
    points = (*np.quantile(found, (0, 0.05, 0.5, 0.95, 1)), found.mean(), found.std())
    return (_named(task), *(_rounded(point, float(found.std())) for point in points))


def _named(task: LabelTask) -> str:
    return readable(f"{task.name} ({task.unit})" if task.unit else task.name)


def _rounded(value: float, spread: float) -> float:
    return float(written(value, spread))


def _histogram(task: LabelTask, found: NDArray[np.float64]) -> FigureTable:
    strange = list(far_out(found))
    away = np.isin(found, strange)
    counts, edges = np.histogram(found[~away], BINS)
    spread = float(found[~away].std())
    rows = tuple(
        (f"{low} to {high}", int(count), "█" * round(BAR * int(count) / max(int(counts.max()), 1)))
        for (low, high), count in zip(pairwise(written(edge, spread) for edge in edges.tolist()), counts, strict=True)
    )
    without = f", without {int(away.sum())} far from the others" if strange else ""
    return FigureTable(f"Numbers of {_named(task)}{without}", ("number", "images", "of the most"), rows)


def label_findings(dataset: Dataset) -> list[Finding]:
    """Find tasks with few known labels, or with none in a part."""
    findings = []
    for number, task in enumerate(dataset.tasks):
        known = {
            part: sum(v is not None for v in values_of(getattr(dataset, part), number))
            for part in PARTS
            if len(getattr(dataset, part))
        }
        if known["train"] < FEW_LABELS <= len(dataset.train):
            title = f"{readable(task.name)}: {counted(known['train'], 'training image')} with this label"
            remedy = f"label at least {FEW_LABELS}, better some hundred; results on fewer depend on chance"
            findings.append(Finding("few_labels", "warning", title, remedy))
        for part in (part for part in ("val", "test") if known.get(part) == 0):
            title = f"{readable(task.name)}: no {part} image has this label"
            remedy = f"label some of {part}; until then its figures say nothing about this task"
            findings.append(Finding("task_not_measured", "warning", title, remedy))
    return findings


def number_findings(everything: Sequence[DatasetImage], tasks: Sequence[LabelTask]) -> list[Finding]:
    """Find numbers far outside the others, marks of unknown values among them, and tasks of nearly one number."""
    findings = []
    for number, task in enumerate(tasks):
        if task.kind != "number":
            continue
        values = values_of([picture.example for picture in everything], number)
        found = np.array([value for value in values if isinstance(value, float)], np.float64)
        strange = far_out(found)
        if strange:
            rest = found[~np.isin(found, list(strange))]
            shown = tuple((picture,) for picture, value in zip(everything, values, strict=True) if value in strange)
            spread = float(rest.std())
            least, most = written(rest.min(), spread, 6), written(rest.max(), spread, 6)
            told = listed(f"{written(value, spread, 6)} ({count})" for value, count in strange.items())
            title = (
                f"{readable(task.name)}: {counted(len(shown), 'number')} far from the others, which lie between "
                f"{least} and {most}: {told}"
            )
            remedy = (
                "correct them, or leave the cell blank where the number is not known; such numbers stretch the scale "
                "that all others are learned on"
            )
            findings.append(Finding("far_number", "warning", title, remedy, shown))
        common, often = Counter(found.tolist()).most_common(1)[0]
        if often >= SAME * len(found):
            title = f"{readable(task.name)} is {written(common, task.std, 6)} in {often:,} of {len(found):,} images"
            remedy = "there is little to learn from the others; add images with other numbers, or ask for a class"
            findings.append(Finding("one_number", "warning", title, remedy))
    return findings


def far_out(found: NDArray[np.float64]) -> dict[float, int]:
    """Return numbers that do not belong to the others, and how often each comes.

    Beyond Tukey's outer fences (three interquartile ranges from the quartiles), these are numbers that stand for
    unknown values in many tables, such as 999, and all further than ten interquartile ranges from the median. Where no
    other number is below 0, -1 and the like are among them.
    """
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    spread = high - low
    strange = dict[float, int]()
    negative = {value for value in found.tolist() if value < 0}
    for value, count in Counter(found.tolist()).items():
        beyond = spread > 0 and (value < low - FENCE * spread or value > high + FENCE * spread)
        named = value in MARKS or abs(value - middle) > FAR * spread
        mark = value in BELOW and negative <= BELOW and middle > 0
        if (beyond and named) or mark:
            strange[value] = count
    return dict(sorted(strange.items()))


def told_findings(dataset: Dataset) -> list[Finding]:
    """Find pairs of tasks of which one tells the other exactly."""
    columns = [values_of(dataset.all, number) for number in range(len(dataset.tasks))]
    findings = []
    for one, other in combinations(range(len(dataset.tasks)), 2):
        both = [(a, b) for a, b in zip(columns[one], columns[other], strict=True) if a is not None and b is not None]
        if len(both) < LEAST_BOTH:
            continue
        names = [readable(dataset.tasks[number].name) for number in (one, other)]
        ways = [_tells(both), _tells([(b, a) for a, b in both])]
        if all(ways) or _same_numbers(both):
            said = f"{names[0]} and {names[1]} tell each other exactly"
        elif any(ways):
            said = f"{names[ways.index(True)]} tells {names[ways.index(False)]} exactly"
        else:
            continue
        remedy = (
            "nothing is wrong where one follows from the other; otherwise add images in which they come apart, or the "
            "model may answer one by what it sees of the other"
        )
        findings.append(Finding("task_told", "note", f"{said}, on all {len(both):,} images with both", remedy))
    return findings


def _tells(both: Sequence[tuple[Value, Value]]) -> bool:
    """Whether the first value of all pairs decides the second, which varies, and comes twice or more on average."""
    firsts = {first for first, _ in both}
    return len({second for _, second in both}) > 1 and 2 * len(firsts) <= len(both) and len(set(both)) == len(firsts)


def _same_numbers(both: Sequence[tuple[Value, Value]]) -> bool:
    if not all(isinstance(value, float) for pair in both for value in pair):
        return False
    first, second = np.array(both, np.float64).T
    return bool(first.std() > 0 and second.std() > 0 and abs(np.corrcoef(first, second)[0, 1]) > ALIKE)
