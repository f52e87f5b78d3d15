"""One part of a long prediction: a function of adapters, options and images, so that it can run anywhere, and again."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from visgraft.adapters.directory import read_record
from visgraft.adapters.hub import HubPlace, on_hub, parse, resolve, settled
from visgraft.backbones.creation import KINDS
from visgraft.bank.bank import Bank
from visgraft.bank.opening import load_bank
from visgraft.data.image_list import Named
from visgraft.data.urls import from_folder
from visgraft.errors import AdapterError, DataError
from visgraft.executors.job import Note
from visgraft.serve.decoding import AnyPath, path_of
from visgraft.serve.layout import TableLayout, table_layout
from visgraft.serve.prediction import (
    BATCH_SIZE,
    ENSEMBLE,
    Prediction,
    check_question,
    predict_rows,
    predict_stream,
)
from visgraft.serve.store import files_digest
from visgraft.serve.tables import parquet_part
from visgraft.serve.unlike import check_references


class PinnedAdapter(NamedTuple):
    """An adapter as it is now: its name, where it lies, and the digest of its files."""

    name: str
    path: str
    digest: str


@dataclass(frozen=True)
class Question:
    """What is asked of each image: adapters, the columns of their answers, and options of `predict_stream`.

    With `mixed` each image names its adapter. With `skip_broken` an image that cannot be read is a row with its reason,
    otherwise it is an error.
    """

    adapters: tuple[PinnedAdapter, ...]
    layout: TableLayout
    weights: str | None = None
    top: int | None = None
    threshold: float | None = None
    coverage: float | None = None
    unlike: float | None = None
    background: str | None = None
    batch_size: int = BATCH_SIZE
    ensemble: bool = False
    mixed: bool = False
    skip_broken: bool = False

    @property
    def answering(self) -> tuple[str, ...]:
        """Who answers every image, unless each names its adapter."""
        return (ENSEMBLE,) if self.ensemble else tuple(one.name for one in self.adapters)


@settled()
def make_question(adapters: Mapping[str, str], **options: Any) -> Question:
    """Return what is asked with these adapters, given by name, after checking that they can answer it.

    Raises:
        AdapterError: one is damaged, or they cannot answer together.
        VisgraftError: an option is out of range.
    """
    records = {name: read_record(path) for name, path in adapters.items()}
    asked = ("top", "threshold", "coverage", "background", "ensemble", "mixed")
    checked: Any = {name: options[name] for name in asked if name in options}
    check_question(records, **checked)
    check_references(adapters, options.get("unlike"), bool(options.get("ensemble")))
    pinned = tuple(PinnedAdapter(name, _pinned(path), files_digest(path)) for name, path in adapters.items())
    if (weights := options.get("weights")) not in (None, *KINDS):
        options["weights"] = os.path.abspath(str(weights))
    layout = table_layout(records, options.get("top"), options.get("coverage"), options.get("unlike") is not None)
    return Question(pinned, layout, **options)


def answer_part(question: Question, images: Sequence[Named], folder: str, out: str, note: Note) -> None:
    """Write the answers to some images as one .parquet file, unless it is there.

    Args:
        question: what is asked.
        images: paths or URLs; relative paths start at `folder`.
        folder: see above.
        out: the file, which appears when it is whole.
        note: called with the number of images read so far.

    Raises:
        AdapterError: an adapter is no longer what it was.
        DataError: an image cannot be read, and broken ones are not skipped.
        VisgraftError: the file cannot be written.
    """
    if os.path.exists(out):
        return
    bank = _opened(question.adapters, question.weights)
    with parquet_part(Path(out), question.layout) as write:
        for (image, adapter), answers, error in _answered(question, bank, images, folder, note):
            for found in answers:
                write(found._replace(image=image), None)
            if error is not None:
                for name in (adapter,) if question.mixed else question.answering:
                    write(Prediction(image, name, []), error)


def _answered(
    question: Question, bank: Bank, images: Sequence[Named], folder: str, note: Note
) -> Iterator[tuple[Named, list[Prediction], str | None]]:
    """Yield for each image, in order, its predictions, or why there are none."""
    paths = [path_of(from_folder(folder, image)) for image, _ in images]
    broken = deque[tuple[AnyPath, str]]()
    options: dict[str, Any] = {
        "top": question.top,
        "threshold": question.threshold,
        "coverage": question.coverage,
        "unlike": question.unlike,
        "background": question.background,
        "batch_size": question.batch_size,
        "on_broken": (lambda path, reason: broken.append((path, reason))) if question.skip_broken else None,
        "on_progress": note,
    }
    if question.mixed:
        rows = [(path, adapter) for path, (_, adapter) in zip(paths, images, strict=True)]
        found = predict_rows(bank, rows, **options)
    else:
        found = predict_stream(bank, paths, ensemble=question.ensemble, **options)
    each = 1 if question.mixed else len(question.answering)
    ahead: list[Prediction] | None = None
    try:
        for path, named in zip(paths, images, strict=True):
            ahead = list(islice(found, each)) if ahead is None else ahead
            if ahead and ahead[0].image == path:
                yield named, ahead, None
                ahead = None
            else:  # broken ones are told of before the next answer comes
                yield named, [], broken.popleft()[1]
    except DataError as error:
        raise DataError(f"{error}, or list it and go on with --skip-broken") from error


@lru_cache(maxsize=1)
def _opened(adapters: tuple[PinnedAdapter, ...], weights: str | None) -> Bank:
    """Return the bank of some adapters, which a process keeps for its next part."""
    for one in adapters:
        if files_digest(one.path) != one.digest:
            raise AdapterError(f"{one.name} has changed since this run began; put it back, or begin another --out")
    return load_bank({one.name: one.path for one in adapters}, weights=weights)


def _pinned(path: str) -> str:
    """Return where an adapter is, wherever it is asked from: on the hub its very commit."""
    if on_hub(path):
        return str(HubPlace(parse(path).name, resolve(path).name))
    return os.path.abspath(path)
