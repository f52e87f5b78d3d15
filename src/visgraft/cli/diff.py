"""The verb `diff`: how far apart two adapters are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visgraft.cli.arguments import Json, Quiet, Weights

if TYPE_CHECKING:
    from visgraft.algebra.apart import Apart
    from visgraft.algebra.diff import AdapterDiff

Pictures = Annotated[
    str | None,
    typer.Option(
        "--images", help="folder, file or quoted pattern of pictures, with labels or without; at most 256 are used"
    ),
]


def diff(
    first: Annotated[Path, typer.Argument(help="folder that `train` wrote, or hf:USER/NAME", show_default=False)],
    second: Annotated[Path, typer.Argument(help="another of the same backbone, of any method", show_default=False)],
    images: Pictures = None,
    out: Annotated[Path | None, typer.Option(help="write a picture of it to this .png, .svg or .pdf file")] = None,
    weights: Weights = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Tell how far apart two adapters are, block by block: their maps, and with --images what they do to pictures."""
    from visgraft.algebra.diff import diff_adapters
    from visgraft.algebra.picture import check_picture, paint_diff
    from visgraft.cli.predict_images import spread_images
    from visgraft.cli.show import emit

    if out is not None:
        check_picture(out)
    paths = None if images is None else spread_images(images)
    found = diff_adapters(first, second, images=paths, weights=weights)
    if out is not None:
        paint_diff(found, out)
    emit(found.to_dict() | {"out": None if out is None else str(out)}, json, lambda: _print_diff(found, out))


def _print_diff(found: "AdapterDiff", out: Path | None) -> None:
    from visgraft.cli.show import percent, print_pairs, result_console

    result_console.print(f"A is {found.first}\nB is {found.second}")
    if found.no_maps is None:
        rows = {part.name: part.maps for part in found.parts}
        _print_parts("how much they change the frozen weights, in % of their norm", rows, found.total)
    else:
        result_console.print(f"\nno maps are compared: {found.no_maps}")
    if found.images:
        rows = {part.name: part.features for part in found.parts if part.features is not None}
        _print_parts(f"how much they change the features of {found.images} images", rows, found.pooled, "into the head")
    agreement = found.agreement
    if agreement is not None:
        low, high = agreement.interval
        within = f"(95 % interval {percent(low)} to {percent(high)})"
        print_pairs({"answers alike": f"{percent(agreement.share)} % of {agreement.images} images  {within}\n"})
    elif found.images:
        result_console.print("their classes differ, so their answers are not compared\n")
    result_console.print("distance: 0 equal, 1 nothing in common, 1.41 opposite; the heads are left out of it")
    if any(part.maps and part.maps.reads is not None for part in found.parts):
        result_console.print(
            "reads, adds: % of the smaller map's directions that the larger has; in brackets: by chance"
        )
    if out is not None:
        result_console.print(f"picture: {out}")


def _print_parts(title: str, rows: "dict[str, Apart | None]", whole: "Apart | None", name: str = "in all") -> None:
    """Print a table of the parts in which anything changes, and of all together."""
    from visgraft.cli.show import print_table, result_console

    told = [[part, *_cells(apart)] for part, apart in rows.items() if apart is not None and apart.distance is not None]
    still = len(rows) - len(told)
    if whole is not None:
        told.append([name, *_cells(whole)])
    columns = ["", "A (%)", "B (%)", "distance", "cosine", "reads (%)", "adds (%)"]
    kept = [i for i in range(len(columns)) if i < 5 or any(row[i] != "–" for row in told)]
    print_table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in told])
    if still:
        result_console.print(f"neither changes anything in {still} other block{'s' if still > 1 else ''}\n")


def _cells(apart: "Apart") -> list[str]:
    from visgraft.cli.show import percent

    cosine, distance = ("–" if value is None else f"{value:.3f}" for value in (apart.cosine, apart.distance))
    chance = apart.chance or (None, None)
    shared = [
        "–" if value is None else f"{value:.0%} ({by_chance:.0%})".replace("%", "")
        for value, by_chance in zip((apart.reads, apart.writes), chance, strict=True)
    ]
    return [percent(apart.first), percent(apart.second), distance, cosine, *shared]
