"""Measure adapters on data, and merge them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from visgraft.adapters.directory import Adapted, load, read_record
from visgraft.adapters.hub import FILES, on_hub, resolve, settled
from visgraft.adapters.record import AdapterRecord
from visgraft.core.attach import count_parameters
from visgraft.data.dataset import PARTS, Dataset, Example, Split, listed
from visgraft.data.examples import classes_of, labels_of, tasks_of
from visgraft.data.images import Images, Loading, load_images
from visgraft.data.read import AnySource, Source, read_data, with_column
from visgraft.data.tasks import TaskLabels
from visgraft.errors import AdapterError, DataError, UnknownClasses
from visgraft.measure.evaluation import Evaluation, evaluate, peak_memory_bytes
from visgraft.measure.numbers import NumberFigures

_DEFAULT_LOADING = Loading()
UNDIVIDED = Split(0.0, 0.0)


def adapter_bytes(path: Path) -> int:
    """Return the size of everything in an adapter's directory; of one on the hub, of its own files."""
    names = FILES if on_hub(path) else None
    return sum(file.stat().st_size for file in resolve(path).iterdir() if names is None or file.name in names)


def figures_of(evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the figures of an evaluation as plain JSON values; None for those that were not measured."""
    names = ("top1", "top1_ci95", "macro_f1", "balanced_accuracy", "mean_average_precision")
    values = {name: None if evaluation is None else getattr(evaluation, name) for name in names}
    interval = values["top1_ci95"]
    tasks = {} if evaluation is None else {name: task_figures(one) for name, one in evaluation.by_task.items()}
    told = {"mean": None if evaluation is None else evaluation.figure, "tasks": tasks} if tasks else {}
    return {
        **values,
        "top1_ci95": None if interval is None else list(interval),
        "images": 0 if evaluation is None else evaluation.images,
        **told,
    }


def task_figures(one: Evaluation | NumberFigures) -> dict[str, Any]:
    """Return the figures of one task of several as plain JSON values, without those that its kind has not."""
    if isinstance(one, NumberFigures):
        return one.to_json()
    return {name: value for name, value in figures_of(one).items() if value is not None}


def sizes_of(model: nn.Module, adapter: Path) -> dict[str, int]:
    """Return the numbers of trained parameters and the bytes of the adapter."""
    counts = count_parameters(model)
    return {
        "params_adapter": counts.adapter,
        "params_head": counts.head,
        "adapter_bytes": adapter_bytes(adapter),
    }


def skipped_of(images: Images) -> list[dict[str, str]]:
    """Return the images that were left out, with the reasons."""
    return [{"image": str(path), "reason": reason} for path, reason in images.skipped]


def adapter_data(adapter: Path, data: AnySource) -> tuple[Dataset, bool]:
    """Return data divided as they were for this adapter, and whether they are those that it was trained on.

    Classes are matched by name and numbered as the adapter's outputs; the data may lack some.

    Raises:
        AdapterError: the adapter does not name its classes, or has several per image and the data one, or vice versa.
        DataError: the data cannot be used, or have a class that the adapter does not know.
    """
    record = read_record(adapter)
    if not record.classes:
        raise AdapterError(f"{adapter} does not name its classes; save it with classes=, in the order of its outputs")
    if record.tasks:
        dataset = read_data(data, UNDIVIDED, tasks=record.tasks)
        same = record.fingerprint == dataset.fingerprint
        return (read_data(data, record.split, tasks=record.tasks) if same and record.split else dataset), same
    if isinstance(data, Source) and (data.tasks or data.labels):
        raise AdapterError(f"{adapter} answers one question, with classes; leave --task out")
    if column := record.facts.get("data", {}).get("label_column"):
        data = with_column(data, column, record.multi_label)
    try:
        dataset = read_data(data, UNDIVIDED, record.classes)
    except UnknownClasses as error:
        if error.multi_label != record.multi_label:
            raise _other_kind(data, adapter, error.multi_label) from error
        raise
    if dataset.multi_label != record.multi_label:
        raise _other_kind(data, adapter, dataset.multi_label)
    same = record.fingerprint == dataset.fingerprint
    return (read_data(data, record.split, record.classes) if same and record.split else dataset), same


def _other_kind(data: AnySource, adapter: Path, multi_label: bool) -> AdapterError:
    kind = {True: "several classes per image", False: "one class per image"}
    return AdapterError(f"{data} has {kind[multi_label]}, but {adapter} was trained on {kind[not multi_label]}")


def classes_without(examples: Sequence[Example], classes: Sequence[str]) -> list[str]:
    """Return the classes of which there is no image, without those of tasks that no image has a label of."""
    coded = labels_of(examples)
    there = {label for code in set(coded.codes.tolist()) for label in classes_of(coded.values[code])}
    tasks, absent = tasks_of(examples), unlabelled_tasks(examples)
    others = {name for task in tasks if not task.classes or task.name in absent for name in task.output_names}
    return [name for number, name in enumerate(classes) if number not in there and name not in others]


def unlabelled_tasks(examples: Sequence[Example]) -> list[str]:
    """Return the tasks that no image has a label of, or, of several classes, none but that there is none."""
    coded = labels_of(examples)
    used = [coded.values[code] for code in set(coded.codes.tolist())]
    found = []
    for place, task in enumerate(tasks_of(examples)):
        values = [label.values[place] for label in used if isinstance(label, TaskLabels)]
        if all(value is None or value == () for value in values):
            found.append(task.name)
    return found


def _left_out(dataset: Dataset, examples: Sequence[Example], part: str) -> dict[str, str]:
    """Return why tasks are not measured, by name.

    Raises:
        DataError: none is left.
    """
    which = "" if part == "all" else f"{part} "
    names = unlabelled_tasks(examples)
    if names and len(names) == len(dataset.tasks):
        raise DataError(
            f"{dataset.root}: no {which}image has a label of {listed(names)}; fill in some, or choose another part "
            "with --split"
        )
    return {name: dataset.absent.get(name, f"no {which}image has a label of it") for name in names}


def _examples(dataset: Dataset, same: bool, part: str, adapter: Path) -> Sequence[Example]:
    """Return the examples to measure an adapter on.

    Raises:
        DataError: no such part; or data other than those trained on, so that nothing tells parts apart that were drawn.
    """
    if part == "all":
        return dataset.all
    there = {name: len(dataset.part(name)) for name in PARTS if getattr(dataset, name)}
    drawn = dataset.layout == "flat" or (dataset.split is not None and part != "test")
    if drawn and not same and (dataset.layout == "flat" or part in there or (part == "val" and "train" in there)):
        raise DataError(
            f"{dataset.root} is not, or no longer, what {adapter} was trained on, so its {part} images cannot be "
            "told from those it may have learned; pass --split all if it learned none of them"
        )
    if part in PARTS and part not in there:
        counts = ", ".join(f"{name} with {count:,}" for name, count in there.items())
        raise DataError(f"{dataset.root} has no {part} images; choose another part with --split: {counts}, or all")
    return dataset.part(part)


def load_as_trained(examples: Sequence[Example], record: AdapterRecord, classes: int, loading: Loading) -> Images:
    """Load images as they were for the adapter's training."""
    loading = dataclasses.replace(loading, background=loading.background or record.background)
    return load_images(examples, record.data_config, outputs=classes, **vars(loading))


def eval_adapter(
    adapter: Path,
    data: AnySource,
    *,
    weights: str | None = None,
    part: str = "test",
    loading: Loading = _DEFAULT_LOADING,
) -> dict[str, Any]:
    """Measure an adapter on the test images of a data set, or on `val`, `train` or `all`.

    Of an adapter with several tasks, `tasks_left_out` says which were not measured, and why.

    Raises:
        AdapterError: the adapter does not name its classes, or the data ask for something else.
        DataError: the data cannot be used, or have no label that the adapter answers.
    """
    return measure_adapter(adapter, data, weights=weights, part=part, loading=loading)[0]


@settled()
def measure_adapter(
    adapter: Path,
    data: AnySource,
    *,
    weights: str | None = None,
    part: str = "test",
    loading: Loading = _DEFAULT_LOADING,
) -> tuple[dict[str, Any], Evaluation, Images, Adapted]:
    """`eval_adapter` with all that it was computed from, for reports."""
    record = read_record(adapter)
    dataset, same = adapter_data(adapter, data)
    examples = _examples(dataset, same, part, adapter)
    left_out = _left_out(dataset, examples, part)
    adapted = load(adapter, weights=weights)
    images = load_as_trained(examples, record, len(dataset.classes), loading)
    evaluation = evaluate(adapted.model, images, record.precision)  # as in training, so that figures compare
    figures = {
        "adapter": str(adapter),
        "method": record.method.method,
        "backbone": record.backbone.name,
        "split": part,
        **figures_of(evaluation),
        **({"tasks_left_out": left_out} if record.tasks else {}),
        "classes_missing": classes_without(examples, record.classes),
        "skipped": skipped_of(images),
        "precision": record.precision,
        **sizes_of(adapted.model, adapter),
        "seconds": evaluation.seconds,
        "images_per_second": evaluation.images / evaluation.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return figures, evaluation, images, adapted
