"""The verb `nearest`: which of many adapters fits a few labelled images best."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visgraft.cli.arguments import Json, Quiet, TypedLoading, Weights
from visgraft.cli.bundles import with_bundles
from visgraft.cli.labels import TypedImages

if TYPE_CHECKING:
    from visgraft.algebra.nearest import FeatureScore, NearestAdapters


@with_bundles
def nearest(
    images: TypedImages,
    *,
    among: Annotated[Path | None, typer.Option(help="folder with adapters of one backbone, at any depth")] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="also measure the adapters' own answers, where they answer the images' classes"),
    ] = False,
    top: Annotated[int | None, typer.Option(help="how many adapters to list; none: all", min=1)] = None,
    weights: Weights = None,
    reading: TypedLoading,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Find which of many adapters fits a few labelled images best, by a linear head on each one's features."""
    from dataclasses import replace

    from visgraft.algebra.nearest import nearest_adapters
    from visgraft.cli.show import emit
    from visgraft.errors import VisgraftError

    if among is None:
        raise VisgraftError("there are no adapters to choose from; give --among DIR, a folder that holds some")
    with _progress() as show:
        found = nearest_adapters(
            images.source(), among, weights=weights, full=full, loading=reading.loading(), on_progress=show
        )
    listed = replace(found, adapters=found.adapters[:top])
    emit(listed.to_dict(), json, lambda: _print_result(found, listed, full))


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that shows how many adapters are done: a bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from visgraft.cli.show import progress_console

    columns = (TextColumn("adapters"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console, transient=True, disable=not progress_console.is_terminal) as bar:
        task = bar.add_task("adapters", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_result(found: "NearestAdapters", listed: "NearestAdapters", full: bool) -> None:
    from visgraft.cli.show import print_table, progress_console, result_console

    title = f"{found.images} images of {found.classes} classes, {found.folds} folds, on features of {found.backbone}"
    columns = ["adapter", "method", "top-1 (%)", "95 % interval", "above plain", *(["own answers (%)"] if full else [])]
    rows = [_row(score, full) for score in (*listed.adapters, *found.plain)]
    print_table(title, columns, rows)
    if len(listed.adapters) < len(found.adapters):
        result_console.print(f"and {len(found.adapters) - len(listed.adapters)} more\n")
    if any(score.learned for score in listed.adapters):
        result_console.print("* was trained on images of this data set, which flatters it\n")
    result_console.print(verdict(found))
    if found.left_out:
        progress_console.print(f"left out {len(found.left_out)}:", style="yellow")
    for one in found.left_out:
        progress_console.print(f"  {one.name}: {one.reason}")


def _row(score: "FeatureScore", full: bool) -> list[str]:
    from visgraft.cli.show import percent

    low, high = score.interval
    gain = "–" if score.gain is None else f"{100 * score.gain:+.1f} ± {100 * (score.gain_half_width or 0):.1f}"
    own = [percent(score.own)] if full else []
    name = score.name + ("*" if score.learned else "")
    return [name, score.method or "–", percent(score.score), f"{percent(low)} to {percent(high)}", gain, *own]


def verdict(found: "NearestAdapters") -> str:
    """Say in a sentence which adapter fits best, and whether chance could have made it so."""
    from visgraft.cli.show import percent

    best = found.adapters[0]
    if not best.clear:
        said = f"no adapter is shown to fit these images better than the plain backbone; {best.name} comes first"
    else:
        said = (
            f"{best.name} fits best: {percent(best.score)} % by a linear head, {100 * (best.gain or 0):.1f} above plain"
        )
    if found.lead is not None and len(found.adapters) > 1:
        how = "more than chance" if found.lead.clear else "no more than chance"
        said += f"; its lead over {found.adapters[1].name} is {how} would make"
    return said
