"""The verb `rank`: the best smaller adapter of a linear one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visgraft.cli.arguments import AdapterFolder, Json, Quiet, Weights
from visgraft.cli.diff import Pictures

if TYPE_CHECKING:
    from visgraft.algebra.truncation import Truncation


def rank(
    adapter: AdapterFolder,
    to: Annotated[int, typer.Option("--to", help="rank of each map of the new adapter", show_default=False)],
    out: Annotated[Path, typer.Option(help="new folder for the smaller adapter", show_default=False)],
    images: Pictures = None,
    weights: Weights = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Cut the maps of a linear adapter to a smaller rank, and tell what that costs."""
    from visgraft.algebra.truncation import check_new, truncate_adapter
    from visgraft.cli.predict_images import spread_images
    from visgraft.cli.show import emit

    check_new(to, out)
    paths = None if images is None else spread_images(images)
    made = truncate_adapter(adapter, to, out, images=paths, weights=weights)
    emit(made.to_dict(), json, lambda: _print_result(made))


def _print_result(made: "Truncation") -> None:
    from visgraft.cli.show import percent, print_pairs, print_table, warn

    rows = {
        "written": f"{made.out}, of the method {made.method}",
        "rank": f"{made.rank}, from {made.rank_before} at most",
        "parameters": f"{made.parameters:,}, from {made.parameters_before:,}, without the head",
        "energy kept": f"{percent(made.energy)} %",
    }
    if (agreement := made.agreement) is not None:
        low, high = agreement.interval
        within = f"(95 % interval {percent(low)} to {percent(high)})"
        rows["answers alike"] = f"{percent(agreement.share)} % of {agreement.images} images  {within}"
        if agreement.largest_difference is not None:
            rows["logits"] = f"differ by {agreement.largest_difference:.2g} at most"
    print_pairs(rows)
    shown = [[f"block {block}", percent(energy)] for block, energy in made.energy_by_block.items()]
    print_table("", ["", "energy kept (%)"], shown)
    if made.parameters > made.parameters_before:
        warn(
            f"this takes more parameters than before, because {made.method} writes maps of this rank in more numbers; "
            "a smaller --to takes fewer"
        )
