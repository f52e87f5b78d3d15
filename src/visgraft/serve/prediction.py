"""Predictions over any number of images, with any number of adapters of one backbone in one pass."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from visgraft.adapters.directory import TENSORS, Adapted, load, read_record
from visgraft.adapters.hub import remedy, resolve, settled
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import shape_from
from visgraft.core.attach import detach
from visgraft.core.attached import get_attached
from visgraft.core.fitting import check_shape
from visgraft.core.tensors import eval_mode, sharing_copy
from visgraft.data.decode import open_image
from visgraft.errors import AdapterError, DataError, VisgraftError
from visgraft.measure.evaluation import probabilities_of
from visgraft.measure.precision import Compute, make_compute, resolve_precision

BATCH_SIZE = 64  # that of `evaluate`, so that both see the same rounding
THRESHOLD = 0.5
ENSEMBLE = "ensemble"
"""What the adapters of an ensemble are called together."""

Classes = list[tuple[str, float]]
"""Names of classes with their probabilities, most probable first."""


class Prediction(NamedTuple):
    """What one adapter says of one image; `adapter` is its path as given, or the number of an `Adapted`, from 1."""

    image: Path
    adapter: str
    classes: Classes


class _Ready(NamedTuple):
    """An adapter loaded, with what its record says of how to run it."""

    name: str
    adapted: Adapted
    precision: str

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.adapted.record.multi_label

    @property
    def background(self) -> str:
        """The colour behind transparent places."""
        return self.adapted.record.background or "white"


def predict(adapted: Adapted, paths: Sequence[str | Path], top: int = 1) -> list[Classes]:
    """Return per image the `top` most probable classes with their probabilities, most probable first.

    Raises:
        AdapterError: the transform makes other images than the model takes.
        DataError: a file is no image.
        VisgraftError: `paths` is one path and no list.
    """
    return [found.classes for found in predict_stream([adapted], paths, top=top)]


@settled()
def predict_stream(
    adapters: Sequence[str | Path | Adapted],
    images: Iterable[str | Path],
    *,
    weights: str | None = None,
    top: int | None = None,
    threshold: float | None = None,
    batch_size: int = BATCH_SIZE,
    background: str | None = None,
    ensemble: bool = False,
    on_broken: Callable[[Path, str], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Prediction]:
    """Yield a prediction of each adapter for each image, image by image, in the order given.

    Every image is decoded once, in threads ahead of the model, and only a few batches are held at any time. Adapters
    given by path share the tensors of their backbone. Each runs in the precision it was trained in; an `Adapted`
    runs where its model is, in float32 unless its record says otherwise.

    Args:
        adapters: directories of adapters, `hf:USER/NAME`, or loaded ones; all of one backbone.
        images: paths, which may be an endless stream.
        weights: where the backbone's weights come from, in place of what the adapters say.
        top: how many classes to name at most; None: one, or, where images may have several classes, no limit.
        threshold: least probability of a class to be named, of adapters trained on images with several classes; 0.5.
        batch_size: images per forward.
        background: the colour behind transparent places, by name or as #rrggbb; None: as in training.
        ensemble: answer once for all adapters, by the mean of their probabilities.
        on_broken: called with path and reason for each file that is no image, which is left out; None: it is an error.
        on_progress: called with the number of images read so far, after each batch.

    Raises:
        AdapterError: an adapter is damaged, or not of the same backbone as the first one, or prepares images of another
            size than its model takes.
        DataError: a file is no image.
        VisgraftError: an option is out of range, no adapter is given, or `images` is one path and no list.
    """
    _check_options(adapters, images, top, threshold, batch_size)
    ready = _prepare(adapters, weights)
    if threshold is not None and not any(one.multi_label for one in ready):
        raise VisgraftError("threshold is for adapters of images with several classes, and none is; leave it out")
    transform, colour = ready[0].adapted.transform, background or _background(ready)
    decoded = _decoded(map(_path, images), lambda path: _prepared(path, transform, colour), 2 * batch_size)
    named = partial(_name, top=top, threshold=THRESHOLD if threshold is None else threshold)
    if ensemble:
        _check_ensemble(ready)
    return _run(ready, _batches(decoded, batch_size), ensemble, named, on_broken, on_progress)


def _check_options(
    adapters: Sequence[str | Path | Adapted],
    images: Iterable[str | Path],
    top: int | None,
    threshold: float | None,
    batch_size: int,
) -> None:
    if isinstance(adapters, str | Path | Adapted) or not adapters:
        raise VisgraftError("adapters must be a list of at least one adapter")
    if isinstance(images, str | bytes | Path) or not isinstance(images, Iterable):
        given = f"{str(images)!r} is one path" if isinstance(images, str | Path) else f"{type(images).__name__} is none"
        raise VisgraftError(f"a list of paths is needed, but {given}; pass [path]")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise VisgraftError(f"{name} is {value}, but must be at least 1")
    if threshold is not None and not 0 <= threshold <= 1:
        raise VisgraftError(f"threshold is {threshold}, but must be between 0 and 1")


def _path(image: Any) -> Path:
    """Return the path that an image is given by."""
    if not isinstance(image, str | os.PathLike):
        raise VisgraftError(
            f"images must be paths, but one is of type {type(image).__name__}; save it to a file, or call "
            "adapted.model on what adapted.transform makes of it"
        )
    return Path(image)


def _prepared(path: Path, transform: Any, colour: str) -> Tensor:
    """Return what the transform makes of a picture, [3, H, W]."""
    x = transform(open_image(path, colour))
    if not isinstance(x, Tensor) or x.ndim != 3:
        found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise AdapterError(
            f"the transform makes {found} of {path}, but must make a tensor [3, H, W]; use the one that load returns"
        )
    return x


def _check_prepared(ready: Sequence[_Ready], channels: int | None, size: Sequence[int]) -> None:
    """Raise an AdapterError unless all models take the images that the transform makes."""
    remedy = "use the transform that visgraft.load returns"
    for one in ready:
        what = f"images from the transform of adapter {one.name}"
        check_shape(one.adapted.model, channels, size, what, kind=AdapterError, remedy=remedy)


def _stacked(good: Sequence[tuple[Path, Tensor]]) -> Tensor:
    """Return the images of a batch as one tensor [B, 3, H, W]."""
    first, x = good[0]
    for path, other in good:
        if other.shape != x.shape:
            raise AdapterError(
                f"the transform makes {first} {tuple(x.shape)} and {path} {tuple(other.shape)}, which are no batch; "
                "use a transform to one size, or batch_size=1"
            )
    return torch.stack([tensor for _, tensor in good])


def _run(
    ready: Sequence[_Ready],
    batches: Iterator[list[tuple[Path, Tensor | DataError]]],
    ensemble: bool,
    named: Callable[[_Ready, Tensor], list[Classes]],
    on_broken: Callable[[Path, str], None] | None,
    on_progress: Callable[[int], None] | None,
) -> Iterator[Prediction]:
    done, fitting = 0, set[torch.Size]()
    with ExitStack() as stack:
        for one in ready:
            stack.enter_context(eval_mode(one.adapted.model))
        for batch in batches:
            good = _readable(batch, on_broken)
            if good:
                x = _stacked(good)
                if x.shape[1:] not in fitting:
                    _check_prepared(ready, x.shape[1], x.shape[2:])
                    fitting.add(x.shape[1:])
                columns = [(name, named(one, found)) for name, one, found in _answers(ready, x, ensemble)]
                for row, (path, _) in enumerate(good):
                    yield from (Prediction(path, name, answers[row]) for name, answers in columns)
            done += len(batch)
            if on_progress is not None:
                on_progress(done)


def _answers(ready: Sequence[_Ready], x: Tensor, ensemble: bool) -> list[tuple[str, _Ready, Tensor]]:
    """Return who answers a batch: the name, the adapter that names the classes, and probabilities [B, classes]."""
    each = [_probabilities(one, x) for one in ready]
    if ensemble:
        return [(ENSEMBLE, ready[0], torch.stack(each).mean(0))]
    return [(one.name, one, found) for one, found in zip(ready, each, strict=True)]


def _check_ensemble(ready: Sequence[_Ready]) -> None:
    """Raise an AdapterError where there is one adapter only, or two answer other classes."""
    if len(ready) < 2:
        raise AdapterError("an ensemble needs two adapters or more; name another, or leave out ensemble (--ensemble)")
    kinds = [(one.adapted.classes, one.adapted.record.outputs, one.multi_label) for one in ready]
    for one, kind in zip(ready, kinds, strict=True):
        if kind != kinds[0]:
            raise AdapterError(
                f"{ready[0].name} and {one.name} do not answer the same classes in one order, so no mean says anything"
            )


def _readable(
    batch: Sequence[tuple[Path, Tensor | DataError]], on_broken: Callable[[Path, str], None] | None
) -> list[tuple[Path, Tensor]]:
    """Return the images of a batch, and report, or raise, what is none."""
    good = []
    for path, tensor in batch:
        if isinstance(tensor, Tensor):
            good.append((path, tensor))
        elif on_broken is None:
            raise tensor
        else:
            on_broken(path, str(tensor))
    return good


def _decoded(
    paths: Iterator[Path], read: Callable[[Path], Tensor], ahead: int
) -> Iterator[tuple[Path, Tensor | DataError]]:
    """Yield each image as the model's input [3, H, W] in order, or why it is none; at most `ahead` wait decoded."""

    def decode(path: Path) -> Tensor | DataError:
        try:
            return read(path)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(os.cpu_count())
    waiting: deque[tuple[Path, Future[Tensor | DataError]]] = deque()
    try:
        while True:
            for path in islice(paths, ahead - len(waiting)):
                waiting.append((path, pool.submit(decode, path)))
            if not waiting:
                return
            path, future = waiting.popleft()
            yield path, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _probabilities(one: _Ready, x: Tensor) -> Tensor:
    """Return the probabilities [B, classes] of normalised images [B, 3, H, W], float32 on the CPU."""
    like = next(one.adapted.model.parameters())
    with torch.inference_mode(), Compute(like.device, one.precision).autocast():
        logits = one.adapted.model(x.to(like.device, like.dtype)).float()
    return probabilities_of(logits, one.multi_label).cpu()


def _name(one: _Ready, probabilities: Tensor, top: int | None, threshold: float) -> list[Classes]:
    """Name the classes of each image."""
    outputs = probabilities.shape[-1]
    names = one.adapted.classes or tuple(str(number) for number in range(outputs))
    best = probabilities.topk(most_named(outputs, one.multi_label, top))
    least = threshold if one.multi_label else 0.0
    return [
        [(names[i], p) for p, i in zip(values, indices, strict=True) if p >= least]
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def most_named(outputs: int, multi_label: bool, top: int | None) -> int:
    """Return how many classes of `outputs` are named at most."""
    return min(top or (outputs if multi_label else 1), outputs)


def _prepare(adapters: Sequence[str | Path | Adapted], weights: str | None) -> list[_Ready]:
    """Load what is given by path, and check that all see the same picture of an image."""
    loaded = iter(load_together([path for path in adapters if not isinstance(path, Adapted)], weights=weights))
    ready = []
    for number, adapter in enumerate(adapters, 1):
        name, adapted = (str(number), adapter) if isinstance(adapter, Adapted) else (str(adapter), next(loaded))
        ready.append(_Ready(name, adapted, resolve_precision(adapted.record.precision)))
    first = ready[0].adapted.transform
    for one in ready[1:]:
        if one.adapted.transform is not first and repr(one.adapted.transform) != repr(first):
            raise AdapterError(f"adapters {ready[0].name} and {one.name} prepare images differently; run each apart")
    if made := shape_from(first):
        _check_prepared(ready, *made)
    return ready


def _background(ready: Sequence[_Ready]) -> str:
    """Return the colour behind transparent places with which all adapters were trained."""
    for one in ready[1:]:
        if one.background != ready[0].background:
            raise AdapterError(
                f"adapters {ready[0].name} and {one.name} were trained with the backgrounds {ready[0].background} and "
                f"{one.background}; pass background (--background), or run each apart"
            )
    return ready[0].background


@settled()
def load_together(paths: Sequence[str | Path], *, weights: str | None = None) -> list[Adapted]:
    """Load adapters of one backbone so that its frozen tensors are held once, on the accelerator where there is one.

    Args:
        paths: the adapters' directories, or `hf:USER/NAME`.
        weights: where the backbone's weights come from, in place of what the adapters say.

    Raises:
        AdapterError: a directory is damaged, or two adapters are of different backbones (both are named).
        WeightsError: the backbone's weights cannot be had.
    """
    check_same_backbone(paths)
    if not paths:
        return []
    first = load(paths[0], weights=weights)
    first.model.to(make_compute("fp32").device)
    if len(paths) == 1:
        return [first]
    plain = detach(sharing_copy(first.model, get_attached(first.model).originals))
    return [first, *(_load_onto(plain, Path(path)) for path in paths[1:])]


def _load_onto(plain: nn.Module, path: Path) -> Adapted:
    """Load an adapter onto a copy of the plain backbone that has only those tensors of its own that it overwrites."""
    try:
        with safe_open(resolve(path) / TENSORS, "pt") as file:
            own = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path / TENSORS} is missing or damaged ({error}); {remedy(path)}") from error
    model: Any = sharing_copy(plain, own)
    outputs = read_record(path).outputs
    if model.num_classes != outputs:
        like = next(model.parameters())
        model.reset_classifier(outputs)
        model.to(like.device, like.dtype)
    return load(path, backbone=model)


def check_same_backbone(paths: Sequence[str | Path]) -> None:
    """Raise an AdapterError that names two adapters if they are of different backbones, or one is damaged."""
    records = [read_record(path) for path in paths]
    for path, record in zip(paths[1:], records[1:], strict=True):
        ours, theirs = _identity(records[0]), _identity(record)
        for what, value in ours.items():
            if theirs[what] != value:
                raise AdapterError(
                    f"{paths[0]} and {path} are not of one backbone: {what} {value} and {theirs[what]}; run each apart"
                )


def _identity(record: AdapterRecord) -> dict[str, Any]:
    """What must be equal for adapters to share a backbone and the images prepared for it."""
    return {
        "name": record.backbone.name,
        "image size": record.backbone.image_size,
        "arguments": dict(record.backbone.arguments),
        "sha256": f"{str(record.digest)[:12]}…",
        "preprocessing": record.data_config,
    }
