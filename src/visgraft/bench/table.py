"""The results of a benchmark as tables: Markdown to read, lines of values for a terminal, CSV to go on with.

Every table says in its caption how its numbers came about. Figures are in percent, differences in points; what is not
top-1 says so in its column's head.
"""

import csv as csv_format
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import stdev
from typing import TYPE_CHECKING, Any

from visgraft.bench.caption import caption, interval_kinds
from visgraft.bench.costs import costs
from visgraft.bench.label_sheet import label_sheet
from visgraft.bench.measures import MEAN, MIXED, R2, TOP1, only_top1, shown
from visgraft.bench.published_sheet import published_backbone, published_lines, published_sheet
from visgraft.bench.sheet import NONE, Column, Sheet, cell, percent, points
from visgraft.bench.statistics import (
    BASELINES,
    TEST,
    Interval,
    Mean,
    Paired,
    RecipeRow,
    Table,
    macro_f1,
    mean_of_groups,
    mean_of_tasks,
    paired,
    tables,
)
from visgraft.errors import VisgraftError

if TYPE_CHECKING:
    from visgraft.bench.trial import Result

PUBLISHED = "published"


def sheets(results: Sequence["Result"], order: Sequence[str] = (), against: str | None = None) -> list[Sheet]:
    """Return all tables: per condition figures and costs, figures by label, shifted test sets, differences.

    Args:
        results: what `read_results` returned.
        order: names of the tasks in the order wished for.
        against: "published": with the results that others published for the benchmark, in tables of their own.

    Raises:
        VisgraftError: there are no final results, or they cannot stand in one table (see `tables`).
    """
    _check_against(against)
    found: list[Sheet] = []
    for table in tables(results, order):
        found.append(_main(table))
        found += label_sheet(table, _title(table))
        if table.shifted:
            found.append(_shifted(table))
        compared = list(_pairs(table))
        if compared:
            found.append(_compared(table, compared))
        if against == PUBLISHED:
            found.append(published_sheet(table))
    return found


def _check_against(against: str | None) -> None:
    if against not in (None, PUBLISHED):
        raise VisgraftError(f"against is {against!r}, but only {PUBLISHED!r} is known")


def markdown(results: Sequence["Result"], order: Sequence[str] = (), against: str | None = None) -> str:
    """Return all tables in Markdown; the arguments and errors are those of `sheets`."""
    return "\n".join(sheet.markdown() for sheet in sheets(results, order, against))


def with_interval(mean: Mean | None) -> str:
    """Return a mean in percent with its interval."""
    return NONE if mean is None else f"{percent(mean.value, 2)} {_limits(mean.interval)}"


def _limits(interval: Interval) -> str:
    return f"[{percent(interval.low, 2)}, {percent(interval.high, 2)}]"


def _method_column(table: Table) -> Column:
    return Column("method", tuple(row.label for row in table.rows))


def _said(table: Table, tasks: Sequence[str]) -> str:
    """Return what a head adds where the tasks' figures are no top-1."""
    measures = [table.measures[task] for task in tasks]
    return "" if only_top1(measures) else f" ({shown(measures)})"


def _task_columns(table: Table, tasks: Sequence[str], test: str = TEST) -> Iterator[Column]:
    cells = [row.cells(test) for row in table.rows]
    for task in tasks:
        values = tuple(sum(c[task].values()) / len(c[task]) if task in c else None for c in cells)
        yield Column(f"{task}{_said(table, [task])}", tuple(cell(c.get(task)) for c in cells), values)


def _mean_column(head: str, means: Sequence[Mean | None]) -> Column:
    return Column(head, tuple(map(with_interval, means)), tuple(mean.value if mean else None for mean in means))


def _figure_columns(table: Table, test: str = TEST) -> Iterator[Column]:
    """Yield the tasks group by group, each group's mean, the mean of the groups and that of all tasks."""
    several = len(table.groups) > 1
    for group, tasks in table.groups.items():
        yield from _task_columns(table, tasks, test)
        if several and len(tasks) > 1:
            means = [mean_of_tasks(row, tasks, test) for row in table.rows]
            texts = tuple(percent(mean.value if mean else None, 2) for mean in means)
            values = tuple(mean.value if mean else None for mean in means)
            yield Column(f"{group}: mean of {len(tasks)} tasks{_said(table, tasks)}", texts, values)
    if several and len(table.groups) < len(table.tasks):
        means = [mean_of_groups(row, table.groups, test) for row in table.rows]
        yield _mean_column(f"mean of {len(table.groups)} groups{_said(table, table.tasks)}", means)
    means = [mean_of_tasks(row, table.tasks, test) for row in table.rows]
    yield _mean_column(f"mean of {_count(table)}{_said(table, table.tasks)}", means)


def _count(table: Table) -> str:
    return f"{len(table.tasks)} task{'s' * (len(table.tasks) != 1)}"


def _against(table: Table, row: RecipeRow, method: str, tasks: Sequence[str], test: str = TEST) -> Paired | None:
    """Compare a row with a baseline on the tasks; None where either lacks one."""
    other = table.baseline(method, row)
    found = paired(row.on(tasks), other.on(tasks), test) if other else None
    return found if found and found.tasks == len(tasks) else None


def _difference_columns(table: Table) -> Iterator[Column]:
    for method in table.baselines:
        found = [_against(table, row, method, table.tasks) for row in table.rows]
        yield Column(f"Δ {method}", tuple(points(one.mean if one else None, 2) for one in found))


def _macro_f1_column(table: Table) -> Iterator[Column]:
    """Show what top-1 hides where classes are of different sizes: how a method does on each of them."""
    if MEAN in table.measures.values() or R2 in table.measures.values():
        return  # each label has its own, or none
    values = tuple(macro_f1(row, table.tasks) for row in table.rows)
    yield Column(f"macro-F1 (%), mean of {_count(table)}", tuple(percent(value, 2) for value in values), values)


def _cost_columns(table: Table) -> Iterator[Column]:
    found = [costs(row, table.tasks) for row in table.rows]
    yield Column("parameters without head", tuple(f"{one.parameters:,.0f}" for one in found))
    yield Column("adapter kB with head", tuple(f"{one.adapter_bytes / 1000:,.1f}" for one in found))
    yield Column("minutes per training", tuple(_scaled(one.seconds, 60) for one in found))
    yield Column("minutes of search per task", tuple(_scaled(one.search_seconds, 60) for one in found))
    yield Column("peak GB", tuple(_scaled(one.peak_memory_bytes, 1e9) for one in found))
    if any(one.learned_top1 is not None for one in found):
        rates = [one.learned_top1 for one in found]
        yield Column("top-1 on training images, last epoch", tuple(percent(rate) for rate in rates))
    if any(one.diverged for one in found):
        yield Column("diverged trainings", tuple(str(one.diverged) for one in found))


def _scaled(value: float | None, unit: float) -> str:
    return NONE if value is None else f"{value / unit:.2f}"


def _main(table: Table) -> Sheet:
    figures = (*_figure_columns(table), *_difference_columns(table), *_macro_f1_column(table))
    columns = (_method_column(table), *figures, *_cost_columns(table))
    return Sheet(f"{_title(table)}: {_heading(table)}", caption(table), columns, tuple(_notes(table)))


def _heading(table: Table) -> str:
    measures = table.measures.values()
    return "top-1 accuracy (%)" if only_top1(measures) else f"{shown(measures)} (%)"


def _title(table: Table) -> str:
    return f"{table.condition.protocol}, {table.condition.backbone}"


def _notes(table: Table) -> Iterator[str]:
    for row in table.rows:
        missing = row.missing(table.tasks)
        if missing:
            yield f"{NONE}: {row.label} has no result for {', '.join(missing)}, and so no means."
        counts = {len(seeds) for seeds in row.cells().values()}
        if len(counts) > 1:
            yield f"{row.label} has {min(counts)} to {max(counts)} seeds per task."
    for method in table.baselines:
        for row in table.rows:
            found = _against(table, row, method, table.tasks)
            own = sum(map(len, row.cells().values()))
            if found and found.pairs < own:
                yield f"Δ {method} of {row.label}: only the {found.pairs} of {own} trainings that both have."


def _shifted(table: Table) -> Sheet:
    """Show the test sets of another domain beside the test images of the tasks that have them."""
    sets = table.shifted
    tasks = tuple(task for task in table.tasks if any(task in names for names in sets.values()))
    columns = [_method_column(table), _shift_column(table, TEST, tasks)]
    columns += [_shift_column(table, name, names) for name, names in sets.items()]
    if len(sets) > 1:
        means = [_mean_of_sets(row, sets) for row in table.rows]
        columns.append(Column(f"mean of {len(sets)} shifted sets", tuple(percent(m, 2) for m in means), tuple(means)))
    if len(tasks) > 1:
        for name, names in sets.items():
            each = _task_columns(table, names, name)
            columns += [Column(f"{one.head}, {name}", one.texts, one.values) for one in each]
    among = {
        f"{name}: answers are taken among the {measured.restricted_to} classes that it has"
        for result in table.results
        for name, measured in result.measured.items()
        if measured.restricted_to
    }
    lacking = [
        f"{NONE}: {row.label} has no result on {name} for {', '.join(row.missing(names, name))}."
        for row in table.rows
        for name, names in sets.items()
        if row.missing(names, name)
    ]
    caption = ". ".join([
        f"Conditions as in the table above. The same trained models on {', '.join(sets)}: images of another domain, on "
        "which nothing was trained or chosen",
        f"Brackets: 95 % interval {interval_kinds(table.rows, tasks)}",
        *sorted(among),
    ]) + "."  # fmt: skip
    return Sheet(f"{_title(table)}: shifted test sets, {_heading(table)}", caption, tuple(columns), tuple(lacking))


def _shift_column(table: Table, name: str, tasks: Sequence[str]) -> Column:
    means = [mean_of_tasks(row, tasks, name) for row in table.rows]
    head = name if len(tasks) == 1 else f"{name}: mean of {len(tasks)} tasks"
    return _mean_column(f"{head}{_said(table, tasks)}", means)


def _mean_of_sets(row: RecipeRow, sets: Mapping[str, Sequence[str]]) -> float | None:
    means = [mean_of_tasks(row, tasks, name) for name, tasks in sets.items()]
    known = [mean.value for mean in means if mean]
    return sum(known) / len(known) if len(known) == len(sets) else None


def _pairs(table: Table) -> Iterator[tuple[str, Paired]]:
    """Yield each row against each baseline, on every test set; of two baselines, one against the other only once."""
    for test in (TEST, *table.shifted):
        seen: set[tuple[str, str]] = set()
        for method in table.baselines:
            for row in table.rows:
                other = table.baseline(method, row)
                found = paired(row, other, test) if other and (other.label, row.label) not in seen else None
                if found:
                    seen.add((found.first, found.second))
                    yield test, found


def _compared(table: Table, found: Sequence[tuple[str, Paired]]) -> Sheet:
    kinds = dict.fromkeys(one.interval.over for _, one in found if one.interval)
    columns = (
        Column("difference", tuple(f"{one.first} − {one.second}" for _, one in found)),
        *([Column("test set", tuple(test for test, _ in found))] if table.shifted else []),
        Column("mean (points)", tuple(points(one.mean, 2) for _, one in found)),
        Column("95 % interval", tuple(_difference_limits(one.interval) for _, one in found)),
        Column("interval over", tuple(one.interval.over if one.interval else NONE for _, one in found)),
        Column("tasks won", tuple(str(one.won) for _, one in found)),
        Column("lost", tuple(str(one.lost) for _, one in found)),
        Column("tied", tuple(str(one.tied) for _, one in found)),
        Column("tasks", tuple(str(one.tasks) for _, one in found)),
        Column("pairs of trainings", tuple(str(one.pairs) for _, one in found)),
    )
    resampled = f", bootstrap over {' or '.join(kinds)}" if kinds else ""
    caption = (
        "Conditions as in the table above. Mean over the tasks of the differences between trainings with the same task "
        f"and seed, on those that both methods have{resampled}. A task is won where the mean over its seeds is higher."
    )
    return Sheet(f"{_title(table)}: paired differences", caption, columns)


def _difference_limits(interval: Interval | None) -> str:
    return NONE if interval is None else f"[{points(interval.low, 2)}, {points(interval.high, 2)}]"


def csv(results: Sequence["Result"], order: Sequence[str] = (), against: str | None = None) -> str:
    """Return a line per row, task and test set, and one per mean, as CSV with heads.

    Figures and differences are shares, with all digits; times are in seconds, memory and adapters in bytes. A line
    of a mean has no task; a mean that lacks a task is left out. `measure` says what `figure` is; `top1` is empty where
    it is anything else. With `against`, what others published follows in lines of its own, which name their source;
    ours have none.

    Raises:
        VisgraftError: as `sheets`.
    """
    _check_against(against)
    found = tables(results, order)
    lines = [line for table in found for row in table.rows for line in _csv_lines(table, row)]
    if against == PUBLISHED:
        lines = [{"source": "", **line} for line in lines]
        known = {(table.condition.protocol, published_backbone(table)): None for table in found}
        lines += [line for benchmark, backbone in known for line in published_lines(benchmark, backbone)]
    heads = dict.fromkeys(name for line in lines for name in line)
    text = io.StringIO()
    writer = csv_format.DictWriter(text, list(heads), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_lines(table: Table, row: RecipeRow) -> Iterator[dict[str, Any]]:
    for test, members in {TEST: table.tasks, **table.shifted}.items():
        groups = {group: [task for task in tasks if task in members] for group, tasks in table.groups.items()}
        groups = {group: tasks for group, tasks in groups.items() if tasks}
        for group, tasks in groups.items():
            for task in tasks:
                yield from _csv_line(table, row, test, mean_of_tasks(row, [task], test), [task], group, task)
            if len(groups) > 1:
                yield from _csv_line(table, row, test, mean_of_tasks(row, tasks, test), tasks, group)
        if len(groups) > 1:
            yield from _csv_line(table, row, test, mean_of_groups(row, groups, test), members)
        yield from _csv_line(table, row, test, mean_of_tasks(row, members, test), members)


def _csv_line(
    table: Table, row: RecipeRow, test: str, mean: Mean | None, tasks: Sequence[str], group: str = "", task: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield a line, with the same names in all; none where the mean lacks a task."""
    if mean is None:
        return
    condition, own = asdict(table.condition), row.on(tasks)
    centre, scale = (" ".join(f"{value:g}" for value in values) for values in condition.pop("normalisation"))
    values = list(own.cells(test)[task].values()) if task else []
    yield {
        **condition,
        "mean": centre,
        "std": scale,
        "method": row.method,
        "recipe": row.recipe,
        "epochs": row.epochs,
        "test_set": test,
        "group": group,
        "task": task,
        "of": "task" if task else mean.name,
        "trainings": sum(map(len, own.cells(test).values())),
        "images": sum(own.images(test).values()),
        **_csv_figure(table, tasks, mean),
        "deviation_over_seeds": stdev(values) if len(values) > 1 else "",
        "low": mean.interval.low,
        "high": mean.interval.high,
        "interval_over": mean.interval.over,
        "macro_f1": macro_f1(own, tuple(own.cells(test)), test) if "group" not in mean.name else "",
        **{f"minus_{method}": _csv_difference(table, own, method, test, mean) for method in BASELINES},
        **costs(own, tasks)._asdict(),
    }


def _csv_figure(table: Table, tasks: Sequence[str], mean: Mean) -> dict[str, Any]:
    measures = {table.measures[task] for task in tasks}
    measure = measures.pop() if len(measures) == 1 else MIXED
    return {"top1": mean.value if measure == TOP1 else "", "measure": measure, "figure": mean.value}


def _csv_difference(table: Table, own: RecipeRow, method: str, test: str, mean: Mean) -> float | str:
    """Return the paired difference; empty beside a mean of groups, of which it would not be the difference."""
    tasks = tuple(own.cells(test))
    found = _against(table, own, method, tasks, test)
    return "" if found is None or "group" in mean.name else found.mean
