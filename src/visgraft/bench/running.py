"""Run one trial: from its row to its result, with nothing else to go by than the images and the weights."""

import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from visgraft.adapters.directory import adapter_tensors
from visgraft.backbones.creation import create_backbone, model_data_config
from visgraft.bench.measures import measure_of
from visgraft.bench.trial import Measured, Result, Trial, backbone_of, split_digest
from visgraft.core.attach import count_parameters
from visgraft.core.attached import get_attached
from visgraft.core.method import ChoosesChannels
from visgraft.data.dataset import Example
from visgraft.data.examples import tasks_of
from visgraft.data.images import load_images
from visgraft.data.mirror import Mirror
from visgraft.errors import VisgraftError
from visgraft.measure.by_task import mean_precision
from visgraft.measure.calibration import calibration
from visgraft.measure.evaluation import Evaluation, answers_of, peak_memory_bytes, score
from visgraft.methods import get_method
from visgraft.options import MethodConfig
from visgraft.protocols.opening import open_task
from visgraft.protocols.row import Parts, Protocol, Task
from visgraft.training.crossval import Predictions
from visgraft.training.fit import Answers, fit
from visgraft.training.resume import Epoch
from visgraft.version import __version__

MEANS_AND_DEVIATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")


@dataclass(frozen=True)
class TrialSources:
    """Where a trial finds what its row does not hold: the protocol's rows, its images, and a file of weights."""

    protocol: Protocol
    root: Path
    weights: str | None = None
    """A file, where the trial's backbone comes from one."""
    cache: str | None = None
    """Where decoded images are kept; None: where the protocol says."""
    mirror: Mirror | None = None
    """What `root` is a copy of; another machine makes its own."""

    def root_of(self, task: Task) -> Path:
        """Return the root with a task's images on this machine: they are copied or made where that can be done.

        Raises:
            DataError: they cannot be copied.
        """
        if self.mirror is not None:
            return self.mirror.local(task.folder)
        if self.protocol.prepare is not None:
            self.protocol.prepare(self.root, [task.name])
        return self.root


def run_trial(
    trial: Trial,
    place: TrialSources,
    selection: Mapping[str, Any] | None = None,
    on_progress: Callable[[Epoch], None] | None = None,
) -> Result:
    """Train and measure.

    A trial that tunes never opens a test image: its parts lose them before anything is read. A final one is measured on
    each test set once, after its last epoch.

    Args:
        trial: the row.
        place: where images and weights are.
        selection: how a final trial's setting was chosen, to be kept with the result.
        on_progress: called after every step of training.

    Raises:
        DataError: the images are missing, or no longer those that the trial was planned with.
        VisgraftError: the backbone, the method or an option cannot be used.
    """
    parts = _open(trial, place)
    if trial.kind == "tune":
        parts = parts._replace(tests={})
        learned, measured = parts.train, {"val": parts.val}
    else:
        learned = _merged(parts.train, parts.val) if trial.final_parts == "train+val" else parts.train
        measured = dict(parts.tests)
    return _measure(
        trial, place, learned, measured, selection or {"rule": "none", "tried": [], "seconds": 0.0}, on_progress
    )


def _open(trial: Trial, place: TrialSources) -> Parts:
    """Find the images and check that they are the trial's."""
    task = place.protocol.task(trial.task)
    if task is None:
        raise VisgraftError(f"{place.protocol.name} has no task {trial.task!r}; the trial belongs to another protocol")
    root = place.root_of(task)
    parts = open_task(place.protocol, task, root, trial.split_seed, any_size=trial.reduced)
    if split_digest(parts, root) != trial.split:
        raise VisgraftError(
            f"the images or labels of {trial.task} below {place.root} are no longer those that the trial was planned "
            "with; start `visgraft bench run` again"
        )
    return parts


def _merged(first: Sequence[Example], second: Sequence[Example]) -> tuple[Example, ...]:
    several = bool(tasks_of(first))  # labels that have no order

    def place(example: Example) -> Any:
        return str(example.path) if several else (example.label, str(example.path))

    return tuple(sorted((*first, *second), key=place))


def _measure(
    trial: Trial,
    place: TrialSources,
    learned: Sequence[Example],
    measured: Mapping[str, Sequence[Example]],
    selection: Mapping[str, Any],
    on_progress: Callable[[Epoch], None] | None,
) -> Result:
    config = trial.train_config()
    origin = backbone_of({**trial.backbone, **({"weights": place.weights} if place.weights else {})})
    model = create_backbone(origin, trial.classes, config.drop_path)
    facts = preprocessing(model, trial)
    cached = place.cache or place.protocol.cache
    images = load_images(learned, facts, outputs=trial.classes, cache=cached)
    sets = {
        name: partial(load_images, examples, facts, outputs=trial.classes, cache=cached)
        for name, examples in measured.items()
    }
    fitted = fit(
        model, method_config(trial), config, images, measured=sets, keep_last_good=True, on_progress=on_progress
    )
    training, counts = fitted.training, count_parameters(model)
    found = {name: measure(answers, trial.classes) for name, answers in fitted.answers.items()}
    return Result(
        trial=trial,
        outcome="finished" if training else "diverged",
        measured=found,
        selection=selection,
        images={"learned": len(images), **{name: len(examples) for name, examples in measured.items()}},
        epochs=config.epochs,
        parameters=counts.adapter,
        head_parameters=counts.head,
        backbone_parameters=counts.backbone,
        adapter_bytes=len(safetensors.torch.save(adapter_tensors(model))),
        seconds=fitted.seconds,
        images_per_second=training.images_per_second if training else 0.0,
        peak_memory_bytes=peak_memory_bytes(),
        device=device(),
        threads=torch.get_num_threads(),
        precision=config.precision,
        backbone_digest=get_attached(model).digest or "",
        preprocessing=facts,
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        revision=revision(),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        channels=chosen_channels(model),
        learned_top1=training.history[-1].top1 if training else None,
        device_memory_bytes=torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None,
    )


def method_config(trial: Trial) -> MethodConfig:
    """Return the options of a trial's method."""
    return get_method(trial.method).Config.from_dict(trial.method_options)


def preprocessing(model: nn.Module, trial: Trial) -> dict[str, Any]:
    """Return timm's preprocessing facts, with the trial's normalisation, and resized without a crop if it says so."""
    facts = model_data_config(model)
    if trial.squash:
        facts |= {"crop_pct": 1.0, "crop_mode": "squash"}
    if trial.normalisation != "model":
        mean, std = MEANS_AND_DEVIATIONS[trial.normalisation]
        facts |= {"mean": list(mean), "std": list(std)}
    return facts


def measure(answers: Answers, classes: int) -> Measured:
    """Return the figures of answers on a set of images; where each has one class, among the classes that it has."""
    if answers.tasks or answers.labels.ndim == 2:
        return _measure_labels(answers)
    present = torch.unique(answers.labels)
    logits = answers.logits.nan_to_num()  # of a training that diverged
    if len(present) < classes:
        kept = torch.full_like(logits, -torch.inf)
        kept[:, present] = logits[:, present]
        logits = kept
    found = score(logits.softmax(-1), answers.labels, answers.seconds)
    assert found.top1 is not None and found.top1_ci95 is not None and found.macro_f1 is not None
    return Measured(
        images=len(answers.labels),
        top1=found.top1,
        top1_ci95=found.top1_ci95,
        macro_f1=found.macro_f1,
        calibration_error=calibration(found).error,
        per_class=per_class(found, classes),
        restricted_to=len(present) if len(present) < classes else None,
    )


def _measure_labels(answers: Answers) -> Measured:
    """Return the figures of answers to several labels, a number or several classes, with intervals over the images."""
    said = answers_of(answers.logits.nan_to_num(), answers.tasks, not answers.tasks)
    found = Predictions(said[None], answers.labels, answers.groups, answers.tasks)
    shared: dict[str, Any] = {
        "images": len(answers.labels), "top1": None, "top1_ci95": None, "macro_f1": found.macro_f1,
        "measure": measure_of(answers.tasks), "figure": found.figure, "figure_ci95": found.interval,
    }  # fmt: skip
    if answers.tasks:
        units = {task.name: {"unit": task.unit} for task in answers.tasks if task.unit}
        by_label = {name: one | units.get(name, {}) for name, one in found.task_figures().items()}
        return Measured(calibration_error=None, per_class=(), by_label=by_label, **shared)
    each = (mean_precision(said[None, :, [n]].numpy(), answers.labels[:, [n]].numpy()) for n in range(said.shape[1]))
    precisions = tuple(None if math.isnan(one) else one for one in each)
    return Measured(calibration_error=calibration(found.evaluations[0]).error, per_class=precisions, **shared)


def per_class(found: Evaluation, classes: int) -> tuple[float | None, ...]:
    """Return the share of right answers of each class; None where there is no image of it."""
    labels, right = found.labels.numpy(), (found.probabilities.argmax(-1) == found.labels).numpy()
    counts = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, right, minlength=classes)
    return tuple(float(h / n) if n else None for h, n in zip(hits, counts, strict=True))


def chosen_channels(model: nn.Module) -> dict[str, list[list[int]]]:
    """Return the channels that the attached method chose, by site and in the order of its modules; else nothing."""
    attached = get_attached(model)
    found: dict[str, list[list[int]]] = {}
    for module in attached.positions.values():
        if isinstance(module, ChoosesChannels):
            chosen = module.chosen_channels()
            found.setdefault(chosen.site, []).append(chosen.channels.tolist())
    return found


def device() -> str:
    """Return what computes."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "CPU"


@cache
def revision() -> str:
    """Return the source's git revision, with "+changes" where files differ from it; else the package's version."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed package may lie in a user's repository
        return _git("describe", "--always", "--dirty=+changes", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return f"visgraft {__version__}"  # not its metadata, which a copy of the source has none of


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
