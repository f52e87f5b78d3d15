"""From labelled images to an adapter, in one go or resumed."""

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visgraft.adapters.directory import CONFIG
from visgraft.adapters.warm_start import start_from
from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.check.looks import shape_warning
from visgraft.check.quick import quick_check
from visgraft.core.attach import assemble, attach, count_parameters
from visgraft.core.method import Batches
from visgraft.data.dataset import PARTS, Dataset, Split, listed
from visgraft.data.examples import counts_by_class, names_of
from visgraft.data.identity import content_digests, file_digest
from visgraft.data.images import Images, Loading, load_images
from visgraft.data.read import AnySource, read_data
from visgraft.errors import VisgraftError
from visgraft.executors import distributed
from visgraft.files import check_target
from visgraft.measure.conformal import calibrate_tasks
from visgraft.measure.evaluation import evaluate
from visgraft.measure.measuring import figures_of, sizes_of, skipped_of, unlabelled_tasks
from visgraft.measure.precision import resolve_precision
from visgraft.measure.unlike import make_reference
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training.fit import Fitted, fit
from visgraft.training.keeping import KeptRun
from visgraft.training.resume import FILES, WEIGHTS, Epoch, TrainState, read_state, state_file
from visgraft.training.slow import LongRun, faster_options

_DEFAULT_SPLIT, _DEFAULT_LOADING = Split(), Loading()
MOST_NAMED = 20_000
"""Images of which a state keeps a digest each, so that the first one that differs can be named."""


@dataclass(frozen=True)
class Watch:
    """Who is told what during a run: epochs, images read (done, in all), and warnings in one line each.

    `again` is what an error tells the user to do where the run stopped.
    """

    epoch: Callable[[Epoch], None] | None = None
    loading: Callable[[int, int], None] | None = None
    warning: Callable[[str], None] = lambda text: None
    again: str = "give the same command with --resume to go on"


def train_folder(
    data: AnySource,
    out: Path,
    *,
    backbone: Backbone,
    method_config: MethodConfig,
    train_config: TrainConfig,
    split: Split = _DEFAULT_SPLIT,
    loading: Loading = _DEFAULT_LOADING,
    resume: bool = False,
    init_from: Path | None = None,
    record: Mapping[str, Any] | None = None,
    unlike: bool = True,
    watch: Watch = Watch(),
) -> dict[str, Any]:
    """Train a method on labelled images and write the adapter to `out`; the test images are never read.

    The figures are of the validation images. While it trains, the state to go on from lies beside `out`.

    Args:
        data: a folder, table or a data set (see `read_data`), divided by `split` where it does not say.
        resume: go on from the state that an interrupted run with the same arguments left, to the very same weights.
        init_from: an adapter of the same backbone and method to start from; classes may have come or gone.
        record: further facts that the adapter is to keep, as JSON values.
        unlike: also keep what unlike pictures are told by, which takes one look at training and validation images.

    Raises:
        Interrupted: after writing the state, on Ctrl-C.
        TrainingDiverged: after writing the last good state, where an epoch was completed.
        VisgraftError: the data, the backbone, an option or `out` cannot be used.
    """
    if distributed.is_first():
        check_target(out, CONFIG)
    check_start(init_from, train_config)
    dataset = read_and_check(data, split, watch)
    train_config = replace(train_config, precision=resolve_precision(train_config.precision))
    method_config = method_config.for_tasks(tuple(task.outputs for task in dataset.tasks))
    facts = _facts(dataset, backbone, method_config, train_config, split, loading) | {"init_from": str(init_from)}
    distributed.check_alike(sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(), "options or images")
    state = distributed.from_first(lambda: _find_state(out, facts, resume, watch))
    model = create_backbone(backbone, len(dataset.classes), train_config.drop_path)
    counts = count_parameters(model)
    _warn_of_shapes(dataset, backbone, model, watch)
    if dataset.val and (unmeasured := unlabelled_tasks(dataset.val)):
        watch.warning(f"no validation image has a label of {listed(unmeasured)}, which the figures say nothing about")
    images, val = _load(dataset, model, loading, watch)
    reference = make_reference(model, images, val, train_config.precision) if unlike else None
    attach_anew = partial(attach_as_asked, model, method_config, dataset, init_from, train_config.seed, watch)
    # A state holds what a look at the images would find.
    start = partial(attach_anew, images.batches()) if state is None else partial(assemble, model, method_config)
    kept = {**_record(dataset, split, train_config, loading.background or "white"), **(record or {})}
    run = KeptRun(model, out, facts, dataset.classes, kept, reference, train_config.epochs, watch.again)
    show = _watched(watch, lambda: faster_options(model, backbone, method_config, train_config, init_from is None))
    learn = partial(fit, model, method_config, train_config, images, val, start=start, on_progress=show)
    fitted = run.train(partial(learn, on_warning=watch.warning), state)
    figures, costs = _conclude(run, fitted, val, train_config.precision)
    what = {"adapter": str(out), "method": method_config.method, "backbone": backbone.name}
    sizes = {**distributed.from_first(lambda: sizes_of(model, out)), "params_backbone": counts.total - counts.head}
    return {**what, **figures, **sizes, **_told(costs, train_config, dataset, images, val)}


def _conclude(
    run: KeptRun, fitted: Fitted, val: Images | None, precision: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the trained model on the validation images and write it; returns figures and costs."""
    assert fitted.training is not None
    costs = {**dataclasses.asdict(fitted.training), "seconds": fitted.seconds}
    found = None if val is None else evaluate(run.model, val, precision)
    figures = figures_of(found)
    calibrated = None if found is None else calibrate_tasks(found)
    metrics = {f"val_{name}": value for name, value in figures.items()}
    run.finish(calibrated, metrics=metrics, **costs)
    return figures, costs


def _told(
    costs: dict[str, Any], config: TrainConfig, dataset: Dataset, images: Images, val: Images | None
) -> dict[str, Any]:
    """What else is returned of a run: costs, how it was trained, images left out, folders without classes."""
    skipped = [row for part in (images, val) if part for row in skipped_of(part)]
    kept = {name: value for name, value in costs.items() if name != "history"}
    how = {name: getattr(config, name) for name in ("precision", "epochs")}
    return {
        "split": "val" if val else None,
        "skipped": skipped,
        **kept,
        **how,
        "unlabelled": [str(folder) for folder in dataset.unlabelled],
    }


def _warn_of_shapes(dataset: Dataset, backbone: Backbone, model: nn.Module, watch: Watch) -> None:
    """Say where making pictures square loses part of many, unless somebody chose how it is done."""
    if backbone.crop_mode is None:
        for line in shape_warning(dataset.train, model_data_config(model)["crop_mode"]):
            watch.warning(line)


def _watched(watch: Watch, options: Callable[[], list[tuple[str, float]]]) -> Callable[[Epoch], None]:
    """Return a callback that tells of epochs and, once, of what would shorten a long run."""
    slow = LongRun(watch.warning, options)

    def show(epoch: Epoch) -> None:
        slow(epoch)
        if watch.epoch:
            watch.epoch(epoch)

    return show


def _facts(
    dataset: Dataset, backbone: Backbone, method: MethodConfig, config: TrainConfig, split: Split, loading: Loading
) -> dict[str, Any]:
    """What must be the same for a run to be the same."""
    data = {"fingerprint": dataset.fingerprint, **dataclasses.asdict(split), **dataclasses.asdict(loading)}
    return {
        "method": method.method,
        "options": method.to_dict(),
        "backbone": backbone.to_dict(),
        "train": config.to_dict(),
        "data": data | {FILES: _files(dataset)},
        **({WEIGHTS: file_digest(Path(backbone.weights))} if Path(backbone.weights).is_file() else {}),
    }


def _files(dataset: Dataset) -> dict[str, str]:
    """Return a digest of each image by its name; of many images one for each folder, whose name ends in a slash.

    A state holds this, and safetensors reads no more than 100 MB of it.
    """
    start = f"{dataset.root if dataset.root.is_dir() else dataset.root.parent}"
    examples = dataset.all
    found = zip((_below(start, name) for name in names_of(examples)), content_digests(examples), strict=True)
    if len(examples) <= MOST_NAMED:
        return dict(found)
    folders = defaultdict[str, Any](hashlib.sha256)
    for name, digest in found:
        folders[f"{os.path.dirname(name)}/"].update(f"{name}\0{digest}\n".encode("utf-8", "surrogateescape"))
    return {folder: one.hexdigest()[:32] for folder, one in folders.items()}


def _below(start: str, path: str) -> str:
    """Return the name of an image that stays the same however the way to its data set is written."""
    inside = f"{start}{os.sep}"
    if path.startswith(inside):
        return path.removeprefix(inside)
    try:
        return os.path.relpath(path, start)
    except ValueError:  # on another drive of Windows
        return path


def _record(dataset: Dataset, split: Split, config: TrainConfig, background: str) -> dict[str, Any]:
    """What the adapter keeps of how it was trained."""
    data = {
        "fingerprint": dataset.fingerprint,
        "layout": dataset.layout,
        "multi_label": dataset.multi_label,
        **({"label_column": dataset.label_column} if dataset.label_column else {}),
        **({"tasks": [task.to_json() for task in dataset.tasks]} if dataset.tasks else {}),
        "background": background,
        "images": {part: len(getattr(dataset, part)) for part in PARTS},
        "train_images_by_class": _images_by_class(dataset),
        **dataclasses.asdict(split),
    }
    return {"train": config.to_dict(), "precision": config.precision, "data": data}


def _images_by_class(dataset: Dataset) -> dict[str, int]:
    """Return how many training images each class has."""
    counts = dict(zip(dataset.classes, counts_by_class(dataset.train, len(dataset.classes)), strict=True))
    return {name: count for name, count in counts.items() if name not in {task.name for task in dataset.tasks}}


def read_and_check(data: AnySource, split: Split, watch: Watch) -> Dataset:
    """Read labelled images' names and labels, and warn of what can be seen without decoding one."""
    dataset = read_data(data, split)
    for line in quick_check(dataset):
        watch.warning(line)
    return dataset


def check_start(init_from: Path | None, config: TrainConfig) -> None:
    """Raise a VisgraftError where the head would be trained first, though an adapter brings one."""
    if init_from is not None and config.head_first:
        raise VisgraftError(f"head_first has no effect: the head is that of {init_from}; leave one of them out")


def attach_as_asked(
    model: nn.Module,
    config: MethodConfig,
    dataset: Dataset,
    init_from: Path | None,
    seed: int,
    watch: Watch,
    batches: Batches,
) -> None:
    """Attach the method afresh, with a look at the task's batches where it takes one, or from an earlier adapter."""
    torch.manual_seed(seed)
    if init_from is not None:
        for note in start_from(model, init_from, config, dataset.classes, dataset.tasks):
            watch.warning(note)
    else:
        attach(model, config, batches)


def _find_state(out: Path, run: dict[str, Any], resume: bool, watch: Watch) -> TrainState | None:
    """Return the state to go on from, None for a run from the beginning."""
    file = state_file(out)
    if not file.is_file():
        if resume and (out / CONFIG).is_file():
            raise VisgraftError(f"there is nothing to resume: {out} is finished; leave out --resume to train it anew")
        if resume:
            watch.warning(f"{file} is not there, so the run starts from the beginning")
        return None
    if resume:
        return read_state(file, run)
    watch.warning(f"{file} of an interrupted run will be replaced; to keep it, {watch.again}")
    return None


def _load(dataset: Dataset, model: nn.Module, loading: Loading, watch: Watch) -> tuple[Images, Images | None]:
    """Load training and validation images, counting them as one lot for the progress."""
    facts, total = model_data_config(model), len(dataset.train) + len(dataset.val)

    def load(part: str, before: int) -> Images:
        told = None if watch.loading is None else (lambda done, _: watch.loading(before + done, total))  # type: ignore[misc]
        return load_images(dataset.part(part), facts, outputs=len(dataset.classes), on_progress=told, **vars(loading))

    images = load("train", 0)
    return images, load("val", len(dataset.train)) if dataset.val else None
