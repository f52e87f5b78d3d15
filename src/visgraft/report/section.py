"""What the page says of one run: measured on the data where there is some, otherwise read from the adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visgraft.adapters.directory import Adapted
from visgraft.adapters.record import AdapterRecord
from visgraft.core.attach import detach
from visgraft.data.images import Images, Loading
from visgraft.data.read import AnySource
from visgraft.measure.calibration import Calibration, calibration
from visgraft.measure.evaluation import Evaluation, confusion
from visgraft.measure.intervals import clusters
from visgraft.measure.measuring import adapter_data, load_as_trained, measure_adapter
from visgraft.pictures import Picture
from visgraft.report import compare, figures, tables
from visgraft.report.channels import ChannelMap, channel_map, channel_scores, choices, stored_choices
from visgraft.report.coverage import Coverage, measure_coverage
from visgraft.report.mistakes import Mistake, count_mistakes, find_mistakes
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
class MeasuredRun:
    """What the page shows of a run on the measured images.

    `members` tells which images belong together (see `clusters`). `counts` is the confusion matrix [true][answered],
    empty where images may have several classes; `decisions` is what `wrong` is counted among: images, or images times
    classes.
    """

    evaluation: Evaluation
    paths: Sequence[Path]
    members: Any
    skipped: int
    missing: list[str]
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
    measured: MeasuredRun | None
    configuration: list[tuple[str, list[tuple[str, str]]]]


def make_section(
    run: ReportedRun, anchor: str, data: AnySource | None, weights: str | None, part: str, loading: Loading, say: Say
) -> RunSection:
    """Measure and draw one run; its model is let go afterwards."""
    record, measured, scored = run.record, None, ""
    if data is None:
        maps = [channel_map(choice, None) for choice in stored_choices(run.path, record)]
    else:
        say(f"{run.name}: answers on the {PART_NAMES[part]} images")
        found, evaluation, images, adapted = measure_adapter(
            run.path, data, weights=weights, part=part, loading=loading
        )
        measured = _measure(run, evaluation, images, adapted, found["classes_missing"], say)
        maps, scored = _salience(run, adapted, data, loading, say)
    measured_figures = (measured.evaluation, measured.members) if measured else (None, np.arange(0))
    return RunSection(
        compare.make_row(run.name, anchor, run.path, record, *measured_figures),
        record,
        figures.curves(record.history, record.facts.get("kept_epoch")),
        maps[0].score if maps else None,
        maps,
        scored,
        measured,
        tables.configuration_rows(record),
    )


def _measure(
    run: ReportedRun, evaluation: Evaluation, images: Images, adapted: Adapted, missing: list[str], say: Say
) -> MeasuredRun:
    """Make the tables and pictures of a measured run."""
    multi_label, names = tables.is_multi_label(evaluation), run.classes
    counts = None if multi_label else confusion(evaluation, len(names))
    found, members = calibration(evaluation), clusters(images.groups, len(images))
    say(f"{run.name}: mistakes, and what the answers depend on")
    mistakes = find_mistakes(adapted.model, images, evaluation, names)
    made = made_of_parts(adapted.model)
    if made:
        say(f"{run.name}: each {made.module.part_name} alone")
    parts = show_parts(adapted.model, images, run.record.precision)
    return MeasuredRun(
        evaluation=evaluation,
        paths=images.paths,
        members=members,
        skipped=len(images.skipped),
        missing=missing,
        multi_label=multi_label,
        counts=[] if counts is None else counts.tolist(),
        confusion=None if counts is None or len(names) <= NAMED_CLASSES else figures.large_confusion(counts),
        pairs=[] if counts is None else tables.confused_pairs(counts, names),
        calibration=found,
        reliability=figures.reliability(found, "there" if multi_label else "right"),
        coverage=measure_coverage(run.record.calibrated, evaluation, names, images.groups, members),
        wrong=count_mistakes(evaluation),
        decisions=evaluation.images * (len(names) if multi_label else 1),
        mistakes=mistakes,
        classes=tables.label_rows(evaluation, names)
        if counts is None
        else tables.class_rows(evaluation, counts, names),
        groups=tables.group_rows(evaluation, images.groups),
        parts=parts,
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
