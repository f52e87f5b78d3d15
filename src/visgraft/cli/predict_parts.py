"""The verb `predict` over any number of images: parts in a folder, of which any process writes what is missing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import CpusPerWorker, GpusPerWorker
from visgraft.errors import Interrupted, VisgraftError

if TYPE_CHECKING:
    from visgraft.cli.predict_images import Work
    from visgraft.data.image_list import ImageList
    from visgraft.executors.job import Executor
    from visgraft.serve.part import Question
    from visgraft.serve.parts import PartsWritten

PART_SIZE = 10_000
OTHER_TABLES = (".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".parq", ".arrow", ".feather")
"""Names that nobody gives to a folder."""


PartSize = Annotated[
    int | None, typer.Option(help="--out FOLDER: images of each part; none: 10000", min=1, show_default=False)
]
Shard = Annotated[
    str | None,
    typer.Option(help="--out FOLDER: 3/16 writes the third of every 16 parts; none: all", show_default=False),
]
OnParts = Annotated[
    str | None,
    typer.Option(
        help="--out FOLDER: where parts are written: here, processes, ray or ray://HOST:PORT; none: here",
        show_default=False,
    ),
]
PartsAtATime = Annotated[
    int | None, typer.Option(help="--out FOLDER: parts written at a time; none: 1, or on Ray as many as fit", min=1)
]


@dataclass(frozen=True)
class PartOptions:
    """The options that only a folder of parts has, as typed; None where they are not given."""

    part_size: PartSize = None
    shard: Shard = None
    on: OnParts = None
    workers: PartsAtATime = None
    cpus_per_worker: CpusPerWorker = None
    gpus_per_worker: GpusPerWorker = None

    def for_folder(self, out: Path | None) -> bool:
        """Return whether answers go to a folder of parts.

        Raises:
            VisgraftError: they do not, but one of the options is given; or it is wrong.
        """
        from visgraft.cli.predict_output import is_table_name

        self.numbers()
        if out is not None and not is_table_name(out) and out.suffix.lower() not in OTHER_TABLES:
            return True
        given = next((name for name, value in vars(self).items() if value is not None), None)
        if given:
            option = f"--{given.replace('_', '-')}"
            raise VisgraftError(
                f"{option} is for answers in parts; give a folder: --out FOLDER, a name without an ending"
            )
        return False

    def numbers(self) -> tuple[int, int]:
        """Return which of how many shards is to be written, counted from 1.

        Raises:
            VisgraftError: this cannot be understood, or there is no such shard.
        """
        if self.shard is None:
            return 1, 1
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shard)
        number, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= of:
            raise VisgraftError(
                f"--shard is {self.shard!r}, but must be NUMBER/ALL with a number from 1 to ALL, such as 3/16"
            )
        return number, of

    def executor(self) -> "Executor":
        """Return what writes the parts."""
        from visgraft.executors.choosing import choose_executor

        place = "processes" if self.workers else "here"
        return choose_executor(
            place if self.on is None else self.on,
            self.workers,
            cpus=self.cpus_per_worker,
            gpus=self.gpus_per_worker,
            preload=["visgraft.serve.part"],
            fresh=False,
            each="worker",
        )


def predict_in_parts(
    out: Path,
    named: Mapping[str, str],
    images: Sequence[str],
    work: "Work | None",
    asked: Mapping[str, Any],
    options: PartOptions,
    json: bool,
) -> None:
    """Write the parts of this shard that are missing, and say what there is then."""
    from visgraft.adapters.hub import settled
    from visgraft.bank.opening import check_same_backbone
    from visgraft.cli.predict_images import list_images
    from visgraft.cli.predict_output import StreamProgress
    from visgraft.serve.part import make_question
    from visgraft.serve.parts import count_parts, missing_parts, open_parts, run_parts

    with settled():
        check_same_backbone(list(named.values()), prepared_alike=not work)
        question = make_question(named, mixed=bool(work), **asked)
    every = list_images(images, work, options.part_size or PART_SIZE)
    executor = options.executor()
    open_parts(out, question, every)
    numbers = missing_parts(out, every, options.numbers())
    progress = StreamProgress(sum(map(every.size, numbers)), hidden=False)
    with progress:
        if numbers:
            try:
                run_parts(out, question, every, numbers, executor, progress.show)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted; the parts that are whole stay in {out}, and the same command goes on"
                ) from None
    _report(out, question, every, len(numbers), progress, count_parts(out, question, every), json)


def _report(
    out: Path,
    question: "Question",
    images: "ImageList",
    ours: int,
    progress: Any,
    found: "PartsWritten",
    json: bool,
) -> None:
    """Say what was written, what is missing, and which images are broken."""
    from visgraft.cli.show import emit, progress_console
    from visgraft.cli.text import visible
    from visgraft.serve.tables import written

    figures = {
        "out": str(out),
        "adapters": [one.name for one in question.adapters] if question.mixed else question.answering,
        "images": len(images),
        "parts": images.parts,
        "written": ours,
        "missing": found.missing,
        "broken": found.broken,
        "first_broken": [{"image": image, "reason": reason} for image, reason in found.named],
        "seconds": progress.seconds,
        "images_per_second": progress.done / progress.seconds,
    }
    if found.broken:
        progress_console.print(
            f"{found.broken:,} images are broken (their rows say why), the first of them:", style="yellow"
        )
        for _, reason in found.named:
            progress_console.print(f"  {reason}")
    many, all_adapters = len(question.answering), len(question.adapters)
    several = f", each with its own of {all_adapters} adapters" if question.mixed else f" × {many} adapters"
    what = f"{len(images):,} images{several if all_adapters > 1 and many > 1 else ''}"
    now = f"{ours:,} written now, {progress.rate}" if ours else "none of this command was left to write"
    if found.missing:
        line = f"{written(out)}: {found.missing:,} of {images.parts:,} parts are missing, {what} in all; {now}"
    else:
        line = f"{written(out)}: all {images.parts:,} parts are there, {what}; {now}"
    emit(figures, json, lambda: print(visible(line)))
