"""What others published for a table's benchmark, as a table and as lines of a CSV."""

from collections.abc import Iterator, Sequence
from typing import Any

from visgraft.bench.measures import TOP1
from visgraft.bench.published import BACKBONES, SIZES, published, published_groups
from visgraft.bench.sheet import Column, Sheet
from visgraft.bench.statistics import TEST, Table


def published_backbone(table: Table) -> str | None:
    """Return what the published results call the table's backbone; None where there are none with it."""
    return BACKBONES.get(table.condition.backbone.split(".")[0])


def published_lines(benchmark: str, backbone: str | None) -> Iterator[dict[str, Any]]:
    """Yield lines of a CSV, one per method and task; none where nothing is known."""
    if benchmark not in SIZES or backbone is None:
        return
    groups = {task: group for group, tasks in published_groups(benchmark).items() for task in tasks}
    for one in published(benchmark, backbone, None):
        for task, rate in one.top1.items():
            parameters = "" if one.parameters is None else round(1e6 * one.parameters)
            yield {
                "source": one.source,
                "protocol": benchmark,
                "backbone": backbone,
                "weights": one.pretraining,
                "method": one.method,
                "test_set": TEST,
                "group": groups[task],
                "task": task,
                "of": "task",
                "top1": rate / 100,
                "measure": TOP1,
                "figure": rate / 100,
                "parameters": parameters,
            }


def published_sheet(table: Table) -> Sheet:
    """Show what others published for the table's benchmark: all of its tasks, whichever ours has."""
    benchmark, backbone = table.condition.protocol, published_backbone(table)
    if benchmark not in SIZES or backbone is None:
        why = f"There are no published results of {benchmark} with {table.condition.backbone} to show here."
        return Sheet(f"{benchmark}, {table.condition.backbone}: published results", why, ())
    found, groups = published(benchmark, backbone, None), published_groups(benchmark)
    tasks = [task for group in groups.values() for task in group]

    def column(head: str, values: Sequence[float | None], digits: int = 1) -> Column:
        return Column(head, tuple("" if v is None else f"{v:.{digits}f}" for v in values), tuple(values))

    columns = [
        Column("method, as published", tuple(one.method for one in found)),
        Column("source", tuple(one.source for one in found)),
        Column("pretraining", tuple(one.pretraining for one in found)),
    ]
    for group, members in groups.items():
        columns += [column(task, [one.top1.get(task) for one in found]) for task in members]
        if len(groups) > 1:
            columns.append(column(f"{group}: mean of {len(members)} tasks", [one.mean(members) for one in found], 2))
    if len(groups) > 1:
        columns.append(column(f"mean of {len(groups)} groups", [one.mean_of_groups(groups) for one in found], 2))
    columns.append(column(f"mean of {len(tasks)} tasks", [one.mean(tasks) for one in found], 2))
    parameters = tuple("" if one.parameters is None else f"{one.parameters:g}" for one in found)
    columns.append(Column("million parameters", parameters))
    text = (
        f"Not ours: results of {benchmark} with {backbone} as the sources report them, with their own programs, "
        "weights and ways of choosing settings and epochs. Cells: top-1 in percent; the means are made here from the "
        "cells. One method may appear under several names, each with its source."
    )
    return Sheet(f"{benchmark}, {backbone}: published results", text, tuple(columns))
