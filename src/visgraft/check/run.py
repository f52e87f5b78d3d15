"""Everything that can be wrong with a data set before training, in one report."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from visgraft.check.counts import class_findings, class_tables, group_findings, group_table, part_findings
from visgraft.check.duplicates import duplicate_findings, find_copies
from visgraft.check.facts import Facts, OnStage, Unreadable, gather
from visgraft.check.findings import (
    DatasetImage,
    FigureTable,
    Finding,
    Report,
    counted,
    of_task,
    pictures,
    readable,
    worst_first,
)
from visgraft.check.labels import label_findings, number_findings, task_tables, told_findings
from visgraft.check.looks import kind_table, look_findings, size_table
from visgraft.check.shortcuts import LEAST_PER_CLASS, probe_shortcuts, shortcut_findings, shortcut_table
from visgraft.data.dataset import Dataset


def check_data(dataset: Dataset, *, on_progress: OnStage | None = None) -> Report:
    """Look for what is wrong with a data set before anything is trained on it.

    Every image is decoded once; what is kept of it is a kilobyte or two. `on_progress` is called with the stage in
    words, how much of it is done, and of how much.
    """
    everything = pictures(dataset)
    outcome = gather([picture.example for picture in everything], on_progress)
    read = [(p, one) for p, one in zip(everything, outcome, strict=True) if isinstance(one, Facts)]
    shown, facts = [picture for picture, _ in read], [one for _, one in read]
    copies = find_copies(facts, on_progress)
    findings = [
        *unreadable_findings(everything, outcome),
        *group_findings(everything, dataset),
        *duplicate_findings(shown, copies, drawn=dataset.layout == "flat"),
        *class_findings(dataset),
        *part_findings(dataset),
        *label_findings(dataset),
        *number_findings(everything, dataset.tasks),
        *told_findings(dataset),
        *look_findings(shown, facts),
        *passed_over_findings(dataset),
    ]
    tables = {**(task_tables(dataset) if dataset.tasks else {}), **class_tables(dataset)}
    if any(picture.example.group is not None for picture in everything):
        tables["groups"] = group_table(everything)
    if facts:
        tables |= {"sizes": size_table(facts), "formats": kind_table(facts)}
        more, probed = _shortcuts(dataset, shown, facts, copies.all, on_progress)
        findings += more
        tables |= probed
    return Report(dataset.root, len(everything), worst_first(findings), tables)


def unreadable_findings(everything: Sequence[DatasetImage], outcome: Sequence[Facts | Unreadable]) -> list[Finding]:
    """Name every image that cannot be read, with the reason."""
    broken = tuple(
        (DatasetImage(picture.example, picture.part, picture.label, one.reason),)
        for picture, one in zip(everything, outcome, strict=True)
        if isinstance(one, Unreadable)
    )
    if not broken:
        return []
    remedy = "replace or remove them, or train with --skip-broken, which leaves them out"
    return [Finding("unreadable", "error", f"{counted(len(broken), 'image')} cannot be read", remedy, broken)]


def passed_over_findings(dataset: Dataset) -> list[Finding]:
    """Say what lies beside the images and is not read, and what else the reading of them told."""
    remedy = "see that it is as you mean it"
    return [Finding("passed_over", "note", note, remedy) for note in dataset.notes]


def _shortcuts(
    dataset: Dataset,
    shown: Sequence[DatasetImage],
    facts: Sequence[Facts],
    copies: Sequence[Sequence[int]],
    on_progress: OnStage | None,
) -> tuple[list[Finding], dict[str, FigureTable]]:
    """Return the findings and figures of the probes of each task with one class, or a note where there can be none."""
    units = _units(shown, copies)
    if not dataset.tasks and not dataset.multi_label:
        return _probed("", list(shown), list(range(len(shown))), facts, units, on_progress)
    findings, tables = list[Finding](), dict[str, FigureTable]()
    for number, task in enumerate(dataset.tasks):
        if task.kind == "one_class":
            places = [i for i, one in enumerate(shown) if one.example.label.values[number] is not None]  # type: ignore[union-attr]
            more, table = _probed(task.name, of_task(shown, number), places, facts, units, on_progress)
            findings, tables = findings + more, tables | table
    if not any(task.kind == "one_class" for task in dataset.tasks):
        title = "shortcuts were not looked for: no task asks for one class of each image"
        title = title if dataset.tasks else "shortcuts were not looked for: images may have several classes"
        findings = [Finding("not_probed", "note", title, "compare the classes' images yourself")]
    return findings, tables


def _probed(
    name: str,
    own: Sequence[DatasetImage],
    places: Sequence[int],
    facts: Sequence[Facts],
    units: Sequence[int],
    on_progress: OnStage | None,
) -> tuple[list[Finding], dict[str, FigureTable]]:
    """Return the findings and figures of the probes of one task, whose images lie at `places` among all."""
    of = f"{readable(name)}: " if name else ""
    facts = [facts[i] for i in places]
    probes = probe_shortcuts(own, facts, [units[i] for i in places], on_progress=on_progress)
    if not probes:
        title = (
            f"{of}shortcuts were not looked for: that needs two classes with {LEAST_PER_CLASS} images of different "
            "groups"
        )
        return [Finding("not_probed", "note", title, "compare the classes' images yourself")], {}
    found = [replace(finding, title=of + finding.title) for finding in shortcut_findings(probes, own, facts)]
    table = shortcut_table(probes)
    table = replace(table, title=table.title.replace("Shortcuts", f"Shortcuts of {readable(name)}")) if name else table
    return found, {f"shortcuts {name}".strip(): table}


def _units(shown: Sequence[DatasetImage], copies: Sequence[Sequence[int]]) -> list[int]:
    """Number the images so that those of one group, or copies of one picture, have the same number."""
    groups: dict[str | int, int] = defaultdict(lambda: len(groups))
    named = [i if picture.example.group is None else picture.example.group for i, picture in enumerate(shown)]
    for together in copies:
        for i in together:
            if isinstance(named[i], int):
                named[i] = named[together[0]]
    return [groups[name] for name in named]
