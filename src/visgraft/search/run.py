"""Which method for my data? Search every method's settings within a time, and compare the best on the same images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from visgraft.backbones.creation import Backbone
from visgraft.core.configure import AUTO_METHODS
from visgraft.data.dataset import Dataset, Example, Split
from visgraft.data.images import Images, Loading
from visgraft.data.read import AnySource, read_data
from visgraft.errors import VisgraftError
from visgraft.executors.job import Executor
from visgraft.export.merge import mergeable
from visgraft.measure.intervals import Difference
from visgraft.measure.precision import resolve_precision
from visgraft.methods import get_method
from visgraft.options import AUTO
from visgraft.search.budget import Clock, Cost, Plan, Size, full_plan, make_plan
from visgraft.search.pilot import measure_cost
from visgraft.search.race import Race, TellProgress
from visgraft.search.result import Comparison, MethodResult, Progress
from visgraft.search.settings import Search, TuningTask
from visgraft.search.spread import Elsewhere, SpreadRace, measure_costs
from visgraft.search.verdict import Candidate, Verdict, confused_pairs, decide, difference, is_guessing
from visgraft.training.crossval import Bench, Predictions, kept_examples, possible_folds
from visgraft.training.opened import Ingredients

METHODS = ("linear", "sct", "alore", "lora")
FINALISTS = 3
"""So many methods of an automatic choice are cross-validated, where images are few."""
FEW_IMAGES = 300
"""With fewer training and validation images, the best settings are compared by cross-validation on all of them."""


def _nothing(progress: Progress) -> None:
    """Tell nobody."""


def compare(
    data: AnySource | Dataset,
    methods: Sequence[str] = METHODS,
    *,
    backbone: Backbone,
    budget_seconds: float | None = None,
    spent_seconds: float = 0.0,
    trials: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    precision: str = "auto",
    split: Split | None = None,
    loading: Loading = Loading(),  # noqa: B008
    executor: Executor | None = None,
    on_progress: TellProgress = _nothing,
    on_loading: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare methods on a data set's training and validation images; the test images are never read.

    Each method's knobs (`Method.knobs`) are searched on the validation images, from its default recipe on. The best
    settings are then compared on the validation images, or, with fewer than 300 training and validation images, by
    repeated stratified k-fold cross-validation on all of those.

    Args:
        data: a folder, a table, a data set, or what `read_data` made of one.
        methods: names of registered methods; "auto" alone: a few, of which the most accurate is recommended.
        backbone: what is adapted; its seed is `seed`.
        budget_seconds: the time for all of it; epochs are shortened so that it suffices. None: no limit.
        spent_seconds: how much of it is spent already.
        trials: settings to try per method at most; a number without a budget gives the same result again.
        epochs: of each training where more than a head trains; None: the recipe's, or what the budget allows.
        seed: of the search, of all trainings, and of the images' division where the source has none.
        precision: as in `TrainConfig`.
        split: how the images are divided where the source does not say; None: the default shares, with `seed`.
        loading: how images are read.
        executor: where the trainings run, the methods side by side, and then the folds; None: in this process, and the
            methods take turns. With `trials` and no budget both give the same.
        on_progress: called after every step of training.
        on_loading: called with (images read, images in all).

    Raises:
        VisgraftError: an unknown method, neither a budget nor trials, a budget too short, or nothing that trains.
        DataError: the data cannot be used.
    """
    clock = Clock(budget_seconds, spent_seconds)
    automatic = tuple(methods) == (AUTO,)
    names = _check(AUTO_METHODS if automatic else methods, budget_seconds, trials, epochs)
    dataset = data if isinstance(data, Dataset) else read_data(data, split or Split(seed=seed))
    dataset.part("train"), dataset.part("val")
    bench = Bench(replace(backbone, seed=seed), len(dataset.classes))
    parts = (dataset.part(part) for part in ("train", "val"))
    images, val = (bench.load(part, on_progress=on_loading, **asdict(loading)) for part in parts)
    task = TuningTask(bench, images, val, seed, resolve_precision(precision))
    examples = [*kept_examples(dataset.train, images), *kept_examples(dataset.val, val)]
    race = _race(task, names, dataset, examples, clock, epochs, loading, executor, on_progress)
    race.search(trials)
    crossed = _cross_validate(race, examples, automatic)
    return _conclude(race, dataset, crossed, automatic)


def _cross_validate(race: Race, examples: Sequence[Example], automatic: bool) -> Mapping[str, Predictions]:
    """Return the held-out answers of the methods to be compared, of an automatic choice the best few."""
    if automatic and race.plan.folds:
        race.keep(FINALISTS)
    crossed = race.cross_validate(examples)
    race.keep(FINALISTS if automatic and crossed else len(race.searches))
    return crossed


def _race(
    task: TuningTask,
    names: Sequence[str],
    dataset: Dataset,
    examples: Sequence[Example],
    clock: Clock,
    epochs: int | None,
    loading: Loading,
    executor: Executor | None,
    tell: TellProgress,
) -> Race:
    """Return the searches of all methods, planned by what a short training of each costs."""
    if executor is None:
        costs = {name: measure_cost(task, name) for name in names}
        plan = _plan(costs, examples, task, clock, epochs)
        return Race(task, [Search(name, task, costs[name], plan.epochs[name]) for name in names], plan, clock, tell)
    what = Ingredients.of(dataset, "comparison", task.bench.backbone, (dataset.train, dataset.val), loading)
    where = Elsewhere(what, task.seed, task.precision)
    costs = measure_costs(where, names, executor)
    side_by_side = min(executor.places, len(names))
    plan = _plan({name: cost.scaled(1 / side_by_side) for name, cost in costs.items()}, examples, task, clock, epochs)
    searches = [Search(name, task, costs[name], plan.epochs[name]) for name in names]
    return SpreadRace(task, searches, plan, clock, tell, where=where, executor=executor)


def _check(methods: Sequence[str], budget: float | None, trials: int | None, epochs: int | None) -> list[str]:
    """Return the names of the methods, each once."""
    names = list(dict.fromkeys(methods))
    if not names:
        raise VisgraftError("no method is named; pass --methods linear,alore or others that `visgraft methods` lists")
    if AUTO in names:
        raise VisgraftError(f"{AUTO} stands for several methods and is compared with no other; name it alone")
    for name in names:
        get_method(name)
    if budget is None and trials is None:
        raise VisgraftError("a comparison needs a budget or a number of trials; pass --budget 30m or --trials 8")
    for option, value in (("budget", budget), ("trials", trials), ("epochs", epochs)):
        if value is not None and not value > 0:
            raise VisgraftError(f"{option} is {value}, but must be above 0")
    return names


def _plan(
    costs: Mapping[str, Cost], examples: Sequence[Example], task: TuningTask, clock: Clock, epochs: int | None
) -> Plan:
    """Return how long to train, and whether to cross-validate."""
    recipes = {name: get_method(name).recipe.epochs for name in costs}
    possible = possible_folds(examples) if len(examples) < FEW_IMAGES else 0
    size = Size(len(task.images), len(task.val), possible if possible > 1 else 0)
    if math.isinf(clock.budget) or epochs is not None:
        return full_plan(recipes, size.folds, epochs, [name for name, cost in costs.items() if cost.head_only])
    return make_plan(costs, recipes, size, clock.left, clock.budget)


def _conclude(race: Race, dataset: Dataset, crossed: Mapping[str, Predictions], automatic: bool) -> Comparison:
    """Measure every method's best setting on the same images, and decide."""
    task, plan = race.task, race.plan
    found = dict(crossed) or {s.method: _validated(s, task) for s in race.found}
    candidates = [_candidate(search, task, found[search.method]) for search in race.found]
    count = len(next(iter(found.values())).labels)
    guessing = all(is_guessing(predictions) for predictions in found.values())
    pairs = [] if guessing else confused_pairs(list(found.values()))
    unanswered = [] if guessing else _unanswered(list(found.values()))
    verdict = decide(
        candidates,
        lambda first, second: difference(found[first], found[second]),
        count,
        guessing=guessing,
        points=_points(task.val),
        most_accurate=automatic,
    )
    return Comparison(
        results=tuple(_row(s, c, found, verdict) for s, c in zip(race.found, candidates, strict=True)),
        measure=_measure(task.val),
        measured_on="cross-validation" if crossed else "validation",
        images=count,
        folds=plan.folds if crossed else 0,
        repeats=len(next(iter(crossed.values())).probabilities) if crossed else 0,
        classes=dataset.classes,
        reference=verdict.reference,
        recommended=verdict.recommended,
        sentence=verdict.sentence,
        guessing=guessing,
        warnings=(*_warnings(pairs, dataset.classes), *unanswered),
        notes=tuple(_notes(race, count if crossed else 0)),
        backbone=task.bench.backbone.to_dict(),
        seed=task.seed,
        precision=task.precision,
        budget_seconds=None if math.isinf(race.clock.budget) else race.clock.budget,
        seconds=race.clock.spent,
        skipped=(*task.images.skipped, *task.val.skipped),
        predictions=found,
    )


def _validated(search: Search, task: TuningTask) -> Predictions:
    assert search.best is not None
    val = task.val
    return Predictions(search.best[2].probabilities[None], val.labels, val.groups, val.tasks)


def _points(images: Images) -> str:
    """What the figures are counted in."""
    if images.tasks:
        return "points of the mean of the tasks"
    return "points of mean average precision" if images.multi_label else "points"


def _measure(images: Images) -> str:
    """What the figures are."""
    if images.tasks:
        return "mean"
    return "mean_average_precision" if images.multi_label else "top1"


def _candidate(search: Search, task: TuningTask, found: Predictions) -> Candidate:
    assert search.best is not None
    _, setting, fit = search.best
    method, config = search.configured(setting)
    folds = mergeable(task.bench.model(config.drop_path), method)
    return Candidate(search.method, setting, found.figure, fit.parameters, folds)


def _row(search: Search, candidate: Candidate, found: Mapping[str, Predictions], verdict: Verdict) -> MethodResult:
    assert search.best is not None
    predictions, reference = found[search.method], found[verdict.reference]
    return MethodResult(
        method=search.method,
        setting=candidate.setting,
        epochs=search.epochs,
        figure=candidate.figure,
        interval=predictions.interval,
        macro_f1=predictions.macro_f1,
        search_figure=search.best[0],
        gain=None if search.method == verdict.reference else difference(predictions, reference),
        parameters=candidate.parameters,
        mergeable=candidate.mergeable,
        epoch_seconds=search.epoch_seconds,
        trials=search.trials,
        pruned=search.pruned,
        diverged=search.diverged,
        tasks=predictions.task_figures(),
        task_gains={} if predictions is reference else _task_gains(predictions, reference),
    )


def _task_gains(found: Predictions, reference: Predictions) -> dict[str, Difference]:
    return {name: difference(one, reference.by_task[name]) for name, one in found.by_task.items()}


def _warnings(pairs: Sequence[tuple[int, int]], classes: Sequence[str]) -> list[str]:
    """Name the classes that no method tells apart, if they are few."""
    named = [f"{classes[first]} from {classes[second]}" for first, second in pairs]
    if not named:
        return []
    told = ", ".join(named[:3]) + (f" and {len(named) - 3} other pairs" if len(named) > 3 else "")
    return [
        f"no method tells {told} better than guessing: is what tells them apart smaller than a patch? "
        "try a larger --image-size before another method"
    ]


def _unanswered(methods: Sequence[Predictions]) -> list[str]:
    """Name the tasks that no method answers better than a constant, of several."""
    guessed = [name for name in methods[0].by_task if all(is_guessing(one.by_task[name]) for one in methods)]
    if not guessed:
        return []
    return [
        f"no method is shown to answer {', '.join(guessed)} better than a constant answer: look at the labels and the "
        "image size, give more images, or leave it out of what is learned"
    ]


def _notes(race: Race, crossed: int) -> list[str]:
    """Say what the figures do not; `crossed` is the number of images in the cross-validation."""
    task, plan = race.task, race.plan
    everything = len(task.images) + len(task.val)
    notes = [
        "The settings were chosen on "
        + (
            f"the {len(task.val)} validation images, which are among these"
            if crossed
            else "these same validation images"
        )
        + ", so the figures are somewhat optimistic; the test images were not read. Measure the adapter that you "
        "train with `visgraft eval`."
    ]
    short = [s.method for s in race.searches if s.epochs < get_method(s.method).recipe.epochs]
    if short:
        kept = {s.epochs for s in race.searches if s.method in short}
        counts = " or ".join(str(epochs) for epochs in sorted(kept))
        notes.append(f"{', '.join(short)} trained for {counts} epochs instead of the recipe's, to be done in time.")
    missing = [s.method for s in race.searches if s.best is None]
    if missing:
        notes.append(f"{', '.join(missing)} has no figure: no training of it ran to its end.")
    behind = [s.method for s in race.searches if s.best is not None and s not in race.found]
    if behind:
        notes.append(f"{', '.join(behind)} fell behind on the validation images, and went no further.")
    if everything < FEW_IMAGES and not crossed:
        reason = "there was no time left for it" if plan.folds else "a class has fewer than 2 images, or groups, for it"
        notes.append(f"So few images call for cross-validation, but {reason}; the intervals are wide.")
    if 0 < crossed < everything:
        notes.append(
            f"The time sufficed for the folds of {crossed} of {everything} images; a longer --budget does more."
        )
    return notes
