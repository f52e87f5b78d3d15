"""Which of many adapters fits a few labelled images best? The one whose features a linear head tells them apart by."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visgraft.adapters.directory import read_record
from visgraft.adapters.hub import settled
from visgraft.adapters.record import AdapterRecord
from visgraft.algebra.features import pooled_features
from visgraft.algebra.probing import ProbedFeatures, fold_count, probe_features
from visgraft.bank.bank import Bank
from visgraft.bank.opening import empty_bank, find_adapters
from visgraft.data.dataset import Dataset, Split
from visgraft.data.image_table import is_table
from visgraft.data.images import Images, Loading, load_images
from visgraft.data.read import AnySource, Source, read_data
from visgraft.data.table_lines import folded
from visgraft.data.tasks import output_slices
from visgraft.errors import AdapterError, DataError, VisgraftError
from visgraft.measure.intervals import Difference, clusters, paired_difference, rate_interval
from visgraft.measure.measuring import adapter_data

_DEFAULT_LOADING = Loading()


@dataclass(frozen=True)
class FeatureScore:
    """How well an adapter's features suit labelled images; those of the plain backbone have no `method`.

    `score` is the cross-validated top-1 of a linear head on the features, `interval` its 95 % interval over the images,
    `log_loss` that of its probabilities, by which equal scores are ordered. `gain` is the difference to the plain
    backbone's features, `gain_half_width` half its 95 % interval. `own` is the top-1 of the adapter's own head, where
    that was asked for and it, or one of its tasks, answers the same classes, and `own_interval` its interval.
    `learned`: the adapter was trained on images of this very data set, which flatters it.
    """

    name: str
    method: str | None
    score: float
    interval: tuple[float, float]
    log_loss: float
    gain: float | None = None
    gain_half_width: float | None = None
    own: float | None = None
    own_interval: tuple[float, float] | None = None
    learned: bool = False

    @property
    def clear(self) -> bool:
        """Whether it is better than the plain backbone beyond chance."""
        return self.gain is not None and Difference(self.gain, self.gain_half_width or 0.0).clear and self.gain > 0


@dataclass(frozen=True)
class LeftOut:
    """An adapter that could not be looked at, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class NearestAdapters:
    """The adapters by falling score; `plain` is the backbone alone, for each way in which images were prepared.

    `images`, `classes` and `folds` are those of the cross-validation, `lead` the difference of the best adapter's score
    to the second's. `left_out` lists those that could not be looked at.
    """

    data: str
    backbone: str
    images: int
    classes: int
    folds: int
    plain: tuple[FeatureScore, ...]
    adapters: tuple[FeatureScore, ...]
    left_out: tuple[LeftOut, ...]
    lead: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        lead = None if self.lead is None else self.lead._asdict()
        return dataclasses.asdict(self) | {"lead": lead}


class _Prepared(NamedTuple):
    """Images as some adapters take them, and what the plain backbone's features of them are worth."""

    images: Images
    folds: int
    plain: ProbedFeatures
    first: str


@settled()
def nearest_adapters(
    photos: AnySource,
    among: str | Path,
    *,
    weights: str | None = None,
    full: bool = False,
    loading: Loading = _DEFAULT_LOADING,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> NearestAdapters:
    """Order the adapters below a folder by how well a linear head on their features tells labelled images apart.

    The images' classes need not be those of any adapter. The backbone is held once, with one adapter beside it.

    Args:
        photos: labelled images, as for training, with one class each; all parts are used.
        among: a folder with adapters of one backbone at any depth. Those of another than most are left out.
        weights: where the backbone's weights come from, in place of what the adapters say.
        full: measure the adapters' own answers too, where their classes are the images'.
        loading: how the images are read.
        on_progress: called with the number of adapters done, and of all.

    Raises:
        AdapterError: no adapter can be looked at; the first reason is named.
        DataError: the images cannot be used, or a class has one only.
        WeightsError: the backbone's weights cannot be had.
    """
    dataset = _read_single(photos)
    paths = find_adapters(among)
    records, left = _readable(paths)
    if not records:
        raise _nothing_left(among, left)
    chosen = _commonest(records)
    bank = empty_bank(paths[chosen], weights=weights)
    prepared, found = dict[str, _Prepared](), list[tuple[FeatureScore, np.ndarray]]()
    for number, (name, record) in enumerate(records.items()):
        on_progress(number, len(records))
        try:
            _put(bank, name, paths[name], record, records[chosen])
        except VisgraftError as error:
            left.append(LeftOut(name, str(error)))
            continue
        ready = _prepare(prepared, bank, dataset, name, loading)
        found.append(_score(bank, name, dataset, ready, full, _learned(paths[name], record, dataset, photos)))
        bank.remove(name)
    if not found:
        raise _nothing_left(among, left)
    found.sort(key=lambda pair: (-round(pair[0].score, 9), pair[0].log_loss))  # equal but for the order of adding
    images = next(iter(prepared.values())).images
    return NearestAdapters(
        data=str(photos),
        backbone=records[chosen].backbone.name,
        images=len(images),
        classes=len(dataset.classes),
        folds=fold_count(images, dataset.classes),
        plain=tuple(_plain_score(ready, len(prepared) > 1) for ready in prepared.values()),
        adapters=tuple(score for score, _ in found),
        left_out=tuple(sorted(left, key=lambda one: one.name)),
        lead=_lead([right for _, right in found], images),
    )


def _read_single(photos: AnySource) -> Dataset:
    """Return labelled images, undivided, each of one class."""
    dataset = read_data(photos, Split(0.0, 0.0))
    if len(dataset.tasks) > 1:
        named = ", ".join(task.name for task in dataset.tasks)
        raise DataError(f"{dataset.root}: nearest compares by one class per image; name one of {named}, with --label")
    if dataset.multi_label or dataset.tasks:
        found = f"the number {dataset.tasks[0].name}" if dataset.tasks else "several classes per image"
        raise DataError(f"{dataset.root} has {found}, but nearest compares by one class per image; give such labels")
    return dataset


def _lead(rights: Sequence[np.ndarray], images: Images) -> Difference | None:
    """Return by how much the first adapter's features are right more often than the second's; None of one alone."""
    if len(rights) < 2:
        return None
    return paired_difference(rights[0], rights[1], clusters(images.groups, len(images)))


def _readable(paths: Mapping[str, Path]) -> tuple[dict[str, AdapterRecord], list[LeftOut]]:
    """Return the records of the adapters that can be read, and those that cannot."""
    records, left = dict[str, AdapterRecord](), list[LeftOut]()
    for name, path in paths.items():
        try:
            records[name] = read_record(path)
        except VisgraftError as error:
            left.append(LeftOut(name, str(error)))
    return records, left


def _commonest(records: Mapping[str, AdapterRecord]) -> str:
    """Return the first adapter of the backbone that most are of."""
    # An adapter that trains tensors which somebody else unfroze has a digest without those.
    kinds = {name: repr((one.backbone.name, one.digest, one.own)) for name, one in records.items()}
    (most, _), *_ = Counter(kinds.values()).most_common(1)
    return next(name for name, kind in kinds.items() if kind == most)


def _put(bank: Bank, name: str, path: Path, record: AdapterRecord, chosen: AdapterRecord) -> None:
    """Put an adapter into the bank.

    Raises:
        AdapterError: it is of another backbone, or damaged.
    """
    if record.backbone.name != chosen.backbone.name:
        raise AdapterError(f"{path} is of {record.backbone.name}, but most are of {chosen.backbone.name}")
    bank.add(name, path)


def _nothing_left(among: str | Path, left: Sequence[LeftOut]) -> AdapterError:
    more = f" ({len(left) - 1} more in {among} cannot be used either)" if len(left) > 1 else ""
    return AdapterError(f"{among} holds no adapter that can be used: {left[0].reason}{more}")


def _prepare(prepared: dict[str, _Prepared], bank: Bank, dataset: Dataset, name: str, loading: Loading) -> _Prepared:
    """Return the images as an adapter's were prepared, with the worth of the plain backbone's features of them."""
    record = bank.record(name)
    background = loading.background or record.background or "white"
    key = json.dumps([dict(record.data_config), background], sort_keys=True, default=list)
    if key not in prepared:
        images = load_images(
            dataset.all,
            record.data_config,
            outputs=len(dataset.classes),
            **vars(dataclasses.replace(loading, background=background)),
        )
        folds = fold_count(images, dataset.classes)
        features, _ = pooled_features(bank, None, images, record.precision)
        prepared[key] = _Prepared(images, folds, probe_features(features, images, folds), name)
    return prepared[key]


def _learned(path: Path, record: AdapterRecord, dataset: Dataset, photos: AnySource) -> bool:
    """Whether an adapter was trained on this data set, or on other label columns of this very table."""
    source = photos if isinstance(photos, Source) else Source(photos)
    same = record.fingerprint == dataset.fingerprint
    if same or not is_table(str(source.table or source.location)):
        return same
    try:
        return adapter_data(path, dataclasses.replace(source, labels=None))[1]
    except VisgraftError:  # it has not those columns
        return False


def _score(
    bank: Bank, name: str, dataset: Dataset, ready: _Prepared, full: bool, learned: bool
) -> tuple[FeatureScore, np.ndarray]:
    """Return an adapter's score, and which images its features were right on [N]."""
    record, images = bank.record(name), ready.images
    members = clusters(images.groups, len(images))
    features, logits = pooled_features(bank, name, images, record.precision)
    probed = probe_features(features, images, ready.folds)
    gain = paired_difference(probed.right, ready.plain.right, members)
    own: dict[str, Any] = {}
    answer = _own_answer(record, dataset) if full else None
    if answer is not None:
        known, place = answer
        numbers = np.array([dataset.classes.index(name) for name in known])
        right = (numbers[logits[:, place].argmax(-1).numpy()] == images.labels.numpy()).astype(np.float64)
        own = {"own": float(right.mean()), "own_interval": rate_interval(right, members)}
    score = FeatureScore(
        name,
        record.method.method,
        float(probed.right.mean()),
        rate_interval(probed.right, members),
        probed.log_loss,
        gain.mean,
        gain.half_width,
        learned=learned,
        **own,
    )
    return score, probed.right


def _own_answer(record: AdapterRecord, dataset: Dataset) -> tuple[Sequence[str], slice] | None:
    """Return the classes and the outputs by which an adapter itself tells the images' classes; None: it does not.

    Of several tasks it is the one with these classes; where more than one has them, that which is called as the column.
    """
    if not record.tasks:
        fits = record.task == "one_class" and set(record.classes) == set(dataset.classes)
        return (record.classes, slice(None)) if fits else None
    found = [
        (task.name, task.classes, place)
        for task, place in zip(record.tasks, output_slices(record.tasks), strict=True)
        if task.kind == "one_class" and set(task.classes) == set(dataset.classes)
    ]
    if len(found) > 1:
        found = [one for one in found if folded(one[0]) == folded(dataset.label_column)]
    return found[0][1:] if found else None


def _plain_score(ready: _Prepared, several: bool) -> FeatureScore:
    probed, images = ready.plain, ready.images
    name = f"plain backbone, images as for {ready.first}" if several else "plain backbone"
    interval = rate_interval(probed.right, clusters(images.groups, len(images)))
    return FeatureScore(name, None, float(probed.right.mean()), interval, probed.log_loss)
