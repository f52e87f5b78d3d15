"""What the command line's verbs do, as functions: from a folder of images to an adapter, and from there on.

Each returns a dictionary of plain JSON values.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from visgraft.adapter import CONFIG, load, read_config, save, save_plain
from visgraft.attach import assemble, attach, choose_places, count_parameters
from visgraft.backbone import Adapted, Backbone, create_backbone, model_data_config
from visgraft.config import MethodConfig, TrainConfig
from visgraft.data.dataset import Dataset, Example, Split
from visgraft.data.folders import read_folder
from visgraft.data.images import Images, load_images
from visgraft.errors import AdapterError, DataError, SiteError, TrainingDiverged, VisgraftError
from visgraft.evaluate import Evaluation, evaluate, peak_memory_bytes, resolve_precision
from visgraft.files import check_target
from visgraft.merge import merge, mergeable
from visgraft.registry import methods
from visgraft.sites import find_sites
from visgraft.train import Epoch, train

CERTIFICATE_IMAGES = 64
DEFAULT_SPLIT = Split()


def adapter_bytes(path: Path) -> int:
    """Return the size of everything in an adapter directory."""
    return sum(file.stat().st_size for file in path.iterdir())


def _figures(evaluation: Evaluation | None) -> dict[str, Any]:
    if evaluation is None:
        return {"top1": None, "top1_ci95": None, "macro_f1": None, "images": 0}
    return {
        "top1": evaluation.top1,
        "top1_ci95": list(evaluation.top1_ci95),
        "macro_f1": evaluation.macro_f1,
        "images": evaluation.images,
    }


def _sizes(model: nn.Module, adapter: Path) -> dict[str, int]:
    counts = count_parameters(model)
    return {
        "params_adapter": counts.adapter,
        "params_head": counts.head,
        "adapter_bytes": adapter_bytes(adapter),
    }


def train_folder(
    data: Path,
    out: Path,
    *,
    backbone: Backbone,
    method_config: MethodConfig,
    train_config: TrainConfig,
    split: Split = DEFAULT_SPLIT,
    on_progress: Callable[[Epoch], None] | None = None,
) -> dict[str, Any]:
    """Train a method on an image folder and write the adapter to `out`; the test images are never read.

    The figures are those on the validation images; `seconds` are those of attaching (with the look at the images that
    some methods take first) and training.

    Raises:
        TrainingDiverged: after writing the last good state, where an epoch was completed.
        VisgraftError: the data, the backbone, an option or `out` cannot be used.
    """
    check_target(out, CONFIG)
    folder = read_folder(data, val_fraction=split.val_fraction, test_fraction=split.test_fraction, seed=split.seed)
    model = create_backbone(backbone, len(folder.classes), train_config.drop_path)
    data_config = model_data_config(model)
    images = load_images(folder.part("train"), data_config)
    val = load_images(folder.val, data_config) if folder.val else None
    plain = count_parameters(model)
    torch.manual_seed(train_config.seed)
    begin = time.perf_counter()
    attach(model, method_config, images.batches())
    record: dict[str, Any] = {
        "train": train_config.to_dict(),
        "precision": resolve_precision(train_config.precision),
        "data": {"fingerprint": folder.fingerprint, "layout": folder.layout, **dataclasses.asdict(split)},
    }
    write = partial(save, model, out, classes=folder.classes, data_config=data_config, record=record)
    try:
        training = train(model, images, train_config, val, on_progress)
    except TrainingDiverged as error:
        record["diverged_after_epoch"] = error.last_good_epoch
        raise _keep_last_good(error, out, write) from None
    seconds = time.perf_counter() - begin
    figures = _figures(None if val is None else evaluate(model, val, train_config.precision))
    record |= {"metrics": {f"val_{name}": value for name, value in figures.items()}}
    record |= {**dataclasses.asdict(training), "seconds": seconds}
    write()
    return {
        "adapter": str(out),
        "method": method_config.method,
        "backbone": backbone.name,
        "split": "val" if val else None,
        **figures,
        **_sizes(model, out),
        "params_backbone": plain.total - plain.head,
        "seconds": seconds,
        "images_per_second": training.images_per_second,
        "peak_memory_bytes": training.peak_memory_bytes,
        "precision": record["precision"],
        "epochs": train_config.epochs,
        "kept_epoch": training.kept_epoch,
    }


def _keep_last_good(error: TrainingDiverged, out: Path, write: Callable[[], Path]) -> TrainingDiverged:
    """Write the last good state, where an epoch was completed, and return the error that says so."""
    if not error.last_good_epoch:
        return TrainingDiverged(f"{error}; nothing was written, as no epoch was completed", 0)
    write()
    return TrainingDiverged(f"{error}; it is written to {out}", error.last_good_epoch)


def _adapter_folder(adapter: Path, data: Path) -> tuple[Dataset, bool]:
    """Return a folder, divided as it was for this adapter, and whether it is the one that the adapter was trained on.

    Raises:
        AdapterError: the classes of adapter and data differ.
        DataError: the folder cannot be used.
    """
    config = read_config(adapter)
    kept = {field.name for field in dataclasses.fields(Split)}
    stored: Mapping[str, Any] = config["record"].get("data", {})
    split = Split(**{name: value for name, value in stored.items() if name in kept})
    folder = read_folder(data, val_fraction=split.val_fraction, test_fraction=split.test_fraction, seed=split.seed)
    if list(folder.classes) != config["classes"]:
        new, missing = set(folder.classes) - set(config["classes"]), set(config["classes"]) - set(folder.classes)
        differ = "; ".join(
            f"{word} {', '.join(sorted(names)[:5])}"
            for word, names in (("unknown:", new), ("missing:", missing))
            if names
        )
        raise AdapterError(f"the classes of {data} are not those of {adapter} ({differ}); use the data it was made for")
    return folder, stored.get("fingerprint") == folder.fingerprint


def _examples(adapter: Path, data: Path, part: str) -> tuple[Example, ...]:
    """Return the examples to measure an adapter on.

    Raises:
        DataError: no such part; or a flat folder other than the one trained on, so that nothing tells its parts apart.
    """
    folder, same = _adapter_folder(adapter, data)
    if part == "all":
        return (*folder.train, *folder.val, *folder.test)
    if folder.layout == "flat" and not same:
        raise DataError(
            f"{data} is not, or no longer, the folder that {adapter} was trained on, so its {part} images cannot be "
            "told from those it may have learned; pass --split all if it learned none of them"
        )
    return folder.part(part)


def eval_adapter(adapter: Path, data: Path, *, weights: str | None = None, part: str = "test") -> dict[str, Any]:
    """Measure an adapter on a folder's test images, or on `val`, `train` or `all`."""
    return measure_adapter(adapter, data, weights=weights, part=part)[0]


def measure_adapter(
    adapter: Path, data: Path, *, weights: str | None = None, part: str = "test"
) -> tuple[dict[str, Any], Evaluation, Images, Adapted]:
    """`eval_adapter` with all that it was computed from, for reports."""
    examples, config = _examples(adapter, data, part), read_config(adapter)
    adapted = load(adapter, weights=weights)
    images = load_images(examples, config["data_config"])
    precision = config["record"].get("precision", "fp32")  # as in training, so that figures compare
    evaluation = evaluate(adapted.model, images, precision)
    figures = {
        "adapter": str(adapter),
        "method": config["method"],
        "backbone": config["backbone"]["name"],
        "split": part,
        **_figures(evaluation),
        "precision": precision,
        **_sizes(adapted.model, adapter),
        "seconds": evaluation.seconds,
        "images_per_second": evaluation.images / evaluation.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return figures, evaluation, images, adapted


def merge_adapter(adapter: Path, out: Path, *, data: Path | None = None, weights: str | None = None) -> dict[str, Any]:
    """Fold an adapter into its backbone, measure, and write a plain timm model with its certificate.

    Raises:
        MergeError: it cannot be folded exactly, or the measured difference is above the tolerance.
    """
    check_target(out, "config.json")
    config = read_config(adapter)
    images = None
    if data is not None:
        folder, _ = _adapter_folder(adapter, data)
        examples = (folder.val or folder.train)[:CERTIFICATE_IMAGES]
        images = load_images(examples, config["data_config"]).batches()
    adapted = load(adapter, weights=weights)
    plain, certificate = merge(adapted.model, images)
    save_plain(plain, out, adapted.classes, config["data_config"], certificate)
    reopen = f'timm.create_model("local-dir:{out}", pretrained=True)'
    return {"out": str(out), "method": config["method"], **dataclasses.asdict(certificate), "open_with": reopen}


def describe_methods(backbone: str, num_classes: int = 0) -> list[dict[str, Any]]:
    """Return name, paper, places, mergeability and trained parameters of every method on a backbone's meta copy."""
    with torch.device("meta"):
        create_backbone(Backbone(backbone, "none"))
    rows = []
    for name, method in methods().items():
        config = method.Config()
        with torch.device("meta"):
            model = create_backbone(Backbone(backbone, "none"), num_classes or 1)
        row: dict[str, Any] = {"name": name, "paper": method.paper}
        try:
            blocks = find_sites(model) if method.placements(config) else []
            places = choose_places(config, blocks, backbone) if blocks else ()
            row["places"] = [p.reads if p.reads == p.adds_to else f"{p.reads} -> {p.adds_to}" for p in places]
            row["mergeable"] = mergeable(config, blocks)
            row["params_adapter"] = count_parameters(assemble(model, config)).adapter
        except SiteError as error:
            row |= {"places": None, "mergeable": None, "params_adapter": None, "refused": str(error)}
        rows.append(row)
    return rows


def reopen_plain(path: Path) -> nn.Module:
    """Open a merged model with timm alone."""
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    except (OSError, RuntimeError, AssertionError) as error:
        raise VisgraftError(f"{path} is not a model folder that timm can open ({error})") from error
