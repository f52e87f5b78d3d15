"""The adapter directory: `adapter_config.json`, `adapter_model.safetensors` and a model card."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from visgraft.backbones.creation import Backbone, create_backbone, image_transform, model_data_config
from visgraft.backbones.input_size import built_size
from visgraft.core.attach import assemble, count_parameters, detach
from visgraft.core.attached import get_attached
from visgraft.core.registry import get_method
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError
from visgraft.files import new_directory, write_json

FORMAT_VERSION = 1
CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


class Adapted(NamedTuple):
    """A model ready for use: the image transform (PIL image -> [3, H, W]) and the class names go with it."""

    model: nn.Module
    transform: Any
    classes: tuple[str, ...]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter holds: the method's tensors, the head's, and those of the backbone that train."""
    attached, state = get_attached(model), model.state_dict()
    names = [name for name in state if name.startswith(f"{CHILD}.") or name in attached.originals]
    return {name: state[name].detach().cpu().contiguous() for name in names}


def save(
    model: nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] = (),
    data_config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapter of a model to a directory, atomically; an earlier adapter there is replaced.

    Args:
        model: a model with something attached.
        path: the directory to write.
        classes: names of the head's outputs, in order.
        data_config: timm's preprocessing facts; None: the model's own.
        record: further facts to keep, e.g. how it was trained and what was measured (plain JSON values).

    Raises:
        AdapterError: the number of names is not that of the head's outputs.
        VisgraftError: nothing is attached, or the directory holds something else or cannot be written.
    """
    attached = get_attached(model)
    outputs = int(getattr(model, "num_classes", 0))
    if classes and outputs != len(classes):
        raise AdapterError(f"{len(classes)} class names for a head of {outputs} outputs; pass one for each")
    origin = getattr(model, "visgraft_backbone", None) or _origin(model)
    config = {
        "format_version": FORMAT_VERSION,
        "method": attached.config.method,
        "method_config": attached.config.to_dict(),
        "backbone": {**origin.to_dict(), "num_classes": outputs, "digest": attached.digest},
        "data_config": dict(data_config or model_data_config(model)),
        "classes": list(classes),
        "parameters": dataclasses.asdict(count_parameters(model)),
        "record": dict(record or {}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    path = Path(path)
    with new_directory(path, CONFIG) as folder:
        safetensors.torch.save_file(adapter_tensors(model), folder / TENSORS)
        write_json(folder / CONFIG, config)
        (folder / CARD).write_text(_card(config), encoding="utf-8")
    return path


def _origin(model: nn.Module) -> Backbone:
    """What a model made by timm itself says of its origin; the digest tells later whether its weights are the same."""
    facts: Any = getattr(model, "pretrained_cfg", None) or {}
    name = facts.get("architecture", type(model).__name__)
    tag = f".{facts['tag']}" if facts.get("tag") else ""
    size = built_size(model)
    if size is None or size == tuple(facts.get("input_size", ()))[1:]:
        return Backbone(f"{name}{tag}")
    if size[0] != size[1]:
        return Backbone(f"{name}{tag}", arguments={"img_size": list(size)})
    return Backbone(f"{name}{tag}", image_size=size[0])


def _card(config: Mapping[str, Any]) -> str:
    backbone, numbers = config["backbone"], config["parameters"]
    metrics = config["record"].get("metrics", {})
    return "\n".join(
        [
            "---\nlibrary_name: visgraft\ntags: [image-classification, parameter-efficient-fine-tuning]\n---",
            f"# {config['method']} adapter for {backbone['name']}\n",
            f"- method: `{config['method']}` {json.dumps(config['method_config'])}",
            f"- backbone: `{backbone['name']}`, weights: {backbone['weights']}, sha256 {backbone['digest']}",
            f"- trained parameters: {numbers['adapter']:,} and {numbers['head']:,} of the head",
            f"- classes: {', '.join(config['classes']) or 'not named'}",
            *(f"- {name}: {value}" for name, value in metrics.items()),
            "\n```python\nimport visgraft\nmodel, transform, classes = visgraft.load('this-folder')\n```\n",
        ]
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the checked content of an adapter's `adapter_config.json`.

    Raises:
        AdapterError: no adapter, a damaged one, or one of a newer format.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        raise AdapterError(f"{path} is not an adapter: {CONFIG} is missing; pass a folder that `train` or `save` wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged ({error}); restore it or train again") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{file} has format version {version}, but this visgraft reads {FORMAT_VERSION}; update visgraft"
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
    if not isinstance(outputs, int) or len(names) not in (0, outputs):
        raise AdapterError(
            f"{file} is damaged: {len(names)} class names for a head of {outputs} outputs; restore it or train again"
        )
    return config


def load(path: str | Path, *, weights: str | None = None, backbone: nn.Module | None = None) -> Adapted:
    """Load an adapter with its backbone.

    Args:
        path: the adapter's directory.
        weights: where the backbone's weights come from, in place of what the adapter says (see `Backbone`).
        backbone: a ready plain model, e.g. one made with timm; the adapter is attached to it in place.

    Raises:
        AdapterError: the directory is damaged or foreign, or the backbone is not the one it was trained on.
        WeightsError: the backbone's weights cannot be had.
    """
    path = Path(path)
    config = read_config(path)
    try:
        method_config = get_method(config["method"]).Config.from_dict(config["method_config"])
        transform = image_transform(config["data_config"])
    except Exception as error:  # timm's transform raises whatever comes of a wrong fact
        raise AdapterError(f"{path / CONFIG} is damaged: {error}; restore it or train again") from error
    tensors = read_tensors(path / TENSORS)
    model = backbone
    if model is None:
        model = create_backbone(read_backbone(path, config, weights), config["backbone"].get("num_classes", 0))
    if getattr(model, "num_classes", 0) != config["backbone"].get("num_classes"):
        expected = config["backbone"].get("num_classes")
        raise AdapterError(
            f"{path} needs a head of {expected} outputs; create the backbone with num_classes={expected}"
        )
    assemble(model, method_config)
    try:
        _fill(model, tensors, path, config["backbone"].get("digest"))
    except AdapterError:
        detach(model)
        raise
    model.visgraft_record = config["record"]  # says precision and kind of labels
    return Adapted(model.eval(), transform, tuple(config["classes"]))


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{file} is missing or damaged ({error}); restore it or train again") from error


def read_backbone(path: Path, config: Mapping[str, Any], weights: str | None = None) -> Backbone:
    """Return the backbone that an adapter's config describes, `weights` overriding its source.

    Raises:
        AdapterError: it is damaged, or the weights came from a file, which must be passed again.
    """
    facts = dict(config["backbone"])
    file = facts.pop("file", None)
    for name in ("num_classes", "digest"):
        facts.pop(name, None)
    if weights is None and facts.get("weights") == "file":
        raise AdapterError(f"{path} was trained on the weights file {file}; pass it again: --weights PATH/{file}")
    kinds = {"name": str, "weights": str, "image_size": int | None, "seed": int, "arguments": dict}
    try:
        origin = Backbone(**{**facts, "weights": weights or facts["weights"]})
        if wrong := [key for key, kind in kinds.items() if not isinstance(getattr(origin, key), kind)]:
            raise TypeError(f"{wrong[0]} is {getattr(origin, wrong[0])!r}")
    except (TypeError, KeyError) as error:
        raise AdapterError(f"{path / CONFIG} is damaged: backbone: {error}; restore it or train again") from error
    return origin


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, digest: str | None) -> None:
    """Copy the stored tensors in, after checking the backbone, every name and every shape."""
    # Made only to be compared: that takes longer than the rest of loading.
    found = digest if digest is None else get_attached(model).digest
    if found != digest:
        raise AdapterError(
            f"{path} was trained on another backbone (sha256 {str(digest)[:12]}…, this one is {str(found)[:12]}…); "
            "pass the same weights with --weights (weights= or backbone= in Python)"
        )
    own = adapter_tensors(model)
    wrong = sorted(set(own) ^ set(tensors)) + [
        name for name in own if name in tensors and (own[name].shape, own[name].dtype.is_floating_point)
        != (tensors[name].shape, tensors[name].dtype.is_floating_point)
    ]  # fmt: skip
    if wrong:
        raise AdapterError(
            f"{path / TENSORS} does not fit its config: {', '.join(wrong[:3])}; restore it or train again"
        )
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{path / TENSORS} is damaged: {name} is not finite; restore it or train again")
            state[name].copy_(tensor)
