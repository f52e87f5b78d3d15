"""The state of a training run at the end of an epoch: enough to go on to the very same weights."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from visgraft.errors import VisgraftError
from visgraft.files import new_file

SUFFIX = ".resume.safetensors"
WEIGHTS = "weights_digest"
FILES = "files"
"""Where a run keeps digests of its images by their names, under "data"; of very many, by those of their folders."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch; during it, those so far. Rates lie between 0 and 1.

    `top1` and `val_top1` are None where images may have several classes; `val_map` (mean average precision) and
    `val_macro_f1` are measured at the end of an epoch on the validation images, where there are any; with several
    tasks, `val_mean` alone, the mean of their figures.
    """

    epoch: int
    loss: float
    top1: float | None
    lr: float
    images_per_second: float
    seconds_left: float
    complete: bool = False
    val_loss: float | None = None
    val_top1: float | None = None
    val_macro_f1: float | None = None
    val_map: float | None = None
    val_mean: float | None = None

    @property
    def val_figure(self) -> float | None:
        """What epochs are chosen by: mean average precision where images have several classes, otherwise top-1.

        With several tasks, the mean of their figures.
        """
        if self.val_mean is not None:
            return self.val_mean
        return self.val_top1 if self.val_map is None else self.val_map


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `epoch` epochs.

    `tensors` are those an adapter holds, `optimizer` its moments by `<number>.<name>`, `best` those of the epoch that
    was best on the validation images so far.
    """

    epoch: int
    tensors: Tensors
    optimizer: Tensors = field(default_factory=dict)
    history: tuple[Epoch, ...] = ()
    best: Tensors = field(default_factory=dict)
    best_epoch: int = 0
    best_figure: float = -1.0

    def after(self, epoch: Epoch, tensors: Tensors, optimizer: Tensors) -> "TrainState":
        """Return the state one complete epoch later."""
        better = epoch.val_figure is not None and epoch.val_figure > self.best_figure
        best = (tensors, epoch.epoch, epoch.val_figure) if better else (self.best, self.best_epoch, self.best_figure)
        return TrainState(epoch.epoch, tensors, optimizer, (*self.history, epoch), *best)  # type: ignore[arg-type]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return copies of an optimizer's moments and step counts, by `<number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().clone()
        for number, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def state_file(out: Path) -> Path:
    """Where the state of the run that writes the adapter `out` is kept until it is finished: beside it."""
    return out.with_name(f"{out.name}{SUFFIX}")


def pack_state(state: TrainState, run: Mapping[str, Any]) -> bytes:
    """Return what the file of a state holds, with `run`: what must be the same for going on (plain JSON values)."""
    parts = {"tensors": state.tensors, "optimizer": state.optimizer}
    if state.best_epoch != state.epoch:  # otherwise these are the same tensors
        parts["best"] = state.best
    tensors = {f"{part}/{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
    facts = {
        "epoch": state.epoch,
        "best_epoch": state.best_epoch,
        "best_figure": state.best_figure,
        "history": [dataclasses.asdict(epoch) for epoch in state.history],
        "run": dict(run),
    }
    return safetensors.torch.save(tensors, metadata={"visgraft": json.dumps(facts)})


def write_state(path: Path, state: TrainState, run: Mapping[str, Any]) -> None:
    """Write a state atomically; see `pack_state`.

    Raises:
        VisgraftError: the file cannot be written.
    """
    content = pack_state(state, run)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(content)
    except OSError as error:
        raise VisgraftError(f"{path} cannot be written ({error.strerror}); choose another --out") from error


def read_state(path: Path, run: Mapping[str, Any]) -> TrainState:
    """Read a state back.

    Raises:
        VisgraftError: the file is damaged, or was written by a run with other options or data (the first is named).
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["visgraft"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        parts: dict[str, Tensors] = {"tensors": {}, "optimizer": {}, "best": {}}
        for name, tensor in tensors.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = tensor
        if facts["best_epoch"] == facts["epoch"]:
            parts["best"] = parts["tensors"]
        history = tuple(Epoch(**epoch) for epoch in facts["history"])
        state = TrainState(
            facts["epoch"], parts["tensors"], parts["optimizer"], history, parts["best"], facts["best_epoch"],
            facts["best_figure"],
        )  # fmt: skip
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise VisgraftError(f"{path} is damaged ({error}); remove it and train without --resume") from error
    check_same_run(path, facts["run"], run)
    return state


def check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a VisgraftError that names the first thing, or the first image, in which two runs differ."""
    flat_before, flat_now = _flat(before), _flat(json.loads(json.dumps(now)))
    if FILES not in before.get("data", {}):  # of an earlier version, which did not look into the files
        flat_now = {name: value for name, value in flat_now.items() if not name.startswith(f"data.{FILES}.")}
    if WEIGHTS not in before:  # of such a version, or of other weights than a file's
        flat_now.pop(WEIGHTS, None)
    for name in sorted(flat_before.keys() | flat_now.keys()):
        was, is_ = flat_before.get(name), flat_now.get(name)
        if was != is_:
            differs = f"is of a run with {name} {was}, now it is {is_}"
            if name.startswith(f"data.{FILES}."):
                image = name.removeprefix(f"data.{FILES}.")
                what = f"folder of images {image}" if image.endswith("/") else f"image {image}"
                how = "was not there" if was is None else "was there" if is_ is None else "had another content"
                differs = f"is of a run in which the {what} {how}"
            raise VisgraftError(
                f"{path} {differs}; give the same options and data as then, or leave out --resume to start anew"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
