"""A peft adapter's folder as it is read here: its options, its tensors, and what visgraft wrote beside them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from visgraft.adapters.canary import Canary, normalised
from visgraft.backbones.creation import Backbone, image_transform
from visgraft.backbones.weights import first_line, read_safetensors
from visgraft.data.tasks import LabelTask, outputs_of
from visgraft.errors import AdapterError, VisgraftError
from visgraft.export.peft_open import FACTS, KEYS, PREFIXES, Host

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
UNDERSTOOD = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "modules_to_save",
        "init_lora_weights", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    }
)  # fmt: skip
"""Options of peft that may have any value: their effect is in the tensors, or they have none. All others must have
peft's default, because they make another map of the tensors, or name modules that peft would import."""
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin that leave the backbone's own weights as they are."""
MOST_PIXELS = 10_000**2


@dataclass(frozen=True)
class Told:
    """What visgraft wrote beside an adapter that it exported; of one trained with peft, nothing is told.

    Attributes:
        backbone: what the adapter is for, of a weights file its name.
        classes: names of the head's outputs.
        preprocessing: timm's facts on how images are prepared.
        task, background: as in an adapter's record.
        canary: what the adapter answered to the seeded picture.
        tasks: what the outputs answer, where that is not one label.
    """

    backbone: Backbone | None = None
    classes: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] | None = None
    task: str = "one_class"
    background: str | None = None
    canary: Canary | None = None
    tasks: tuple[LabelTask, ...] = ()


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """A checked folder: `config` as in its file, `tensors` by peft's names, `told` by visgraft, `host` it is for."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    told: Told
    host: Host

    @property
    def dropout(self) -> float:
        """The dropout on what each branch reads while training."""
        return float(self.config.get("lora_dropout") or 0.0)


def read_peft(folder: Path) -> PeftFolder:
    """Return what a folder holds that peft wrote, without asking peft to open it.

    Raises:
        AdapterError: it is no LoRA adapter of peft, has an option that no LoRA here can say, holds a pickle in place of
            safetensors, or is damaged.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    inside = KEYS + PREFIXES["transformers"]
    host: Host = "transformers" if any(name.startswith(inside) for name in tensors) else "timm"
    return PeftFolder(folder, config, tensors, _read_told(folder), host)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged ({first_line(error)}); restore it") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """Return a LoRA's options.

    Raises:
        AdapterError: there are none, or some that cannot be said.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise AdapterError(f"{folder} is no adapter of peft: {CONFIG} is missing; pass a folder that peft wrote")
    config = _read_json(file)
    if not isinstance(config, dict) or "peft_type" not in config:
        what = "an adapter of visgraft already" if isinstance(config, dict) and "method" in config else "none of peft"
        raise AdapterError(f"{folder} is {what}: {CONFIG} names no peft_type; pass a folder that peft wrote")
    if config["peft_type"] != "LORA":
        raise AdapterError(
            f"{folder} is of peft's type {config['peft_type']!r}, which no method here says exactly; only LORA can be "
            "imported"
        )
    defaults = _defaults()
    for key, value in config.items():
        if key not in UNDERSTOOD and value not in (defaults.get(key), None, False, {}, []):
            raise AdapterError(
                f"{file}: {key} is {value!r:.80}, which lora cannot say; train without it, or merge with peft's "
                "merge_and_unload and go on from the plain model"
            )
    if (start := config.get("init_lora_weights", True)) not in STARTS:
        raise AdapterError(
            f"{file}: init_lora_weights is {start!r:.80}, which changes the backbone's own weights; save the adapter "
            "with peft's path_initial_model_for_weight_conversion"
        )
    dropout = config.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise AdapterError(f"{file} is damaged: lora_dropout is {dropout!r:.80}; restore it")
    return config


def _defaults() -> dict[str, Any]:
    """Return peft's own values of a LoRA's options."""
    from peft import LoraConfig

    return {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(LoraConfig)
    }


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors by peft's names.

    Raises:
        AdapterError: there are none in safetensors, or not only numbers under peft's names.
    """
    file = folder / TENSORS
    if not file.is_file():
        if (folder / PICKLE).is_file():
            raise AdapterError(
                f"{folder} holds {PICKLE}, a pickle, which could run code and is never read; save it anew with peft's "
                "save_pretrained(safe_serialization=True)"
            )
        raise AdapterError(f"{file} is missing; restore it, or pass a folder that peft's save_pretrained wrote")
    try:
        tensors = read_safetensors(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{file} is damaged ({first_line(error)}); restore it") from error
    for name, tensor in tensors.items():
        if not name.startswith(KEYS):
            raise AdapterError(f"{file} is damaged: {name!r:.80} is no name that peft gives; restore it")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{file} is damaged: {name} is not all finite numbers; restore it, or train again")
    return tensors


def _read_told(folder: Path) -> Told:
    """Return what visgraft wrote beside an adapter; nothing where it wrote none.

    Raises:
        AdapterError: the file is damaged.
    """
    file = folder / FACTS
    if not file.is_file():
        return Told()
    facts = _read_json(file)
    try:
        classes, canary = tuple(facts["classes"]), facts.get("canary")
        if not all(isinstance(name, str) for name in classes):
            raise TypeError(f"the classes are {classes!r:.80}")
        image_transform(facts["preprocessing"])
        channels, height, width = facts["preprocessing"]["input_size"]
        normalised(torch.zeros(1, channels, 1, 1), facts["preprocessing"])
        if not 0 < height * width < MOST_PIXELS:
            raise ValueError(f"images of {height} x {width} pixels")
        background, task = facts.get("background"), facts["task"]
        tasks = tuple(LabelTask.from_json(one) for one in facts.get("tasks", ()))
        if tasks and outputs_of(tasks) != classes:
            raise ValueError("the tasks do not have the outputs that the classes name")
        kinds = ("several_tasks",) if tasks else ("one_class", "several_classes")
        if not isinstance(background, str | None) or task not in kinds:
            raise TypeError(f"background is {background!r:.80}, task is {task!r:.80}")
        return Told(
            Backbone.from_dict(facts["backbone"]), classes, facts["preprocessing"], task, background,
            None if canary is None else Canary.from_json(canary), tasks,
        )  # fmt: skip
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError, VisgraftError) as error:
        raise AdapterError(f"{file} is damaged ({first_line(error)}); restore it, or remove it") from error
