"""The verb `import`: a LoRA that Hugging Face's peft trained on a timm model, as an adapter of visgraft."""

from pathlib import Path
from typing import Annotated, Any

import typer

from visgraft.cli.arguments import Json, Quiet, Weights
from visgraft.cli.train import backbone_names
from visgraft.errors import VisgraftError


def import_(
    folder: Annotated[Path, typer.Argument(help="folder that peft's save_pretrained wrote", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for the adapter", show_default=False)],
    backbone: Annotated[
        str | None,
        typer.Option(
            help="timm model that it was trained on; none: as in visgraft.json", autocompletion=backbone_names
        ),
    ] = None,
    weights: Weights = None,
    image_size: Annotated[int | None, typer.Option(help="pixels; none: the model's own")] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="names of the outputs, separated by commas, or a .txt file with one in a line"),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Turn a LoRA of Hugging Face's peft into an adapter, and prove that it answers alike."""
    from visgraft.export.format import missing_packages
    from visgraft.export.formats import FORMATS

    if lacking := missing_packages(FORMATS["peft"]):
        raise VisgraftError(f"import needs {' and '.join(lacking)}; run: pip install 'visgraft[peft]'")
    from visgraft.export.peft_import import import_peft

    result = import_peft(
        folder, out, backbone=backbone, weights=weights, image_size=image_size, classes=_names(classes)
    )
    _print_result(result, json)


def _names(given: str | None) -> list[str]:
    """Return the class names that were typed, or that stand in the file that was.

    Raises:
        VisgraftError: the file cannot be read, or one name is empty.
    """
    if given is None:
        return []
    names = given.split(",")
    if given.endswith(".txt"):
        try:
            names = Path(given).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise VisgraftError(
                f"--classes {given} cannot be read ({error}); name a file with one class in a line"
            ) from error
    names = [name.strip() for name in names]
    if "" in names:
        raise VisgraftError("--classes has an empty name; give one for each output, in their order")
    return names


def _print_result(result: dict[str, Any], json: bool) -> None:
    from visgraft.cli.show import emit, print_pairs

    def text() -> None:
        where = f", last {result['last_blocks']} blocks" if result["last_blocks"] else ""
        print_pairs(
            {
                "written": result["out"],
                "method": f"lora of rank {result['rank']} at {', '.join(result['targets'])}{where}",
                "answers": f"no logit differs from peft's by more than {result['largest_difference']:.1e} on "
                f"{result['images']} drawn pictures ({result['tolerance']:.1e} allowed)",
                "outputs": ", ".join(result["classes"]) or f"{result['outputs']}, without names",
            }
        )

    emit(result, json, text)
