"""What the page says of one run: measured on the data where there is some, otherwise read from the adapter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from visgraft.adapters.calibrated import ONE_LABEL, Calibrated
from visgraft.adapters.directory import Adapted
from visgraft.adapters.record import AdapterRecord
from visgraft.core.attach import detach
from visgraft.data.images import Images, Loading
from visgraft.data.read import AnySource
from visgraft.data.tasks import LabelTask, output_slices
from visgraft.measure.by_task import OutputsOf, images_of_task
from visgraft.measure.calibration import Calibration, calibration
from visgraft.measure.evaluation import Evaluation, confusion, is_multi_label
from visgraft.measure.intervals import clusters
from visgraft.measure.measuring import adapter_data, load_as_trained, measure_adapter
from visgraft.measure.numbers import NumberFigures
from visgraft.pictures import Picture
from visgraft.report import compare, figures, numbers, tables
from visgraft.report.channels import ChannelMap, channel_map, channel_scores, choices, stored_choices
from visgraft.report.coverage import Coverage, NumberCoverage, measure_coverage, number_coverage
from visgraft.report.mistakes import FarOff, Mistake, count_mistakes, find_far_off, find_mistakes
from visgraft.report.parts import PartsShown, made_of_parts, show_parts

PART_NAMES = {"val": "validation", "test": "test", "all": "measured"}
NAMED_CLASSES = 25
SCORED_IMAGES = 1000
Say = Callable[[str], None]


@dataclass(frozen=True)
class ReportedRun:
    """An adapter to report on: a name that is unique on the page, its folder, and its configuration."""

    name: str
    path: Path
    record: AdapterRecord

    @property
    def classes(self) -> list[str]:
        """Names of the classes; their numbers where the adapter holds none."""
        return list(self.record.classes) or [str(i) for i in range(self.record.outputs)]


@dataclass(frozen=True)
class ClassAnswers:
    """What the page shows of answers that are classes.

    `counts` is the confusion matrix [true][answered], empty where images may have several classes; `decisions` is what
    `wrong` is counted among: images, or images times classes.
    """

    multi_label: bool
    counts: list[list[int]]
    confusion: Picture | None
    pairs: list[tables.Pair]
    calibration: Calibration
    reliability: Picture
    coverage: Coverage | None
    wrong: int
    decisions: int
    mistakes: list[Mistake]
    classes: list[tables.ClassRow]
    groups: list[tables.GroupRow]


@dataclass(frozen=True)
class NumberAnswers:
    """What the page shows of answers that are numbers; `above` is by how much they are too high on average."""

    figures: NumberFigures
    above: float
    against_true: Picture
    errors: Picture
    far_off: list[FarOff]
    coverage: NumberCoverage | None


@dataclass(frozen=True)
class AskedQuestion:
    """What one task asks, and the answers; of a run with a single question, `task` is None."""

    anchor: str
    task: LabelTask | None
    classes: list[str]
    images: int
    answers: ClassAnswers | NumberAnswers


@dataclass(frozen=True)
class SeenImages:
    """What a run did on the measured images; `members` tells which belong together (see `clusters`)."""

    evaluation: Evaluation
    paths: Sequence[Path]
    members: Any
    skipped: int
    missing: list[str]
    left_out: Mapping[str, str]
    grouped: bool
    parts: PartsShown | None


@dataclass(frozen=True)
class RunSection:
    """One run on the page; `score` is how its method chose channels, None where it works on all."""

    row: compare.RunRow
    record: AdapterRecord
    curves: list[Picture]
    score: str | None
    channels: list[ChannelMap]
    scored: str
    seen: SeenImages | None
    questions: list[AskedQuestion]
    configuration: list[tuple[str, list[tuple[str, str]]]]

    @property
    def measured(self) -> ClassAnswers | None:
        """The answers of a run that asks for classes only; None where nothing was measured, or there are tasks."""
        answers = self.questions[0].answers if self.questions and not self.record.tasks else None
        return answers if isinstance(answers, ClassAnswers) else None


def make_section(
    run: ReportedRun, anchor: str, data: AnySource | None, weights: str | None, part: str, loading: Loading, say: Say
) -> RunSection:
    """Measure and draw one run; its model is let go afterwards."""
    record, seen, scored, questions = run.record, None, "", list[AskedQuestion]()
    if data is None:
        maps = [channel_map(choice, None) for choice in stored_choices(run.path, record)]
    else:
        say(f"{run.name}: answers on the {PART_NAMES[part]} images")
        found, evaluation, images, adapted = measure_adapter(
            run.path, data, weights=weights, part=part, loading=loading
        )
        say(f"{run.name}: mistakes, and what the answers depend on")
        questions = _questions(run, anchor, evaluation, images, adapted)
        seen = _see(run, evaluation, images, adapted, found, say)
        maps, scored = _salience(run, adapted, data, loading, say)
    figures_seen = (seen.evaluation, seen.members) if seen else (None, np.arange(0))
    return RunSection(
        compare.make_row(run.name, anchor, run.path, record, *figures_seen),
        record,
        figures.curves(record.history, record.facts.get("kept_epoch")),
        maps[0].score if maps else None,
        maps,
        scored,
        seen,
        questions,
        tables.configuration_rows(record),
    )


def _see(
    run: ReportedRun, evaluation: Evaluation, images: Images, adapted: Adapted, found: Mapping[str, Any], say: Say
) -> SeenImages:
    """Gather what the page says of all images, and what the parts of the method do on them; `found` are the figures."""
    made = made_of_parts(adapted.model)
    if made:
        say(f"{run.name}: each {made.module.part_name} alone")
    return SeenImages(
        evaluation,
        images.paths,
        clusters(images.groups, len(images)),
        len(images.skipped),
        found["classes_missing"],
        found.get("tasks_left_out", {}),
        any(group is not None for group in images.groups),
        show_parts(adapted.model, images, run.record.precision),
    )


def _questions(
    run: ReportedRun, anchor: str, evaluation: Evaluation, images: Images, adapted: Adapted
) -> list[AskedQuestion]:
    """Make the tables and pictures of each question; tasks without a known label are left out."""
    if not images.tasks:
        answers = _class_answers(evaluation, images, adapted.model, run.classes, run.record.calibrated.get(ONE_LABEL))
        return [AskedQuestion(anchor, None, run.classes, len(images), answers)]
    found = list[AskedQuestion]()
    for number, (task, outputs) in enumerate(zip(images.tasks, output_slices(images.tasks), strict=True)):
        one = evaluation.by_task.get(task.name)
        if one is None:
            continue
        own, model = images_of_task(images, number), OutputsOf(adapted.model, outputs)
        shown = (
            _number_answers(one, own, model, run.record.calibrated.get(task.name))
            if isinstance(one, NumberFigures)
            else _class_answers(one, own, model, task.classes, run.record.calibrated.get(task.name))
        )
        found.append(AskedQuestion(f"{anchor}-task-{number + 1}", task, list(task.classes), len(own), shown))
    return found


def _class_answers(
    evaluation: Evaluation, images: Images, model: nn.Module, names: Sequence[str], calibrated: Calibrated | None
) -> ClassAnswers:
    multi_label = is_multi_label(evaluation)
    counts = None if multi_label else confusion(evaluation, len(names))
    found = calibration(evaluation)
    return ClassAnswers(
        multi_label=multi_label,
        counts=[] if counts is None else counts.tolist(),
        confusion=None if counts is None or len(names) <= NAMED_CLASSES else figures.large_confusion(counts),
        pairs=[] if counts is None else tables.confused_pairs(counts, names),
        calibration=found,
        reliability=figures.reliability(found, "there" if multi_label else "right"),
        coverage=measure_coverage(calibrated, evaluation, names, images.groups, clusters(images.groups, len(images))),
        wrong=count_mistakes(evaluation),
        decisions=evaluation.images * (len(names) if multi_label else 1),
        mistakes=find_mistakes(model, images, evaluation, names),
        classes=tables.label_rows(evaluation, names)
        if counts is None
        else tables.class_rows(evaluation, counts, names),
        groups=tables.group_rows(evaluation, images.groups),
    )


def _number_answers(
    found: NumberFigures, images: Images, model: nn.Module, calibrated: Calibrated | None
) -> NumberAnswers:
    task = images.tasks[0]
    return NumberAnswers(
        found,
        numbers.mean_error(found),
        numbers.against_true(found, task),
        numbers.errors_over_true(found, task),
        find_far_off(model, images, found),
        number_coverage(calibrated, found, images.groups, clusters(images.groups, len(images))),
    )


def _salience(
    run: ReportedRun, adapted: Adapted, data: AnySource, loading: Loading, say: Say
) -> tuple[list[ChannelMap], str]:
    """Score the channels by the training images on the plain backbone, which the adapted model is turned into.

    Of many training images, evenly spaced ones are taken, so that a report does not take as long as a training.
    """
    found = choices(adapted.model)
    if not found:
        return [], ""
    say(f"{run.name}: salience of the channels")
    examples = adapter_data(run.path, data)[0].part("train")
    some = examples[:: -(-len(examples) // SCORED_IMAGES)]
    images = load_as_trained(some, run.record, len(run.classes), loading)
    plain = detach(adapted.model)
    maps = [channel_map(choice, channel_scores(plain, images.batches(), choice)) for choice in found]
    of = f" (of {len(examples):,})" if len(some) < len(examples) else ""
    return maps, f"{len(images):,} training images{of}"
