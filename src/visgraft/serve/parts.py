"""A prediction over any number of images, in parts: a folder of .parquet files, each of which appears when it is whole.

Images are numbered in the order they are given, and part i holds those from i * part_size on. Whoever is killed leaves
whole parts, so that what is missing can be answered by anybody, at any time: every image exactly once.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from visgraft.data.image_list import ImageList
from visgraft.errors import VisgraftError
from visgraft.executors.job import Event, Executor, Job
from visgraft.files import check_target, check_writable, one_at_a_time, write_json
from visgraft.serve.layout import ERROR
from visgraft.serve.part import Question, answer_part
from visgraft.serve.tables import check_pyarrow
from visgraft.version import __version__

MARKER = "_predict.json"  # pyarrow and others pass over what begins so when they read the folder as one table
LATER = ("coverage", "unlike")
"""Options that runs of earlier versions did not have."""
MOST_NAMED = 5
LOG = logging.getLogger(__name__)


class PartsWritten(NamedTuple):
    """What there is of all parts: how many are missing, and how many images are broken, the first of them with reasons.

    An image that several adapters were to answer counts once.
    """

    missing: int
    broken: int
    named: list[tuple[str, str]]


def open_parts(out: Path, question: Question, images: ImageList) -> None:
    """Make the folder of a run, or check that it is this run's.

    Raises:
        VisgraftError: it is another run's, or something else, or cannot be written.
    """
    check_pyarrow(out)
    if out.exists() and not out.is_dir():
        check_target(out, MARKER)
    check_writable(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VisgraftError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    check_writable(out / MARKER)
    facts = _facts(question, images)
    with one_at_a_time(out):
        check_target(out, MARKER)
        if not (out / MARKER).exists():
            write_json(out / MARKER, {"visgraft": __version__, **facts})
            return
    try:
        there = dict.fromkeys(LATER) | json.loads((out / MARKER).read_text(encoding="utf-8"))
        differing = next((what for what, value in facts.items() if there[what] != value), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VisgraftError(f"{out / MARKER} is damaged ({error}); choose another --out") from error
    if differing:
        raise VisgraftError(
            f"{out} holds another run: {_difference(differing, there[differing], facts[differing])}; "
            "give the options of that run, or another --out"
        )


def missing_parts(out: Path, images: ImageList, shard: tuple[int, int] = (1, 1)) -> list[int]:
    """Return the numbers of the parts that are not there, of every so manyth part: the shard (3, 16) has 2, 18, 34 …"""
    there = set(os.listdir(out))
    return [number for number in range(shard[0] - 1, images.parts, shard[1]) if _part(number) not in there]


def run_parts(
    out: Path,
    question: Question,
    images: ImageList,
    numbers: Sequence[int],
    executor: Executor,
    on_progress: Callable[[int], None],
) -> None:
    """Write some parts, wherever the executor runs; after a failure none is begun any more.

    Args:
        out: the folder.
        question: what is asked of each image.
        images: all images.
        numbers: the parts.
        executor: where parts are written. All of its places must have the folder, and the images, under one path.
        on_progress: called with the number of images read so far.

    Raises:
        VisgraftError: a part failed.
    """
    out, here = out.absolute(), os.getcwd()
    left, failed, read, written = iter(numbers), list[str](), dict[str, int](), 0

    def next_job() -> Job | None:
        number = None if failed else next((one for one in left if not (out / _part(one)).exists()), None)
        if number is None:
            return None
        work = partial(answer_part, question, images.part(number), here, str(out / _part(number)))
        return Job(str(number), f"part {number}", work)

    def tell(event: Event) -> None:
        nonlocal written
        if event.kind == "note":
            read[event.key] = event.value
        elif event.kind == "done":
            written += images.size(int(event.key))
            read.pop(event.key, None)
        elif event.kind == "failed":
            failed.append(event.value)
        elif event.kind == "again":
            read.pop(event.key, None)
            LOG.info("part %s was lost and starts anew: %s", event.key, event.value)
        if event.kind in ("note", "done"):
            on_progress(written + sum(read.values()))

    executor.run(next_job, tell)
    if failed:
        raise VisgraftError(f"{failed[0].rstrip('.')}; the parts that are written stay, and the same command goes on")


def count_parts(out: Path, question: Question, images: ImageList) -> PartsWritten:
    """Return what there is of all parts; where none is missing, what killed processes have left is removed.

    Raises:
        VisgraftError: a part cannot be read.
    """
    absent = set(missing_parts(out, images))
    each = 1 if question.mixed else len(question.answering)
    rows, named = 0, list[tuple[str, str]]()
    for number in range(images.parts):
        if number not in absent:
            broken = _broken_rows(out / _part(number))
            rows += broken
            if broken and len(named) < MOST_NAMED:
                named += _broken(out / _part(number), MOST_NAMED - len(named))
    if not absent:
        for left in out.glob(".part-*"):
            with contextlib.suppress(OSError):
                left.unlink()
    return PartsWritten(len(absent), rows // each, named)


def _part(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _facts(question: Question, images: ImageList) -> dict[str, Any]:
    """Return what decides the answers, and how they lie in parts."""
    options = ("weights", "top", "threshold", "coverage", "unlike", "background", "ensemble")
    return {
        "adapters": {one.name: one.digest for one in question.adapters},
        **{name: getattr(question, name) for name in options},
        "part_size": images.part_size,
        "images": len(images),
        "names_sha256": images.digest,
    }


def _difference(what: str, there: Any, here: Any) -> str:
    if what == "adapters":
        other = next((name for name in here if name in there and here[name] != there[name]), None)
        return "its adapters are others" if other is None else f"the adapter {other} has changed since"
    if what == "images":
        return f"it is of {there:,} images, and {here:,} are given now"
    if what == "names_sha256":
        return "its images are others, or in another order"
    return f"--{what.replace('_', '-')} was {'not given' if there is None else there}, and is {here} now"


def _broken_rows(file: Path) -> int:
    """Return how many rows of a part have no answer, by what the file says of itself."""
    import pyarrow
    import pyarrow.parquet

    try:
        facts = pyarrow.parquet.read_metadata(file)
        column = facts.schema.to_arrow_schema().get_field_index(ERROR)
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        return sum(group.num_rows - group.column(column).statistics.null_count for group in groups)
    except (OSError, pyarrow.ArrowException) as error:
        raise VisgraftError(f"{file} is no readable .parquet file; remove it, and give the command again") from error


def _broken(file: Path, most: int) -> list[tuple[str, str]]:
    """Return the first broken images of a part, and why they are."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file, columns=["image", ERROR])
    rows = zip(table["image"].to_pylist(), table[ERROR].to_pylist(), strict=True)
    return list({image: (image, error) for image, error in rows if error is not None}.values())[:most]
