"""Predictions over any number of images, with any number of adapters of one backbone in one pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visgraft.adapters.directory import Adapted
from visgraft.adapters.hub import settled
from visgraft.adapters.record import AdapterRecord
from visgraft.bank.bank import Bank
from visgraft.bank.opening import check_same_backbone, load_bank
from visgraft.core.tensors import eval_mode
from visgraft.data.decode import colour_of
from visgraft.errors import AdapterError, DataError, VisgraftError
from visgraft.measure.precision import Compute, resolve_precision
from visgraft.serve.covering import check_covering, name_sets, tasks_covered
from visgraft.serve.decoding import AnyPath, batches, decoded, path_of, prepared, readable, stacked
from visgraft.serve.naming import THRESHOLD, Classes, TaskAnswers, answers_to_tasks, best_classes
from visgraft.serve.ready import ReadyAdapter, background_of, check_prepared, transform_of
from visgraft.serve.unlike import Distances, apart, check_alone, no_distances

BATCH_SIZE = 64  # that of `evaluate`, so that both see the same rounding
ENSEMBLE = "ensemble"
"""What the adapters of an ensemble are called together."""


Naming = Callable[[AdapterRecord, Tensor], list[tuple[Classes, TaskAnswers | None]]]
"""Of what an adapter's outputs say [B, outputs] on the CPU: the classes, or the answers to tasks, of each image."""


class Prediction(NamedTuple):
    """What one adapter says of one image; `adapter` is its path or name as given, or an `Adapted`'s number, from 1.

    `image` is its path, or, as text, its URL. Of an adapter with several tasks, or a number, `tasks` holds the answer
    to each, and `classes` is empty; of others `tasks` is None. Where it was asked, `as_far` is the share of validation
    images that lie at least as far from the training's, and `unlike` whether that is no more than the level asked for.
    """

    image: AnyPath
    adapter: str
    classes: Classes
    tasks: TaskAnswers | None = None
    as_far: float | None = None
    unlike: bool | None = None


def predict(
    adapted: Adapted, paths: Sequence[str | Path], top: int | None = None, *, coverage: float | None = None
) -> list[Any]:
    """Return per image the `top` most probable classes with their probabilities, most probable first.

    Without `top` that is one class, or, where an image may have several, each of at least 50 %.

    With `coverage`, return the set of classes that holds the truth so often instead (see `predict_stream`).

    Of an adapter with several tasks, or a number, an image's entry holds the answer to each by its name: such classes,
    or a `NumberAnswer`.

    Raises:
        AdapterError: the transform makes other images than the model takes, or the adapter is not calibrated.
        DataError: a file is no image.
        VisgraftError: `paths` is one path and no list.
    """
    found = predict_stream([adapted], paths, top=top, coverage=coverage)
    return [one.classes if one.tasks is None else one.tasks for one in found]


@settled()
def predict_stream(
    adapters: Bank | Sequence[str | Path | Adapted],
    images: Iterable[str | Path],
    *,
    weights: str | None = None,
    top: int | None = None,
    threshold: float | None = None,
    coverage: float | None = None,
    unlike: float | None = None,
    batch_size: int = BATCH_SIZE,
    background: str | None = None,
    ensemble: bool = False,
    on_broken: Callable[[AnyPath, str], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Prediction]:
    """Yield a prediction of each adapter for each image, image by image, in the order given.

    Every image is decoded once, in threads ahead of the model, and only a few batches are held at any time. Adapters
    given by path share the tensors of their backbone, and the blocks that none of them changes run once for all. Each
    runs in the precision it was trained in; an `Adapted` runs where its model is, in float32 unless its record says
    otherwise.

    Args:
        adapters: a bank; or directories of adapters, `hf:USER/NAME`, or loaded ones, all of one backbone.
        images: paths or URLs (see the page on predicting), which may be an endless stream.
        weights: where the backbone's weights come from, in place of what the adapters say.
        top: how many classes to name at most, of each task; None: one, or, where images may have several classes, no
            limit.
        threshold: least probability of a class to be named, of adapters trained on images with several classes; 0.5.
        coverage: name, in place of the most probable classes, a set that holds the truth with this probability, such as
            0.95, of adapters that were calibrated when they were trained; probabilities are then calibrated ones.
        unlike: also tell pictures unlike those of the training, of which so few like them are taken for such, as 0.05.
        batch_size: images per forward.
        background: the colour behind transparent places, by name or as #rrggbb; None: as in training.
        ensemble: answer once for all adapters, by the mean of their probabilities, and of numbers in their unit.
        on_broken: called with path and reason for each file that is no image, which is left out; None: it is an error.
        on_progress: called with the number of images read so far, after each batch.

    Raises:
        AdapterError: an adapter is damaged, or not of the same backbone as the first one, or prepares images of another
            size than its model takes, or is not calibrated and `coverage` is given.
        DataError: a file is no image.
        VisgraftError: an option is out of range, cannot be promised or does not go with another, no adapter is given,
            or `images` is one path and no list.
    """
    _check_options(adapters, images, top, threshold, batch_size)
    bank, ready = _prepare(adapters, weights)
    _check_threshold(threshold, (one.record for one in ready))
    answering = [(one.name, one.record) for one in ready]
    check_covering(coverage, answering, top=top, threshold=threshold, ensemble=ensemble)
    transform, colour = transform_of(ready), background or background_of(ready)
    read = partial(prepared, transform=transform, colour=colour)
    found = decoded(map(path_of, images), read, 2 * batch_size)
    named = _naming(top, threshold, coverage)
    if ensemble:
        check_alone(unlike is not None)
        _check_ensemble(ready)
    distances = None if unlike is None else Distances(bank, [one.name for one in ready], unlike)
    return _run(bank, ready, batches(found, batch_size), ensemble, named, distances, on_broken, on_progress)


def predict_rows(
    bank: Bank,
    rows: Iterable[tuple[str | Path, str]],
    *,
    top: int | None = None,
    threshold: float | None = None,
    coverage: float | None = None,
    unlike: float | None = None,
    batch_size: int = BATCH_SIZE,
    background: str | None = None,
    on_broken: Callable[[AnyPath, str], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Prediction]:
    """Yield a prediction for each row, which is an image's path and the name of the adapter that is to answer it.

    Images of different adapters share a forward, each prepared as its adapter's were in training.

    Args:
        bank: the adapters.
        rows: may be an endless stream.
        top: as in `predict_stream`, like all that follows.
        threshold: least probability of a class.
        coverage: name sets of classes.
        unlike: also tell unlike pictures.
        batch_size: images per forward.
        background: the colour behind transparent places.
        on_broken: called for each file that is no image.
        on_progress: called with the number of images read so far.

    Raises:
        DataError: a file is no image.
        VisgraftError: an option is out of range, or the bank holds no adapter of a name.
    """
    _check_options(bank, rows, top, threshold, batch_size)
    _check_threshold(threshold, map(bank.record, bank.names))
    answering = ((name, bank.record(name)) for name in bank.names)
    check_covering(coverage, answering, top=top, threshold=threshold)
    named = _naming(top, threshold, coverage)
    pairs = ((path_of(path), name) for path, name in rows)

    def prepare(row: tuple[AnyPath, str]) -> tuple[Tensor, str]:
        return bank.prepare(row[0], row[1], background=background), row[1]

    read = ((path, found) for (path, _), found in decoded(pairs, prepare, 2 * batch_size))
    distances = None if unlike is None else Distances(bank, bank.names, unlike)
    return _run_rows(bank, batches(read, batch_size), named, distances, on_broken, on_progress)


def _run_rows(
    bank: Bank,
    read: Iterator[list[tuple[AnyPath, tuple[Tensor, str] | DataError]]],
    named: Naming,
    distances: Distances | None,
    on_broken: Callable[[AnyPath, str], None] | None,
    on_progress: Callable[[int], None] | None,
) -> Iterator[Prediction]:
    done = 0
    with distances.looking() if distances else no_distances() as look:
        for batch in read:
            good = readable(batch, on_broken)
            answers = bank([x for _, (x, _) in good], [name for _, (_, name) in good])
            fars = apart(look, [x for _, (x, _) in good], [name for _, (_, name) in good])
            for (path, _), answer, far in zip(good, answers, fars, strict=True):
                record, found = bank.record(answer.adapter), answer.probabilities.cpu()
                yield Prediction(path, answer.adapter, *named(record, found[None])[0], *far)
            done += len(batch)
            if on_progress is not None:
                on_progress(done)


def _check_options(
    adapters: Any, images: Iterable[Any], top: int | None, threshold: float | None, batch_size: int
) -> None:
    if isinstance(adapters, str | Path | Adapted) or not len(adapters):
        raise VisgraftError("adapters must be a list of at least one adapter")
    if isinstance(images, str | bytes | Path) or not isinstance(images, Iterable):
        given = f"{str(images)!r} is one path" if isinstance(images, str | Path) else f"{type(images).__name__} is none"
        raise VisgraftError(f"a list of paths is needed, but {given}; pass [path]")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise VisgraftError(f"{name} is {value}, but must be at least 1")
    if threshold is not None and not 0 <= threshold <= 1:
        raise VisgraftError(f"threshold is {threshold}, but must be between 0 and 1")


def check_question(
    records: Mapping[str, AdapterRecord],
    *,
    top: int | None = None,
    threshold: float | None = None,
    coverage: float | None = None,
    background: str | None = None,
    ensemble: bool = False,
    mixed: bool = False,
) -> None:
    """Raise what `predict_stream` or, if `mixed`, `predict_rows` would raise, before anything is loaded.

    Raises:
        AdapterError: the adapters, by name, cannot answer together, or one not with this coverage.
        DataError: there is no such colour.
        VisgraftError: the threshold would have no effect, or the coverage cannot be promised.
    """
    ready = [ReadyAdapter(name, record) for name, record in records.items()]
    _check_threshold(threshold, records.values())
    check_covering(coverage, records.items(), top=top, threshold=threshold, ensemble=ensemble)
    if background is not None:
        colour_of(background)
    if mixed:
        return
    transform_of(ready)
    if background is None:
        background_of(ready)
    if ensemble:
        _check_ensemble(ready)


def _check_threshold(threshold: float | None, records: Iterable[AdapterRecord]) -> None:
    if threshold is not None and not any(record.multi_label or record.has_several for record in records):
        raise VisgraftError("threshold is for adapters of images with several classes, and none is; leave it out")


def _run(
    bank: Bank | None,
    ready: Sequence[ReadyAdapter],
    read: Iterator[list[tuple[AnyPath, Tensor | DataError]]],
    ensemble: bool,
    named: Naming,
    distances: Distances | None,
    on_broken: Callable[[AnyPath, str], None] | None,
    on_progress: Callable[[int], None] | None,
) -> Iterator[Prediction]:
    done, fitting = 0, set[torch.Size]()
    with ExitStack() as stack:
        for one in ready:
            if one.adapted is not None:
                stack.enter_context(eval_mode(one.adapted.model))
        look = stack.enter_context(distances.looking() if distances else no_distances())
        for batch in read:
            good = readable(batch, on_broken)
            if good:
                x = stacked(good)
                if x.shape[1:] not in fitting:
                    check_prepared(ready, x.shape[1], x.shape[2:])
                    fitting.add(x.shape[1:])
                columns = [(name, named(record, p)) for name, record, p in _answers(bank, ready, x, ensemble)]
                far = look(x, [name for name, _ in columns])
                for row, (path, _) in enumerate(good):
                    each = zip(columns, far[row], strict=True)
                    yield from (Prediction(path, name, *answers[row], *told) for (name, answers), told in each)
            done += len(batch)
            if on_progress is not None:
                on_progress(done)


def _answers(
    bank: Bank | None, ready: Sequence[ReadyAdapter], x: Tensor, ensemble: bool
) -> list[tuple[str, AdapterRecord, Tensor]]:
    """Return who answers a batch: the name, the record that names the outputs, and what they say [B, outputs]."""
    of_bank = [one.name for one in ready if one.adapted is None]
    banked = iter(zip(*bank.every(x, of_bank), strict=True)) if bank else iter(())
    each = []
    for one in ready:
        if one.adapted is None:
            logits = torch.stack([answer.logits for answer in next(banked)]).float()
        else:
            logits = _logits(one.adapted, x)
        each.append(one.record.answers(logits).cpu())
    if ensemble:
        return [(ENSEMBLE, ready[0].record, torch.stack(each).mean(0))]
    return [(one.name, one.record, found) for one, found in zip(ready, each, strict=True)]


def _logits(adapted: Adapted, x: Tensor) -> Tensor:
    """Return the logits [B, classes] of normalised images [B, 3, H, W]."""
    like = next(adapted.model.parameters())
    with torch.inference_mode(), Compute(like.device, resolve_precision(adapted.record.precision)).autocast():
        found: Tensor = adapted.model(x.to(like.device, like.dtype)).float()
    return found


def _check_ensemble(ready: Sequence[ReadyAdapter]) -> None:
    """Raise an AdapterError where there is one adapter only, or two answer other classes or tasks."""
    if len(ready) < 2:
        raise AdapterError("an ensemble needs two adapters or more; name another, or leave out ensemble (--ensemble)")
    kinds = [
        (one.record.classes, one.record.outputs, one.record.task, [(t.name, t.kind, t.unit) for t in one.record.tasks])
        for one in ready
    ]
    for one, kind in zip(ready, kinds, strict=True):
        if kind != kinds[0]:
            raise AdapterError(
                f"{ready[0].name} and {one.name} do not answer the same {'tasks' if kinds[0][3] else 'classes'} in one "
                "order, so no mean says anything"
            )


def _named(
    record: AdapterRecord, answers: Tensor, top: int | None, threshold: float
) -> list[tuple[Classes, TaskAnswers | None]]:
    """Return the classes, or the answers to tasks, of each image, of what its outputs say [B, outputs] on the CPU."""
    if record.tasks:
        return [([], found) for found in answers_to_tasks(record.tasks, answers, top, threshold)]
    return [(found, None) for found in name_classes(record, answers, top, threshold)]


def name_classes(record: AdapterRecord, probabilities: Tensor, top: int | None, threshold: float) -> list[Classes]:
    """Name the classes of each image, of probabilities [B, classes] on the CPU."""
    names = record.classes or tuple(str(number) for number in range(probabilities.shape[-1]))
    return best_classes(names, probabilities, record.multi_label, top, threshold)


def _naming(top: int | None, threshold: float | None, coverage: float | None) -> Naming:
    if coverage is not None:
        return partial(_covered, coverage=coverage)
    return partial(_named, top=top, threshold=THRESHOLD if threshold is None else threshold)


def _covered(record: AdapterRecord, answers: Tensor, coverage: float) -> list[tuple[Classes, TaskAnswers | None]]:
    """Return what `_named` does, of sets and intervals with a coverage."""
    if record.tasks:
        return [([], found) for found in tasks_covered(record, answers, coverage)]
    return [(found, None) for found in name_sets(record, answers, coverage)]


def _prepare(
    adapters: Bank | Sequence[str | Path | Adapted], weights: str | None
) -> tuple[Bank | None, list[ReadyAdapter]]:
    """Put what is given by path into a bank."""
    if isinstance(adapters, Bank):
        if weights is not None:
            raise VisgraftError("a bank has its weights already; leave out weights, or pass them to load_bank")
        return adapters, [ReadyAdapter(name, adapters.record(name)) for name in adapters.names]
    paths = [path for path in adapters if not isinstance(path, Adapted)]
    check_same_backbone(paths)
    bank = load_bank(paths, weights=weights) if paths else None
    ready = []
    for number, adapter in enumerate(adapters, 1):
        if isinstance(adapter, Adapted):
            ready.append(ReadyAdapter(str(number), adapter.record, adapter))
        elif bank is not None:
            ready.append(ReadyAdapter(str(adapter), bank.record(str(adapter))))
    return bank, ready
