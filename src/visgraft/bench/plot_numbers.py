"""The numbers that the pictures of a benchmark show. Accuracies are shares between 0 and 1."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from visgraft.bench.costs import costs
from visgraft.bench.statistics import Mean, RecipeRow, Table, mean_of_groups, mean_of_tasks

if TYPE_CHECKING:
    from visgraft.bench.trial import Result

Means = dict[str, dict[str, Mean]]
"""Means by the row's label and by what they are over."""


class Point(NamedTuple):
    """A method's mean over all tasks, and what it costs."""

    label: str
    cost: float
    mean: Mean


class Overlap(NamedTuple):
    """Which share of a task's chosen channels another task chose too [tasks, tasks], and what chance would give."""

    tasks: tuple[str, ...]
    shares: np.ndarray
    chance: float | None


def incomplete(table: Table) -> tuple[str, ...]:
    """Return the labels of rows that lack a task, and so have no mean to show."""
    return tuple(row.label for row in table.rows if row.missing(table.tasks))


def parameter_points(table: Table) -> list[Point]:
    """Return accuracy and trained parameters without the head, of each row that has every task."""
    found = ((row, mean_of_tasks(row, table.tasks)) for row in table.rows)
    return [Point(row.label, costs(row, table.tasks).parameters, mean) for row, mean in found if mean]


def time_points(table: Table) -> list[Point]:
    """Return accuracy and the seconds of one training, of each row that has every task."""
    found = ((row, mean_of_tasks(row, table.tasks), costs(row, table.tasks).seconds) for row in table.rows)
    return [Point(row.label, seconds, mean) for row, mean, seconds in found if mean and seconds is not None]


def group_means(table: Table) -> Means:
    """Return each row's mean of each group of tasks, and of the groups where there are several.

    A group is called by its name and its number of tasks.
    """
    found: Means = {}
    for row in table.rows:
        means = {_counted(name, len(tasks)): mean_of_tasks(row, tasks) for name, tasks in table.groups.items()}
        if len(table.groups) > 1:
            means[f"mean of\n{len(table.groups)} groups"] = mean_of_groups(row, table.groups)
        found[row.label] = {name: mean for name, mean in means.items() if mean}
    return found


def _counted(name: str, tasks: int) -> str:
    return f"{name}\n({tasks} task{'s' * (tasks != 1)})"


def shot_curves(table: Table) -> dict[str, dict[str, list[tuple[int, Mean]]]]:
    """Return accuracy over the training images per class: by group and for the mean of the groups, by row.

    Tasks without a number of shots are left out; a row has a point where it has every task of that group and number.
    Nothing where all tasks have the same number.
    """
    shots = {result.trial.task: result.trial.shots for result in table.results if result.trial.shots}
    numbers = sorted(set(shots.values()))
    if len(numbers) < 2:
        return {}
    by_group = {
        group: {number: [task for task in tasks if shots.get(task) == number] for number in numbers}
        for group, tasks in table.groups.items()
    }
    by_group = {group: tasks for group, tasks in by_group.items() if any(tasks.values())}
    panels = {group: {n: {group: tasks} for n, tasks in by.items() if tasks} for group, by in by_group.items()}
    if len(by_group) > 1:
        panels[f"mean of {len(by_group)} sets"] = {
            n: {group: by[n] for group, by in by_group.items()}
            for n in numbers
            if all(by[n] for by in by_group.values())
        }
    found: dict[str, dict[str, list[tuple[int, Mean]]]] = {}
    for name, panel in panels.items():
        curves = {row.label: [(n, mean_of_groups(row, groups)) for n, groups in panel.items()] for row in table.rows}
        found[name] = {label: [(n, mean) for n, mean in curve if mean] for label, curve in curves.items()}
    return found


def shifts(table: Table) -> dict[str, dict[str, tuple[Mean, Mean]]]:
    """Return the means on the test images and on each shifted test set, over the tasks that have it, by set and row."""
    found: dict[str, dict[str, tuple[Mean, Mean]]] = {}
    for name, tasks in table.shifted.items():
        both = {row.label: (mean_of_tasks(row, tasks), mean_of_tasks(row, tasks, name)) for row in table.rows}
        found[name] = {label: (plain, shifted) for label, (plain, shifted) in both.items() if plain and shifted}
    return found


def overlap(row: RecipeRow, tasks: Sequence[str], widths: Mapping[str, int] | None = None) -> Overlap | None:
    """Return how many of a task's channels another task chose too: mean over blocks and sites, then over seeds.

    Args:
        row: a row whose results hold channels.
        tasks: in the order wished for; those without channels are left out.
        widths: the channels that a site has in all, by site; without it, what chance gives is not known.

    Returns:
        Shares between 0 and 1 [tasks, tasks], of row's channels; None where fewer than two tasks have channels with the
        same seed. Two tasks that share no seed have NaN.
    """
    found = {(r.trial.task, r.trial.seed): r for r in row.results if r.channels}
    names = tuple(task for task in tasks if any(task == known for known, _ in found))
    seeds = sorted({seed for _, seed in found})
    shares = np.full((len(names), len(names)), np.nan)
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            both = [seed for seed in seeds if (first, seed) in found and (second, seed) in found]
            if both:
                shares[i, j] = np.mean([_common(found[first, seed], found[second, seed]) for seed in both])
    if len(names) < 2 or np.isfinite(shares).sum() == len(names):
        return None
    return Overlap(names, shares, _chance(next(iter(found.values())), widths))


def _common(first: "Result", second: "Result") -> float:
    """Return the share of the first's channels that are the second's too, mean over sites and blocks."""
    pairs = [
        (set(ours), set(theirs))
        for site, blocks in first.channels.items()
        for ours, theirs in zip(blocks, second.channels[site], strict=True)
    ]
    return float(np.mean([len(ours & theirs) / len(ours) for ours, theirs in pairs]))


def _chance(result: "Result", widths: Mapping[str, int] | None) -> float | None:
    if widths is None or any(site not in widths for site in result.channels):
        return None
    return float(np.mean([len(one) / widths[site] for site, blocks in result.channels.items() for one in blocks]))
