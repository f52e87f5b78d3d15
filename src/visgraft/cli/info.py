"""The verb `info`: what an adapter is and reached, from its files alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visgraft.cli.arguments import AdapterFolder, Json

if TYPE_CHECKING:
    from visgraft.adapters.record import AdapterRecord


def info(adapter: AdapterFolder, json: Json = False) -> None:
    """Show what an adapter is, without loading its backbone."""
    from visgraft.adapters.calibrated import ONE_LABEL
    from visgraft.adapters.directory import read_record
    from visgraft.cli.show import emit
    from visgraft.measure.measuring import adapter_bytes

    record = read_record(adapter)
    calibrated = {
        name: {"temperature": one.temperature, "images": one.images} for name, one in record.calibrated.items()
    }
    told = {"calibrated": calibrated.get(ONE_LABEL, calibrated) or None, "tells_unlike": record.unlike is not None}
    config = {**record.to_json(), "adapter_bytes": adapter_bytes(adapter), **told}

    def text() -> None:
        _print_kind(record, config["adapter_bytes"])
        _print_answers(record)
        _print_figures(record.figures)

    emit(config, json, text)


def _print_kind(record: "AdapterRecord", size: int) -> None:
    from visgraft.cli.show import result_console
    from visgraft.cli.text import command_line
    from visgraft.search.verdict import written

    method, backbone = record.method, record.backbone
    result_console.print(f"{method.method} on {backbone.name} (weights: {backbone.weights})")
    options = written(vars(method), vars(type(method)()))
    result_console.print(f"options: {command_line(*options) or 'none'}")
    counts = [f"{name} {count:,}" for name, count in record.parameters.items() if isinstance(count, int)]
    result_console.print(f"parameters: {', '.join(counts) or 'not counted'}")
    channels, *sides = record.data_config.get("input_size", [None])
    pixels = f"{channels} channels of {' × '.join(map(str, sides))} pixels" if sides else "size not known"
    result_console.print(f"input: {pixels}; {size / 1000:,.0f} KB")


def _print_answers(record: "AdapterRecord") -> None:
    from visgraft.adapters.calibrated import told_calibration
    from visgraft.cli.show import result_console

    for task in record.tasks:
        result_console.print(": ".join([str(task), ", ".join(task.classes)][: 2 if task.classes else 1]))
    if not record.tasks:
        result_console.print(f"classes: {', '.join(record.classes) or f'{record.outputs:,} without names'}")
    sure = "; ".join(told_calibration(record.calibrated, record.tasks))
    result_console.print(f"calibrated: {sure or 'no, so predict --coverage refuses it'}")
    marks = "told" if record.unlike else "not told, so predict --unlike refuses it"
    result_console.print(f"unlike pictures: {marks}")


def _print_figures(metrics: Mapping[str, Any]) -> None:
    """Print what was measured when the adapter was made; what no training writes, as it stands."""
    from visgraft.cli.show import percent, result_console

    known = {name: value for name, value in metrics.items() if value is not None}
    one = {name.removeprefix("val_"): value for name, value in known.items() if name.startswith("val_")}
    tasks = one["tasks"] if isinstance(one.get("tasks"), Mapping) else {}
    each = {name: _in_words(found) for name, found in tasks.items()}
    told = set[str]()
    if each and None not in each.values() and isinstance(one.get("mean"), float):
        mean = f" mean of the tasks {percent(one['mean'])} %" if len(each) > 1 else ""
        result_console.print("\n".join([f"validation:{mean}", *(f"  {name}: {text}" for name, text in each.items())]))
        told = {"mean", "tasks", "images"}
    elif text := _in_words(one):
        result_console.print(f"validation: {text}")
        told = {"top1", "top1_ci95", "mean_average_precision", "macro_f1", "images"}
        if isinstance(balanced := one.get("balanced_accuracy"), float):
            result_console.print(f"balanced accuracy: {percent(balanced)} %")
            told.add("balanced_accuracy")
    elif one == {"images": 0}:
        result_console.print("validation: no images")
        told = {"images"}
    for name, value in known.items():
        if name not in {f"val_{each}" for each in told}:
            result_console.print(f"{name}: {value}")


def _in_words(found: Any) -> str | None:
    """Return figures as `eval` prints them; None where they are others, for anybody may write a record."""
    from visgraft.cli.show import figures_in_words

    try:
        return figures_in_words(found)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
