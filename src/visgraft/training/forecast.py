"""What training would take, from a few of its own steps; nothing is written."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, pairwise
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from visgraft.adapters.directory import CONFIG, adapter_tensors
from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.core.attach import count_parameters
from visgraft.data.cache import Pixels
from visgraft.data.dataset import Dataset, Example, Split
from visgraft.data.images import Images, Loading, find_cache, load_images, make_labels
from visgraft.data.read import AnySource
from visgraft.files import check_target
from visgraft.measure.evaluation import evaluate, peak_memory_bytes
from visgraft.measure.precision import make_compute, resolve_precision
from visgraft.options import MethodConfig, TrainConfig
from visgraft.training.fit import train_head
from visgraft.training.keeping import STATE_SECONDS
from visgraft.training.objective import Features, features_of, sees_features
from visgraft.training.pace import Pace, measure_pace
from visgraft.training.resume import TrainState, pack_state
from visgraft.training.run import Watch, attach_as_asked, check_start, read_and_check

SAMPLE = 64
"""Images read of each part."""
SCANNED_BATCHES = 4
"""Batches that a method which looks at all images is shown."""
_DEFAULT_SPLIT, _DEFAULT_LOADING, _DEFAULT_WATCH = Split(), Loading(), Watch()


@dataclass(frozen=True)
class _Repeated:
    """Pixels of a few images that stand for `count`: image i looks like image i modulo their number."""

    pixels: Pixels
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[count, 3, H, W]."""
        return (self.count, *self.pixels.shape[1:])

    def __len__(self) -> int:
        return self.count

    @property
    def distinct(self) -> int:
        """How many images there are before the first comes again."""
        return len(self.pixels)

    def __getitem__(self, index: Any, /) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.count))
        return self.pixels[index % len(self.pixels)]


@dataclass(frozen=True)
class _Part:
    """The images read of a part, and images that stand for all of it, with the labels that they really have."""

    read: Images
    all: Images

    @property
    def share(self) -> float:
        """How many images there are for each one read."""
        return len(self.all) / len(self.read)


@dataclass(frozen=True)
class _Sample:
    """Both parts, the seconds that reading all of their images takes, and the bytes that those not read yet hold."""

    train: _Part
    val: _Part | None
    seconds: float
    bytes: int

    @property
    def parts(self) -> dict[str, _Part]:
        """The parts there are, by name."""
        return {"train": self.train} | ({"val": self.val} if self.val else {})

    @property
    def counts(self) -> dict[str, int]:
        """How many images there are, and how many were read."""
        read = sum(len(part.read) for part in self.parts.values())
        return {
            "images": len(self.train.all),
            "images_val": len(self.val.all) if self.val else 0,
            "images_read": read,
        }


def forecast_folder(
    data: AnySource,
    out: Path | None = None,
    *,
    backbone: Backbone,
    method_config: MethodConfig,
    train_config: TrainConfig,
    split: Split = _DEFAULT_SPLIT,
    loading: Loading = _DEFAULT_LOADING,
    init_from: Path | None = None,
    watch: Watch = _DEFAULT_WATCH,
) -> dict[str, Any]:
    """Say what `train_folder` with the same arguments takes, by doing the beginning of it; nothing is written.

    A few images are read and stand for all; the test images are never read. `seconds` are those from the call to the
    finished adapter, on a machine as busy as now, without what a slow disk adds; `seconds_per_epoch` holds the
    validation. `adapter_file_bytes` is the size of the file of tensors, `peak_memory_bytes` as `train_folder` says it.

    Args:
        data: a folder, a table or a data set, as for `train_folder`.
        out: the folder that the adapter would be written to, to check whether it can be; None: not checked.

    Raises:
        TrainingDiverged: the loss was not finite within the first steps.
        VisgraftError: the data, the backbone, an option or `out` cannot be used.
    """
    begin = time.perf_counter()
    if out is not None:
        check_target(out, CONFIG)
    check_start(init_from, train_config)
    dataset = read_and_check(data, split, watch)
    config = replace(train_config, precision=resolve_precision(train_config.precision))
    model = create_backbone(backbone, len(dataset.classes), config.drop_path)
    plain, preparing = count_parameters(model), time.perf_counter() - begin
    sample = _read_sample(dataset, model, loading, watch)
    heading = _head_seconds(model, sample.train, method_config, config)
    attach = partial(attach_as_asked, model, method_config, dataset, init_from, config.seed, watch)
    attaching = _attaching_seconds(sample.train, attach)
    file_bytes = len(safetensors.torch.save(adapter_tensors(model)))
    pace, validation, later = _training_seconds(model, sample, config, watch)
    seconds = {"preparing": preparing, "reading_images": sample.seconds, **heading, "attaching": attaching, **later}
    counts = count_parameters(model)
    return {
        "method": method_config.method,
        "backbone": backbone.name,
        **sample.counts,
        "params_adapter": counts.adapter,
        "params_head": counts.head,
        "params_backbone": plain.total - plain.head,
        "adapter_file_bytes": file_bytes,
        "peak_memory_bytes": peak_memory_bytes(sample.bytes),
        **{name: getattr(config, name) for name in ("epochs", "batch_size", "precision")},
        "features_once": sees_features(model, config),
        "steps_per_epoch": pace.steps,
        "seconds_per_step": pace.step,
        "seconds_per_epoch": pace.epoch + validation,
        "seconds": sum(seconds.values()),
        "seconds_by_part": seconds,
    }


def _read_sample(dataset: Dataset, model: nn.Module, loading: Loading, watch: Watch) -> _Sample:
    """Read a few images of each part, spread over its classes, and conclude from them to all."""
    facts, outputs = model_data_config(model), len(dataset.classes)
    names = ["train", *(["val"] if dataset.val else [])]
    examples = {name: dataset.part(name) for name in names}
    chosen = {name: _spread(part) for name, part in examples.items()}
    total, done, parts, seconds, held = sum(map(len, chosen.values())), 0, dict[str, _Part](), 0.0, 0
    for name in names:
        cache, there = find_cache(examples[name], facts, loading)
        # What is kept for later runs is not written now.
        how = replace(loading, cache="none" if cache == "none" else "ram")
        told = None if watch.loading is None else (lambda n, _, before=done: watch.loading(before + n, total))  # type: ignore[misc]
        begin = time.perf_counter()
        read = load_images(chosen[name], facts, outputs=outputs, on_progress=told, **vars(how))
        spent, done = time.perf_counter() - begin, done + len(chosen[name])
        count = len(examples[name])
        pixels = _Repeated(read.pixels, count)
        part = _Part(read, replace(read, pixels=pixels, labels=make_labels(examples[name], outputs), skipped=()))
        parts[name] = part
        seconds += 0.0 if there else spent * count / len(chosen[name])
        held += 0 if cache == "none" else (count - len(read)) * torch.Size(facts["input_size"]).numel()
    return _Sample(parts["train"], parts.get("val"), seconds, held)


def _spread(examples: Sequence[Example]) -> list[Example]:
    """Return at most `SAMPLE` examples, evenly over their order, which is that of the classes."""
    if len(examples) <= SAMPLE:
        return list(examples)
    examples = [example for example in examples if example.label != ()] or examples  # figures need some with a class
    count = min(len(examples), SAMPLE)
    return [examples[i * len(examples) // count] for i in range(count)]


def _head_seconds(model: nn.Module, part: _Part, method: MethodConfig, config: TrainConfig) -> dict[str, float]:
    """Train the head alone, where it goes first, and return the seconds that it takes on all images."""
    if not config.head_first:
        return {}
    begin = time.perf_counter()
    train_head(model, part.read, method, config)
    return {"head_first": part.share * (time.perf_counter() - begin)}


def _attaching_seconds(part: _Part, attach_with: Callable[[Iterator[Any]], None]) -> float:
    """Attach, and return the seconds that it takes on all images, where the method looks at them."""
    asked, shown = list[float](), 0
    # Again and again those read: of the first ones of all, none might have a class where they may have several.
    repeated = chain.from_iterable(part.read.batches() for _ in range(ceil(part.share)))

    def batches() -> Iterator[Any]:
        nonlocal shown
        for batch in islice(repeated, SCANNED_BATCHES):
            asked.append(time.perf_counter())
            shown += len(batch[1])
            yield batch
        asked.append(time.perf_counter())

    begin = time.perf_counter()
    attach_with(batches())
    spent, left = time.perf_counter() - begin, len(part.all) - shown
    took = [later - earlier for earlier, later in pairwise(asked)][1:]  # the first batch warms up
    wants_all = len(asked) > SCANNED_BATCHES  # it would have taken more
    return spent + median(took) * left / shown * SCANNED_BATCHES if wants_all and left > 0 else spent


def _training_seconds(
    model: nn.Module, sample: _Sample, config: TrainConfig, watch: Watch
) -> tuple[Pace, float, dict[str, float]]:
    """Return the pace, the seconds of a validation on all images, and those of all that follows the attaching."""
    features, computing = _features(model, sample, config) if sees_features(model, config) else (None, 0.0)
    pace, validation, states = _measure(model, sample, config, features, watch)
    val = sample.val
    evaluating = 0.0 if val is None else val.share * evaluate(model, val.read, config.precision).seconds
    training = pace.preparing + pace.warmup + config.epochs * (pace.epoch + validation)
    seconds = {"features": computing, "training": training, "states": states, "evaluating": evaluating}
    return pace, validation, seconds


def _features(model: nn.Module, sample: _Sample, config: TrainConfig) -> tuple[Features, float]:
    """Return features that stand for those of all images, and the seconds that computing all of them takes."""
    compute = make_compute(config.precision)
    model.to(compute.device)
    features, seconds = Features(), 0.0
    features_of(model, sample.train.read, compute)  # warms up
    for name, part in sample.parts.items():
        begin = time.perf_counter()
        rows = features_of(model, part.read, compute)
        views = config.cached_views or 1 if name == "train" else 1
        seconds += views * part.share * (time.perf_counter() - begin)
        features[name] = rows[torch.arange(views * len(part.all)) % len(rows)]
    return features, seconds


def _measure(
    model: nn.Module, sample: _Sample, config: TrainConfig, features: Features | None, watch: Watch
) -> tuple[Pace, float, float]:
    """Return the pace, the seconds of a validation on all images, and those of packing states during the run."""
    packing = 0.0

    def pack(pace: Pace, state: TrainState) -> None:
        nonlocal packing
        epoch = pace.epoch + pace.validation * share
        every = max(-(-STATE_SECONDS // epoch), 1.0)  # epochs from one state to the next
        if count := config.epochs // every:
            if state.best_epoch == state.epoch:  # at worst another epoch is the best, and its tensors are kept as well
                best = {name: tensor.clone() for name, tensor in state.tensors.items()}
                state = replace(state, best=best, best_epoch=state.epoch - 1)
            begin = time.perf_counter()
            pack_state(state, {})
            packing = count * (time.perf_counter() - begin)

    # With features at hand, the figures cost more than the passes, and all are computed.
    val = None if sample.val is None else sample.val.read if features is None else sample.val.all
    share = sample.val.share if sample.val and features is None else 1.0
    images = sample.train.all
    warn = watch.warning
    pace = measure_pace(model, images, config, val, features=features, then=pack, on_warning=warn)
    return pace, share * pace.validation, packing
