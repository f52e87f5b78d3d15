"""From the results of a benchmark to numbers: one table per condition, named means, intervals, paired differences.

Only results of kind "final" are read. Figures are shares between 0 and 1, whatever they measure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from visgraft.bench.evidence import check_evidence
from visgraft.bench.measures import TOP1
from visgraft.errors import VisgraftError
from visgraft.measure.intervals import wilson
from visgraft.options import AUTO

if TYPE_CHECKING:
    from visgraft.bench.trial import Measured, Result

TEST = "test"
RESAMPLES = 2000
SEEDS, IMAGES, TASKS, TASKS_AND_SEEDS = "seeds", "test images", "tasks", "tasks and seeds"
BASELINES = ("linear", "full")
OWN_RECIPES = ("validated", "default")
Groups = Mapping[str, Sequence[str]]
"""Names of tasks by the group that they belong to."""


@dataclass(frozen=True)
class Condition:
    """What must be the same for all results of one table.

    `normalisation` holds the mean and the standard deviation per colour; `digest` is empty for random weights, which
    each seed draws anew; `resizing` is timm's crop mode.
    """

    protocol: str
    backbone: str
    weights: str
    digest: str
    image_size: int
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    resizing: str
    final_parts: str
    precision: str
    device: str
    reduced: bool

    @classmethod
    def of(cls, result: "Result") -> "Condition":
        """Return the condition of a result."""
        trial, facts = result.trial, result.preprocessing
        arguments = ", ".join(f"{key}={value}" for key, value in sorted(trial.backbone.get("arguments", {}).items()))
        weights = trial.backbone["weights"]
        return cls(
            protocol=trial.protocol,
            backbone=trial.backbone["name"] + (f"({arguments})" if arguments else ""),
            weights=f"file {trial.backbone['file']}" if "file" in trial.backbone else weights,
            digest="" if weights == "none" else result.backbone_digest,
            image_size=int(facts["input_size"][-1]),
            normalisation=(tuple(facts["mean"]), tuple(facts["std"])),
            resizing=str(facts.get("crop_mode", "center")),
            final_parts=trial.final_parts,
            precision=result.precision,
            device=result.device,
            reduced=trial.reduced,
        )


@dataclass(frozen=True)
class RecipeRow:
    """One method with one recipe and number of epochs: its results, at most one per task and seed.

    The method may be `auto`, whose trainings are of those chosen; `epochs` is then 0.
    """

    method: str
    recipe: str
    epochs: int
    label: str
    results: tuple["Result", ...]

    def cells(self, test: str = TEST) -> dict[str, dict[int, float]]:
        """Return the figure on a test set, by task and by seed; tasks without that test set are left out."""
        found: dict[str, dict[int, float]] = {}
        for result in self.results:
            if test in result.measured:
                found.setdefault(result.trial.task, {})[result.trial.seed] = result.measured[test].figure
        return {task: dict(sorted(seeds.items())) for task, seeds in found.items()}

    def images(self, test: str = TEST) -> dict[str, int]:
        """Return how many images the test set has, by task."""
        return {r.trial.task: r.measured[test].images for r in self.results if test in r.measured}

    def measured(self, task: str, test: str = TEST) -> list["Measured"]:
        """Return what was measured of a task on a test set, a training each."""
        return [r.measured[test] for r in self.results if r.trial.task == task and test in r.measured]

    def median(self, name: str) -> float:
        """Return the median over the trainings of what results call `name`."""
        return float(median(getattr(result, name) for result in self.results))

    def on(self, tasks: Sequence[str]) -> "RecipeRow":
        """Return the row with nothing but these tasks."""
        return replace(self, results=tuple(result for result in self.results if result.trial.task in tasks))

    def missing(self, tasks: Sequence[str], test: str = TEST) -> tuple[str, ...]:
        """Return those of the tasks that have no result."""
        return tuple(task for task in tasks if task not in self.cells(test))


@dataclass(frozen=True)
class Table:
    """Rows that may be compared: they share a condition, and a task means the same images in all of them."""

    condition: Condition
    groups: Mapping[str, tuple[str, ...]]
    rows: tuple[RecipeRow, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks that any row has, group by group."""
        return tuple(task for group in self.groups.values() for task in group)

    @cached_property
    def measures(self) -> dict[str, str]:
        """What the figure of each task is."""
        return {result.trial.task: result.measured[TEST].measure for result in self.results}

    @property
    def shifted(self) -> dict[str, tuple[str, ...]]:
        """The test sets of another domain, each with the tasks that have it."""
        found: dict[str, set[str]] = {}
        for result in self.results:
            for name in result.measured.keys() - {TEST}:
                found.setdefault(name, set()).add(result.trial.task)
        names = dict.fromkeys(name for result in self.results for name in result.measured if name != TEST)
        return {name: tuple(task for task in self.tasks if task in found[name]) for name in names}

    @property
    def results(self) -> tuple["Result", ...]:
        """The results of all rows."""
        return tuple(result for row in self.rows for result in row.results)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The methods that the others are measured against, as far as the table has them and something else."""
        return tuple(m for m in BASELINES if len(self.rows) > 1 and any(row.method == m for row in self.rows))

    def baseline(self, method: str, row: RecipeRow) -> RecipeRow | None:
        """Return the row of a method that `row` is measured against: of the same recipe, else the first; None: none.

        A row is not measured against its own method.
        """
        offered = [one for one in self.rows if one.method == method != row.method]
        return next((one for one in offered if one.recipe == row.recipe), offered[0] if offered else None)


class Interval(NamedTuple):
    """A 95 % interval, and what it generalises over."""

    low: float
    high: float
    over: str


class Mean(NamedTuple):
    """A mean that says what it is a mean of."""

    name: str
    value: float
    interval: Interval


class Paired(NamedTuple):
    """By how much the first row is above the second, on the same tasks and seeds: the mean over the tasks, in shares.

    The interval is None where there is a single task with a single seed. A task is won where the mean over its seeds is
    above 0. `tasks` and `pairs` are how many tasks, and tasks with seeds, both rows have.
    """

    first: str
    second: str
    mean: float
    interval: Interval | None
    won: int
    lost: int
    tied: int
    tasks: int
    pairs: int


def tables(results: Sequence["Result"], order: Sequence[str] = ()) -> list[Table]:
    """Return one table per condition, in the order of their first results.

    Rows are ordered by method: linear, full, then by parameters.

    Args:
        results: of both kinds; those that tune are left out.
        order: names of tasks in the order wished for, others follow as they come; groups go by their first task.

    Raises:
        VisgraftError: there are no final results, two of them claim the same place, a task means other images in one
            row than in another, or a result is no evidence (see `check_evidence`).
    """
    check_evidence(results)
    found: dict[Condition, list[Result]] = {}
    for result in results:
        if result.trial.kind == "final":
            if TEST not in result.measured:
                raise VisgraftError(f"the result of {result.trial.name} has no test set; run it again")
            found.setdefault(Condition.of(result), []).append(result)
    if not found:
        raise VisgraftError("there are no final results yet; let `visgraft bench run` finish at least one training")
    return [Table(condition, _groups(group, order), _rows(group)) for condition, group in found.items()]


def _groups(results: Sequence["Result"], order: Sequence[str]) -> dict[str, tuple[str, ...]]:
    place = {task: number for number, task in enumerate(order)}
    trials = sorted((r.trial for r in results), key=lambda trial: (place.get(trial.task, len(place)), trial.shots))
    groups: dict[str, dict[str, None]] = {}
    for trial in trials:
        groups.setdefault(trial.group, {})[trial.task] = None
    return {group: tuple(tasks) for group, tasks in groups.items()}


def _rows(results: Sequence["Result"]) -> tuple[RecipeRow, ...]:
    found: dict[tuple[str, str, int], dict[tuple[str, int], Result]] = {}
    images: dict[tuple[str, int], Result] = {}
    for result in results:
        trial, place = result.trial, (result.trial.task, result.trial.seed)
        first = images.setdefault(place, result)
        if first.trial.split != trial.split:
            raise VisgraftError(
                f"{first.trial.name} and {trial.name} did not use the same images; run each with an --out of its own"
            )
        epochs = 0 if trial.row == AUTO else result.epochs  # which differ by what was chosen
        row = found.setdefault((trial.row, trial.recipe, epochs), {})
        if place in row:
            differ = ", ".join(_differing(asdict(row[place].trial), asdict(trial))) or "nothing"
            raise VisgraftError(
                f"{trial.name} has two results, which differ in {differ}; run each with an --out of its own"
            )
        row[place] = result
    own = next((name for name in OWN_RECIPES if any(recipe == name for _, recipe, _ in found)), None)
    rows = [
        RecipeRow(method, recipe, epochs, method, tuple(row[place] for place in sorted(row)))
        for (method, recipe, epochs), row in found.items()
    ]
    rows.sort(key=lambda r: (_rank(r.method), r.median("parameters"), r.method, r.recipe != own, r.recipe, r.epochs))
    return tuple(replace(row, label=_label(row, rows, own)) for row in rows)


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]


def _rank(method: str) -> int:
    return BASELINES.index(method) if method in BASELINES else len(BASELINES)


def _label(row: RecipeRow, rows: Sequence[RecipeRow], own: str | None) -> str:
    epochs = {one.epochs for one in rows if (one.method, one.recipe) == (row.method, row.recipe)}
    more = [row.recipe] * (row.recipe not in (own, row.method)) + [f"{row.epochs} epochs"] * (len(epochs) > 1)
    return f"{row.method} ({', '.join(more)})" if more else row.method


def mean_of_tasks(row: RecipeRow, tasks: Sequence[str], test: str = TEST) -> Mean | None:
    """Return the mean over the tasks of the means over their seeds; None where the row lacks one of the tasks."""
    return _mean(row, {"": tasks}, f"mean of {len(tasks)} task{'s' * (len(tasks) != 1)}", test)


def mean_of_groups(row: RecipeRow, groups: Groups, test: str = TEST) -> Mean | None:
    """Return the mean over the groups of the means over their tasks; None where the row lacks one of the tasks."""
    return _mean(row, groups, f"mean of {len(groups)} group{'s' * (len(groups) != 1)}", test)


def _mean(row: RecipeRow, groups: Groups, name: str, test: str) -> Mean | None:
    tasks = [task for group in groups.values() for task in group]
    if not tasks or row.missing(tasks, test):
        return None
    cells, images = row.cells(test), row.images(test)
    weights = np.array([1 / len(groups) / len(group) for group in groups.values() for _ in group])
    values = [np.array(list(cells[task].values())) for task in tasks]
    value = float(sum(weight * one.mean() for weight, one in zip(weights, values, strict=True)))
    if min(map(len, values)) > 1:
        return Mean(name, value, _limits(_over_seeds(values, weights), SEEDS))
    limits = [_limits_of(row.measured(task, test), images[task]) for task in tasks]
    return Mean(name, value, _over_images([float(v.mean()) for v in values], limits, weights))


def _limits_of(found: Sequence["Measured"], images: int) -> tuple[float, float]:
    """Return the 95 % limits over the images of a task's mean over seeds: Wilson's of a rate, else those measured."""
    if found[0].measure == TOP1:
        return wilson(float(np.mean([one.figure for one in found])), images)
    low, high = np.mean([one.figure_ci95 for one in found], axis=0).tolist()
    return low, high


def _over_images(rates: Sequence[float], each: Sequence[tuple[float, float]], weights: np.ndarray) -> Interval:
    """Interval of a weighted mean of independent figures, from each one's limits: Zou and Donner, Statistics in
    Medicine 27 (2008) 1693-1702. Of a single figure it is its own.
    """
    limits = np.array(each)
    centre = float(weights @ np.array(rates))
    below, above = (float(np.sqrt(((weights * (limits[:, side] - rates)) ** 2).sum())) for side in (0, 1))
    return Interval(centre - below, centre + above, IMAGES)


def _limits(resampled: np.ndarray, over: str) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(low), float(high), over)


def _over_seeds(values: Sequence[np.ndarray], weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the weighted mean of the tasks with their seeds resampled [RESAMPLES].

    The deviations of n seeds are stretched by √(n / (n - 1)), for else few of them would scatter too little (Rao and
    Wu, Journal of the American Statistical Association 83 (1988) 231-241).
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for weight, one in zip(weights, values, strict=True):
        drawn = one[generator.integers(len(one), size=(RESAMPLES, len(one)))].mean(1)
        total += weight * (one.mean() + (drawn - one.mean()) * np.sqrt(len(one) / max(len(one) - 1, 1)))
    return total


def _over_tasks(values: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """Return the mean over the tasks with tasks resampled, and seeds within them [RESAMPLES]."""
    generator = np.random.default_rng(seed)
    counts = np.array([len(one) for one in values])
    padded = np.array([np.pad(one, (0, counts.max() - len(one))) for one in values])
    tasks = generator.integers(len(values), size=(RESAMPLES, len(values)))[..., None]
    seeds = (generator.random((RESAMPLES, len(values), counts.max())) * counts[tasks]).astype(int)
    kept = np.arange(counts.max()) < counts[tasks]
    drawn: np.ndarray = (padded[tasks, seeds] * kept).sum(-1) / counts[tasks[..., 0]]
    return drawn.mean(-1)


def paired(first: RecipeRow, second: RecipeRow, test: str = TEST) -> Paired | None:
    """Compare two rows on the tasks and seeds that both have; None where there are none.

    The interval comes from 2000 resamples of the tasks and of the seeds within them; of a single task, of its seeds.
    """
    ours, theirs = first.cells(test), second.cells(test)
    shared = {
        task: np.array([ours[task][seed] - theirs[task][seed] for seed in ours[task] if seed in theirs[task]])
        for task in ours
        if task in theirs
    }
    values = [one for one in shared.values() if len(one)]
    if not values:
        return None
    several, means = max(map(len, values)) > 1, [float(one.mean()) for one in values]
    interval = None
    if len(values) > 1:
        interval = _limits(_over_tasks(values), TASKS_AND_SEEDS if several else TASKS)
    elif several:
        interval = _limits(_over_seeds(values, np.ones(1)), SEEDS)
    won, lost = sum(mean > 1e-9 for mean in means), sum(mean < -1e-9 for mean in means)
    tied, pairs = len(means) - won - lost, sum(map(len, values))
    return Paired(first.label, second.label, float(np.mean(means)), interval, won, lost, tied, len(means), pairs)


def macro_f1(row: RecipeRow, tasks: Sequence[str], test: str = TEST) -> float | None:
    """Return the mean over the tasks of macro-F1, each a mean over seeds; None where a task is missing or has none."""
    if row.missing(tasks, test):
        return None
    found = [[one.macro_f1 for one in row.measured(task, test)] for task in tasks]
    known = [[value for value in values if value is not None] for values in found]
    return float(np.mean([np.mean(one) for one in known])) if all(known) else None
