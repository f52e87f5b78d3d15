"""What a later user of an adapter has to know: the typed content of its config file."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from visgraft.adapters.calibrated import Calibrated, read_calibration, stored_calibration
from visgraft.adapters.canary import Canary, check_facts
from visgraft.backbones.creation import KINDS, Backbone
from visgraft.data.dataset import Split
from visgraft.data.task_tensors import task_answers
from visgraft.data.tasks import LabelTask, outputs_of
from visgraft.errors import AdapterError, VisgraftError
from visgraft.methods import get_method
from visgraft.options import MethodConfig

FORMAT_VERSION, TASKS_VERSION = 1, 2
"""The second is that of adapters with several tasks, which earlier versions would answer wrongly."""
PRECISIONS = ("float64", "float32", "bfloat16", "float16")
Facts = Mapping[str, Any]
"""Plain JSON values by name."""


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter without its tensors. Its JSON (`to_json`) is `adapter_config.json`.

    Attributes:
        method: the method's options; their class says which method.
        backbone: where the frozen model came from; of a weights file only the name is known.
        outputs: how many the head has.
        digest: sha256 of the frozen tensors; None where they held no data.
        digest_precision: the precision in which they had it.
        own: names of the backbone's own tensors that train though the method does not train them.
        data_config: timm's facts on how images are prepared: size, interpolation, mean, std, crop.
        classes: names of the outputs, in order; empty where they were not named.
        task: whether an image has one class, or any number of them, or labels for several `tasks`.
        precision: `fp32` or `bf16`, as in training, so that figures compare.
        background: the colour behind transparent places, by name or as #rrggbb; None: not known.
        split: how the images were divided where their source did not say; None: not known.
        fingerprint: of the images it was trained on; None: not known.
        parameters: how many train, of the adapter and of the head, and all with the backbone's.
        facts: all that is stored of the training: options, history, figures, costs.
        versions: of Python and the libraries that wrote it.
        canary: what it answered to a seeded picture when it was saved; None: not known.
        tasks: what the outputs answer, in order, where that is not one label: several, or a number.
        calibrated: how sure it is of these very tensors' answers, by task, or as `ONE_LABEL`, so that no copy of the
            facts carries it on; empty: not measured.
        unlike: sha256 of the file by which it tells unlike pictures; None: there is none.
    """

    method: MethodConfig
    backbone: Backbone
    outputs: int
    digest: str | None
    digest_precision: str
    own: tuple[str, ...]
    data_config: Facts
    classes: tuple[str, ...]
    task: Literal["one_class", "several_classes", "several_tasks"]
    precision: str
    background: str | None
    split: Split | None
    fingerprint: str | None
    parameters: Facts = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    versions: Facts = field(default_factory=dict)
    canary: Canary | None = None
    tasks: tuple[LabelTask, ...] = ()
    calibrated: Mapping[str, Calibrated] = field(default_factory=dict)
    unlike: str | None = None

    def answers(self, logits: Tensor) -> Tensor:
        """Return what outputs [..., outputs] say: probabilities, and, with several tasks, numbers in their units."""
        if self.tasks:
            return task_answers(logits, self.tasks)
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.task == "several_classes"

    @property
    def has_several(self) -> bool:
        """Whether one of several tasks is one whose images may have several classes, or none."""
        return any(task.kind == "several_classes" for task in self.tasks)

    @property
    def training(self) -> Facts:
        """The options of the training; empty where they are not known."""
        return dict(self.facts.get("train", {}))

    @property
    def figures(self) -> Facts:
        """What was measured after the training, by name."""
        return dict(self.facts.get("metrics", {}))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The figures of every epoch."""
        return list(self.facts.get("history", []))

    def to_json(self) -> dict[str, Any]:
        """Return the content of the config file."""
        told = {"digest_precision": self.digest_precision} if self.digest_precision != "float32" else {}
        told |= {"own": list(self.own)} if self.own else {}  # type: ignore[dict-item]
        return {
            "format_version": TASKS_VERSION if self.tasks else FORMAT_VERSION,
            "method": self.method.method,
            "method_config": self.method.to_dict(),
            "backbone": {**self.backbone.to_dict(), "num_classes": self.outputs, "digest": self.digest, **told},
            "data_config": dict(self.data_config),
            "classes": list(self.classes),
            "parameters": dict(self.parameters),
            "record": dict(self.facts),
            "versions": dict(self.versions),
            **({"canary": self.canary.to_json()} if self.canary else {}),
            **({"calibration": stored_calibration(self.calibrated)} if self.calibrated else {}),
            **({"unlike": self.unlike} if self.unlike else {}),
        }

    @classmethod
    def from_json(cls, config: Any, file: Path) -> "AdapterRecord":
        """Return what a config file says; `file` is its name in errors.

        Raises:
            AdapterError: it is damaged or of a newer format, or its method or an option is not known here.
        """
        _check_structure(config, file)
        for part in ("parameters", "versions"):
            _want(config.get(part, {}), dict, file, part)
        method = _method_config(config["method"], config["method_config"], file)
        stored, facts = dict(config["backbone"]), config["record"]
        with _damage(file, "backbone"):
            outputs, digest = stored.pop("num_classes"), stored.pop("digest", None)
            precision, own = stored.pop("digest_precision", "float32"), tuple(stored.pop("own", ()))
            backbone = Backbone.from_dict(stored)
            if not isinstance(digest, str | None) or precision not in PRECISIONS:
                raise TypeError(f"the digest is {digest!r}, in {precision!r}")
            if not all(isinstance(name, str) for name in own):
                raise TypeError(f"own is {own!r}")
        data = facts.get("data", {})
        for part, value, kind in (
            ("record.data", data, dict), ("record.train", facts.get("train", {}), dict),
            ("record.metrics", facts.get("metrics", {}), dict),
            ("record.history", facts.get("history", []), list | tuple),
            ("record.blend", blend := facts.get("blend", {}), dict),
            ("record.blend.adapters", blend.get("adapters", []) if isinstance(blend, dict) else [], list | tuple),
            ("record.chosen", facts.get("chosen", {}), dict),
            ("unlike", config.get("unlike"), str | None),
            ("record.precision", facts.get("precision", "fp32"), str),
            ("record.data.background", None if not isinstance(data, dict) else data.get("background"), str | None),
        ):  # fmt: skip
            _want(value, kind, file, part)
        if facts.get("precision", "fp32") not in ("fp32", "bf16"):
            raise AdapterError(f"{file}: precision is {facts['precision']!r}, not fp32 or bf16; update visgraft")
        with _damage(file, "record"):
            kept = {each.name for each in dataclasses.fields(Split)}
            told = {name: value for name, value in data.items() if name in kept}
            split = Split(**told) if told else None
        with _damage(file, "record.data.tasks"):
            tasks = _label_tasks(data.get("tasks", ()), config)
        with _damage(file, "data_config"):
            check_facts(config["data_config"])
        with _damage(file, "canary"):
            canary = Canary.from_json(config["canary"]) if config.get("canary") is not None else None
        with _damage(file, "calibration"):
            stored = config.get("calibration")
            named = [task.name for task in tasks]
            calibrated = {} if stored is None else read_calibration(stored, named)
        return cls(
            method, backbone, outputs, digest, precision, own, config["data_config"], tuple(config["classes"]),
            "several_tasks" if tasks else "several_classes" if data.get("multi_label") else "one_class",
            facts.get("precision", "fp32"), data.get("background"), split, data.get("fingerprint"),
            config.get("parameters", {}), facts, config.get("versions", {}), canary, tasks, calibrated,
            config.get("unlike"),
        )  # fmt: skip

    def located(self, path: Path, weights: str | None = None) -> Backbone:
        """Return the backbone with its weights where they can be found, `weights` overriding what is stored.

        Raises:
            AdapterError: the weights came from a file, which must be passed again.
        """
        if weights is None and self.backbone.weights not in KINDS:
            file = self.backbone.weights
            raise AdapterError(f"{path} was trained on the weights file {file}; pass it again: --weights PATH/{file}")
        return dataclasses.replace(self.backbone, weights=weights or self.backbone.weights)


def _method_config(name: str, options: Facts, file: Path) -> MethodConfig:
    """Return the method's options.

    Raises:
        AdapterError: the method, or one of the options, is not known here, or a value does not fit its option.
    """
    try:
        method = get_method(name)
    except VisgraftError as error:
        raise AdapterError(f"{file}: {error}; import the module that registers it first, or update visgraft") from error
    try:
        return method.Config.from_dict(options)
    except Exception as error:  # the checks of a user's own options raise whatever they like
        told = " ".join(str(error).split())
        raise AdapterError(
            f"{file}: {told}; update visgraft, use the version of {name} that wrote it, or train again"
        ) from error


def _label_tasks(stored: Any, config: Facts) -> tuple[LabelTask, ...]:
    """Return what the outputs answer.

    Raises:
        TypeError, ValueError: a task is damaged, or they do not fit the rest of the config.
    """
    tasks = tuple(LabelTask.from_json(task) for task in stored)
    if not tasks and config["format_version"] == TASKS_VERSION:
        raise ValueError("there is no task")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"of {', '.join(names)} two have one name")
    if tasks and outputs_of(tasks) != tuple(config["classes"]):
        raise ValueError("the tasks do not have the outputs that the classes name")
    return tasks


@contextlib.contextmanager
def _damage(file: Path, part: str) -> Iterator[None]:
    """Turn what a damaged part of the file may cause into one line that names it."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, VisgraftError) as error:
        raise AdapterError(f"{file} is damaged: {part}: {error}; restore it or train again") from error


def _want(value: Any, kind: Any, file: Path, part: str) -> None:
    """Raise an AdapterError where a part of a config is not of its kind."""
    if not isinstance(value, kind):
        raise AdapterError(f"{file} is damaged: {part} is {value!r}; restore it or train again")


def _check_structure(config: Any, file: Path) -> None:
    """Raise an AdapterError where a config is no dictionary of this format with all its parts."""
    version = config.get("format_version") if isinstance(config, dict) else None
    if version not in (FORMAT_VERSION, TASKS_VERSION):
        raise AdapterError(
            f"{file} has format version {version}, but this visgraft reads up to {TASKS_VERSION}; update visgraft"
        )
    kinds: dict[str, type] = {
        "method": str, "method_config": dict, "backbone": dict, "data_config": dict, "classes": list, "record": dict
    }  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise AdapterError(
                f"{file} is damaged: {key!r} is missing or no {kind.__name__}; restore it or train again"
            )
    outputs, names = config["backbone"].get("num_classes"), config["classes"]
    if not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{file} is damaged: the classes are {names!r:.80}; restore it or train again")
    if not isinstance(outputs, int) or len(names) not in (0, outputs):
        raise AdapterError(
            f"{file} is damaged: {len(names)} class names for a head of {outputs} outputs; restore it or train again"
        )
