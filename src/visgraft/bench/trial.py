"""A trial: one training, described by nothing but values, so that any machine that has the images can run it."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from visgraft.backbones.creation import Backbone
from visgraft.bench.measures import TOP1, check_measured
from visgraft.data.examples import tasks_of
from visgraft.errors import VisgraftError
from visgraft.options import AUTO, TrainConfig
from visgraft.protocols.row import Parts

RESULTS = 1
"""Version of what a trial computes and a line holds; a change of it makes all earlier lines stale."""
KINDS = ("tune", "final")
NORMALISATIONS = ("model", "imagenet", "half")


@dataclass(frozen=True)
class Trial:
    """One training of one method on one task.

    Kind "tune" trains on the training images and is measured on the validation images: it never sees a test image.
    Kind "final" trains on `final_parts` with a setting that is already chosen, and is measured once on the test images,
    after its last epoch. `method_options` and `train` hold every option, defaults too, so that a trial means the same
    whatever a later version's defaults are. `split` is the digest of the task's images and labels, `reduced` says that
    their numbers are not the published ones.

    Raises:
        VisgraftError: the trial would choose on images that it should only be measured on.
    """

    protocol: str
    task: str
    group: str
    classes: int
    shots: int
    kind: str
    method: str
    method_options: Mapping[str, Any]
    train: Mapping[str, Any]
    recipe: str
    backbone: Mapping[str, Any]
    seed: int
    split: str
    split_seed: int
    final_parts: str
    normalisation: str = "model"
    squash: bool = True
    reduced: bool = False
    chosen_from: tuple[str, ...] = ()
    """The keys of the trials of kind "tune" that the setting was chosen from; none: it was not chosen."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise VisgraftError(f"a trial's kind is {self.kind!r}, but must be one of {', '.join(KINDS)}")
        if self.train.get("select") != "last":
            raise VisgraftError(
                f"a trial keeps the epoch that is best on the images it is measured on (select={self.train['select']!r}"
                "), which flatters it; use select='last'"
            )

    @cached_property
    def key(self) -> str:
        """The digest of all values: a finished line with this key is this trial's."""
        return digest({"results": RESULTS, **asdict(self)})

    @property
    def setting(self) -> dict[str, Any]:
        """What was tuned apart from the seed: the method, its options and those of training."""
        return {"method": self.method, **self.method_options, **{k: v for k, v in self.train.items() if k != "seed"}}

    @property
    def row(self) -> str:
        """The row of a table that it belongs to: its method's, or that of an automatic choice, which chose it."""
        return AUTO if self.recipe == AUTO else self.method

    @property
    def name(self) -> str:
        """A few words for people."""
        return f"{self.task} {self.row} {self.kind} seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def train_config(self) -> TrainConfig:
        """Return the options of training."""
        return TrainConfig.from_dict(self.train)


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def split_digest(parts: Parts, root: Path) -> str:
    """Return the sha256 of which images, by their places below `root` and sizes, are in which part with which label.

    Numbers in another unit are other labels.
    """
    units = (f"{task.name}={task.unit}" for task in tasks_of(parts.train) if task.unit)
    found = hashlib.sha256("\0".join([*parts.classes, *units]).encode("utf-8", "surrogateescape"))
    for part, examples in {"train": parts.train, "val": parts.val, **parts.tests}.items():
        for example in examples:
            place = os.path.relpath(example.path, root).replace(os.sep, "/")
            size = os.stat(example.path).st_size if example.content is None else 0
            found.update(f"{part}\0{place}\0{size}\0{example.label}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def backbone_of(values: Mapping[str, Any]) -> Backbone:
    """Return the backbone that a trial names; weights from a file are found by the caller."""
    return Backbone(values["name"], values["weights"], values["image_size"], values["seed"], values["arguments"])


@dataclass(frozen=True)
class Measured:
    """What a model reaches on one set of images; all rates lie between 0 and 1.

    `figure` is what settings are chosen by and tables show, `measure` says what it is (see `measures.SHOWN`), and
    `figure_ci95` is its 95 % interval over the images. `per_class` holds the share of right answers of each class, None
    where the set has no image of it; `calibration_error` is the expected calibration error in ten bins of equal width;
    `restricted_to` is how many classes the answers were taken among, where the set has images of some only.

    Where images have one class each, the figure is `top1`, also of lines that were written before there were others;
    elsewhere `top1` and its interval are None. Where they have several, `per_class` holds average precisions. With
    several labels, or a number, `by_label` holds the figures of each label on the images that have it, by its name,
    and the rates of classes are there alone.
    """

    images: int
    top1: float | None
    top1_ci95: tuple[float, float] | None
    macro_f1: float | None
    calibration_error: float | None
    per_class: tuple[float | None, ...]
    restricted_to: int | None = None
    measure: str = TOP1
    figure: float = math.nan
    figure_ci95: tuple[float, float] = (math.nan, math.nan)
    by_label: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.measure == TOP1:
            object.__setattr__(self, "figure", self.top1)
            object.__setattr__(self, "figure_ci95", self.top1_ci95)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measured":
        """Build it from a line's values.

        Raises:
            TypeError: they are not those of a measurement.
        """
        limits = ("top1_ci95", "figure_ci95", "per_class")
        found: dict[str, Any] = {n: tuple(v) if n in limits and v is not None else v for n, v in values.items()}
        made = cls(**found)
        check_measured(made.measure, made.figure, made.by_label)
        return made


@dataclass(frozen=True)
class Result:
    """A finished trial: one line of JSON.

    `measured` holds "val" for kind "tune", and "test" with the shifted test sets for kind "final". `selection` says how
    a final trial's setting was chosen: the rule, every setting tried with its figure on the validation images, and the
    seconds that took. `outcome` is "finished", or "diverged" where the last good state was measured. `channels` are
    those that a method chose, by site and block. `adapter_bytes` is the size of the stored tensors, head included.
    `learned_top1` is top-1 on the images that were learned from, in the last epoch, as they were augmented, with the
    model in training mode; beside top-1 on the test images it tells what was not learned from what does not carry over.
    None: diverged, measured before it was kept, or not of one class for each image.
    """

    trial: Trial
    outcome: str
    measured: Mapping[str, Measured]
    selection: Mapping[str, Any]
    images: Mapping[str, int]
    epochs: int
    parameters: int
    head_parameters: int
    backbone_parameters: int
    adapter_bytes: int
    seconds: float
    images_per_second: float
    peak_memory_bytes: int
    device: str
    threads: int
    precision: str
    backbone_digest: str
    preprocessing: Mapping[str, Any]
    versions: Mapping[str, str]
    revision: str
    when: str
    channels: Mapping[str, list[list[int]]] = field(default_factory=dict)
    learned_top1: float | None = None
    device_memory_bytes: int | None = None
    """All memory of the accelerator; None: the CPU, or measured before it was kept."""

    def to_line(self) -> str:
        """Return one line of JSON, without the newline."""
        return json.dumps({"key": self.trial.key, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Result":
        """Build a result from a line's values.

        Raises:
            VisgraftError: the line's key is not that of its trial: somebody, or another version, wrote it.
        """
        found = {name: value for name, value in values.items() if name != "key"}
        trial = Trial(**{**found["trial"], "chosen_from": tuple(found["trial"]["chosen_from"])})
        if values.get("key") != trial.key:
            raise VisgraftError(f"the result of {trial.name} does not belong to its trial, or is of another version")
        measured = {name: Measured.from_dict(one) for name, one in found["measured"].items()}
        return cls(**{**found, "trial": trial, "measured": measured})
