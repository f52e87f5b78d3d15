"""The verb `export`: an adapter with its backbone as a file for another runtime, proven by that runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from visgraft.cli.arguments import AdapterFolder, Background, Cache, Json, Quiet, Weights
from visgraft.errors import VisgraftError
from visgraft.options import flag_of


def export(
    adapter: AdapterFolder,
    form: Annotated[str | None, typer.Option("--format", help="the format to write; --list shows all")] = None,
    out: Annotated[
        Path | None, typer.Option(help="file or folder to write, as the format has it", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="show what is possible for this adapter, and why not")] = False,
    data: Annotated[
        str | None, typer.Option(help="folder, .csv file or hf:NAME to prove the file on; none: drawn pictures")
    ] = None,
    weights: Weights = None,
    cache: Cache = "auto",
    background: Background = None,
    quiet: Quiet = False,
    json: Json = False,
    **values: Any,
) -> None:
    """Write an adapter for another runtime, with a certificate of how it answers there."""
    from visgraft.data.images import Loading
    from visgraft.export.run import export_adapter, list_formats

    if list_:
        given = {"format": form, "out": out, "data": data, "weights": weights, **values}
        if idle := [flag_of(name) for name, value in given.items() if value is not None]:
            raise VisgraftError(f"{', '.join(idle)} has no effect on --list, which is about all formats; leave it out")
        _print_list(list_formats(adapter), str(adapter), json)
        return
    if out is None:
        raise VisgraftError("--out is missing; name the file or folder to write, e.g. --out model.onnx")
    name = form or _by_suffix(out)
    loading = Loading(cache, background=background)
    result = export_adapter(adapter, out, name, data=data, weights=weights, loading=loading, **values)
    _print_result(result, json)


def _by_suffix(out: Path) -> str:
    """Return the format whose files end as `out` does.

    Raises:
        VisgraftError: there is none.
    """
    from visgraft.export.formats import FORMATS

    found = [name for name, form in FORMATS.items() if form.suffix and form.suffix == out.suffix]
    if not found:
        endings = ", ".join(sorted({form.suffix for form in FORMATS.values() if form.suffix}))
        raise VisgraftError(
            f"the name {out} does not tell the format ({endings} would); add --format: {', '.join(FORMATS)}"
        )
    return found[0]


def _print_list(rows: list[dict[str, Any]], adapter: str, json: bool) -> None:
    from visgraft.cli.show import emit, print_table, result_console

    def text() -> None:
        shown = [
            [row["format"], row["summary"], "yes" if row["possible"] else "no", row["install"] or "installed"]
            for row in rows
        ]
        print_table(f"ways out for {adapter}", ["format", "what it is", "possible", "needs"], shown)
        for row in rows:
            if row["why_not"]:
                result_console.print(f"{row['format']}: {row['why_not']}")

    emit(rows, json, text)


def _print_result(result: dict[str, Any], json: bool) -> None:
    from visgraft.cli.show import emit, percent, print_agreement, print_pairs, result_console

    def text() -> None:
        ratio = result["seconds_per_image"] / result["torch_seconds_per_image"]
        pairs = {
            "written": f"{result['out']}, {result['bytes'] / 1e6:.1f} MB, in {result['seconds']:.0f} s",
            "answers": result["verdict"],
            "largest logit difference": f"{result['largest_difference']:.1e}",
            "same answers": percent(result["agreement"]),
            "computed by": result["computed_by"],
            "time per image": f"{1000 * result['seconds_per_image']:.1f} ms, {ratio:.2f} of eager torch's",
        }
        if told := _told(result["facts"]):
            pairs["facts"] = told
        if result["accuracy"] is not None:
            pairs["right"] = f"{percent(result['accuracy'])} (torch: {percent(result['torch_accuracy'])})"
        if result["why_not_merged"]:
            pairs["not merged"] = result["why_not_merged"]
        print_pairs(pairs)
        print_agreement(result.get("tasks", {}))
        result_console.print(f"open it with {result['open_with']}")

    emit(result, json, text)


def _told(facts: Mapping[str, Any]) -> str:
    """Return a format's own facts in one line, those that are one word or number each."""
    shown = {
        name: f"{value:.1e}" if isinstance(value, float) else f"{value}"
        for name, value in facts.items()
        if isinstance(value, str | int | float)
    }
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
