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
        _print_kind(config)
        _print_answers(record, config["classes"])
        _print_figures(config["record"].get("metrics", {}))

    emit(config, json, text)


def _print_kind(config: Mapping[str, Any]) -> None:
    from visgraft.cli.show import result_console
    from visgraft.search.verdict import written

    backbone, numbers = config["backbone"], config.get("parameters", {})
    result_console.print(f"{config['method']} on {backbone['name']} (weights: {backbone['weights']})")
    result_console.print(f"options: {' '.join(written(config['method_config'])) or 'none'}")
    counts = [f"{name} {count:,}" for name, count in numbers.items()]
    result_console.print(f"parameters: {', '.join(counts) or 'not counted'}")
    channels, *size = config["data_config"]["input_size"]
    pixels = " × ".join(map(str, size))
    result_console.print(f"input: {channels} channels of {pixels} pixels; {config['adapter_bytes'] / 1000:,.0f} KB")


def _print_answers(record: "AdapterRecord", classes: list[str]) -> None:
    from visgraft.adapters.calibrated import told_calibration
    from visgraft.cli.show import result_console

    for task in record.tasks:
        result_console.print(": ".join([str(task), ", ".join(task.classes)][: 2 if task.classes else 1]))
    if not record.tasks:
        result_console.print(f"classes: {', '.join(classes)}")
    sure = "; ".join(told_calibration(record.calibrated, record.tasks))
    result_console.print(f"calibrated: {sure or 'no, so predict --coverage refuses it'}")
    marks = "told" if record.unlike else "not told, so predict --unlike refuses it"
    result_console.print(f"unlike pictures: {marks}")


def _print_figures(metrics: Mapping[str, Any]) -> None:
    """Print what was measured when the adapter was made; of a name that is not known, as it stands."""
    from visgraft.cli.show import percent, print_tasks, result_console

    known = {name: value for name, value in metrics.items() if value is not None}
    tasks = known.pop("val_tasks", {})
    one = {name.removeprefix("val_"): value for name, value in known.items()}
    if "mean" in one:
        result_console.print(f"validation: mean of the tasks {percent(one['mean'])} %")
        print_tasks(tasks)
    elif {"macro_f1", "images"} <= one.keys() and one.keys() & {"top1", "mean_average_precision"}:
        print_tasks({"validation": one}, indent="")
    else:
        for name, value in known.items():
            result_console.print(f"{name}: {value}")
