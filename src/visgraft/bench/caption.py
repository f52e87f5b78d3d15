"""How the numbers of a table came about, in a paragraph."""

from collections.abc import Sequence

from visgraft.bench.measures import MEAN, R2, SHOWN, only_top1
from visgraft.bench.statistics import RecipeRow, Table, mean_of_tasks
from visgraft.options import AUTO


def caption(table: Table) -> str:
    """Return how a table's numbers came about, in a paragraph."""
    one, results = table.condition, table.results
    mean, std = (", ".join(f"{value:g}" for value in values) for values in one.normalisation)
    weights = "random weights, drawn anew with each seed" if one.weights == "none" else f"weights: {one.weights}"
    digest = f", digest {one.digest[:12]}" if one.digest else ""
    resizing = "resized to it without a crop" if one.resizing == "squash" else f"crop mode {one.resizing}"
    trained = {"train+val": "training and validation images"}.get(one.final_parts, "training images")
    several = any(len(seeds) > 1 for row in table.rows for seeds in row.cells().values())
    spread = " ± standard deviation over seeds" if several else ""
    versions = {f"{name} {number}" for result in results for name, number in result.versions.items()}
    seeds = sorted({result.trial.seed for result in results})
    revisions = sorted({result.revision for result in results})
    threads = sorted({result.threads for result in results})
    over = interval_kinds(table.rows, table.tasks)
    sentences = [
        f"{one.protocol} with {one.backbone} ({weights}{digest})",
        f"Images of {one.image_size} pixels, {resizing}, normalised with mean {mean} and standard deviation {std}",
        f"Trained on the {trained} for {_epochs(table.rows)}, and measured once, after the last epoch",
        f"Settings: {_selection(table.rows)}",
        f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        f"Cells: {_cells(table)} in percent on the test images{spread}",
        *([f"Brackets: 95 % interval {over}"] if over else []),
        *(["Δ: paired difference in points, over the same tasks and seeds"] if table.baselines else []),
        f"Device: {one.device} ({' or '.join(map(str, threads))} CPU threads per training), {one.precision}",
        f"Versions: {', '.join(sorted(versions))}; source {', '.join(revisions)}",
    ]
    if one.reduced:
        sentences.insert(0, "**Reduced: the numbers of images are not the published ones**")
    return ". ".join(sentences) + "."


def _cells(table: Table) -> str:
    """Say what the figures are, and of several measures or labels, of which task or label."""
    if only_top1(table.measures.values()):
        return "top-1"
    found: dict[str, list[str]] = {}
    for task, measure in table.measures.items():
        found.setdefault(measure, []).append(task)
    several = len(found) > 1
    said = [SHOWN[one] + (f" ({', '.join(tasks)})" if several else "") for one, tasks in found.items()]
    floor = ", R² counted as 0 below 0," if {R2, MEAN} & found.keys() else ""
    return f"{' and '.join(said)}{floor}"


def _epochs(rows: Sequence[RecipeRow]) -> str:
    found: dict[int, list[str]] = {}
    for row in rows:
        if row.method != AUTO:
            found.setdefault(row.epochs, []).append(row.label)
    if not found:
        return "as many epochs as the method chosen takes"
    if len(found) == 1:
        return f"{next(iter(found))} epochs"
    return " and ".join(f"{epochs} epochs ({', '.join(labels)})" for epochs, labels in sorted(found.items()))


def _selection(rows: Sequence[RecipeRow]) -> str:
    """Say how the rows' settings were chosen."""
    found: dict[str, list[str]] = {}
    for row in rows:
        ways: dict[str, None] = {}
        for result in row.results:
            selection = result.selection
            if selection.get("rule") == "none":
                ways[f"recipe {row.recipe}, nothing tried"] = None
            else:
                epochs, seed = selection.get("epochs"), selection.get("seed")
                ways[f"recipe {row.recipe}, best of {len(selection['tried'])} on the validation images per task"
                     f" (trainings of {epochs} epochs, seed {seed})"] = None  # fmt: skip
        found.setdefault("; or ".join(ways), []).append(row.label)
    return "; ".join(f"{', '.join(labels)}: {way}" for way, labels in found.items())


def interval_kinds(rows: Sequence[RecipeRow], tasks: Sequence[str]) -> str:
    """Say what the intervals of the rows' means generalise over."""
    found: dict[str, list[str]] = {}
    for row in rows:
        mean = mean_of_tasks(row, tasks)
        if mean:
            found.setdefault(mean.interval.over, []).append(row.label)
    if len(found) == 1:
        return f"over {next(iter(found))}"
    return " and ".join(f"over {kind} ({', '.join(labels)})" for kind, labels in found.items())
