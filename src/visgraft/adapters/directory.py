"""The adapter directory: `adapter_config.json`, `adapter_model.safetensors` and a model card."""

import dataclasses
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from visgraft.adapters.calibrated import Calibrated
from visgraft.adapters.canary import canary_difference, is_drawn_alike, measure_canary
from visgraft.adapters.card import make_card
from visgraft.adapters.hub import CARD, CONFIG, TENSORS, UNLIKE, remedy, resolve, settled
from visgraft.adapters.names import class_names
from visgraft.adapters.record import FORMAT_VERSION, AdapterRecord
from visgraft.adapters.reference import Reference, digest_of_reference
from visgraft.backbones.creation import Backbone, create_backbone, image_transform, model_data_config, origin_of
from visgraft.backbones.heads import head_outputs
from visgraft.backbones.input_size import built_size, recorded_size, sides
from visgraft.backbones.weights import read_safetensors
from visgraft.backbones.wrappers import unwrapped
from visgraft.core.attach import assemble, count_parameters, detach
from visgraft.core.attached import get_attached
from visgraft.core.fitting import check_shape
from visgraft.core.tensors import backbone_digest, first_not_finite
from visgraft.errors import AdapterError
from visgraft.files import new_directory, write_json


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model ready for use, in eval mode, and all that is known of it.

    It unpacks into model, transform and class names: `model, transform, classes = visgraft.load(path)`. A transform of
    one's own takes the place of timm's: `dataclasses.replace(adapted, own_transform=...)`.
    """

    model: nn.Module
    record: AdapterRecord
    own_transform: Any = None

    @classmethod
    def of(cls, model: nn.Module, *, classes: Sequence[str] = ()) -> "Adapted":
        """Return a model as `load` would after `save`, without writing anything; `classes` name the head's outputs.

        Raises:
            AdapterError: the number of names is not that of the head's outputs.
            VisgraftError: nothing is attached.
        """
        return cls(model, make_record(model, classes=classes))

    @cached_property
    def transform(self) -> Any:
        """The image transform: PIL image -> float [3, H, W]."""
        return self.own_transform or image_transform(self.record.data_config)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs, in order; empty where they were not named."""
        return self.record.classes

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.transform, self.classes))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter holds, on the CPU: tensors of the method, of the head, and what else trains."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in get_attached(model).stored().items()}


def save(
    model: nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] = (),
    data_config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    calibrated: Mapping[str, Calibrated] | None = None,
    reference: Reference | None = None,
) -> Path:
    """Write the adapter of a model to a directory, atomically; an earlier adapter there is replaced.

    Args:
        model: a model with something attached.
        path: the directory to write.
        classes: names of the head's outputs, in order: a list, a tuple, a NumPy array of text.
        data_config: timm's preprocessing facts; what it does not say of size, mean and std, and None: the model's own.
        record: further facts to keep, e.g. how it was trained and what was measured (plain JSON values).
        calibrated: how sure this very model is, by `visgraft.measure.conformal.calibrate_tasks`; None: not known.
        reference: by which unlike pictures are told, by `visgraft.measure.unlike.fit_reference`; None: they are not.

    Raises:
        AdapterError: the names are no texts that differ, or not as many as the head's outputs; or `data_config` makes
            images of a size that the model does not take.
        VisgraftError: nothing is attached, or the directory holds something else or cannot be written.
    """
    tensors = adapter_tensors(model)
    record_ = make_record(model, classes=classes, data_config=data_config, facts=record)
    canary = measure_canary(model, record_.data_config)
    unlike = None if reference is None else reference.to_bytes()
    record_ = dataclasses.replace(
        record_,
        canary=canary,
        calibrated=calibrated or {},
        unlike=None if unlike is None else digest_of_reference(unlike),
    )
    path = Path(path)
    with new_directory(path, CONFIG) as folder:
        safetensors.torch.save_file(tensors, folder / TENSORS)
        if unlike is not None:
            (folder / UNLIKE).write_bytes(unlike)
        write_json(folder / CONFIG, record_.to_json())
        (folder / CARD).write_text(make_card(record_), encoding="utf-8")
    return path


def make_record(
    model: nn.Module,
    *,
    classes: Sequence[str] = (),
    data_config: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> AdapterRecord:
    """Return the record of a model with something attached; arguments and errors are those of `save`."""
    attached, model = get_attached(model), unwrapped(model)
    attached.adopt()
    outputs = head_outputs(model) or 0
    names = class_names(classes, outputs)
    if data_config and "input_size" in data_config:
        channels, *size = data_config["input_size"]
        check_shape(model, channels, size, "images prepared by data_config", kind=AdapterError)
    prepared = dict(data_config or {})
    if not {"input_size", "mean", "std"} <= prepared.keys():
        prepared = {**model_data_config(model), **prepared}
    config = {
        "format_version": FORMAT_VERSION,
        "method": attached.config.method,
        "method_config": attached.config.to_dict(),
        "backbone": {
            **(origin_of(model) or _origin(model)).to_dict(),
            "num_classes": outputs,
            "digest": attached.digest,
            "digest_precision": str(attached.digest_dtype).removeprefix("torch."),
            "own": list(attached.adopted),
        },
        "data_config": prepared,
        "classes": names,
        "parameters": dataclasses.asdict(count_parameters(model)),
        "record": dict(facts or {}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    return AdapterRecord.from_json(config, Path(CONFIG))


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


def read_record(path: str | Path) -> AdapterRecord:
    """Return the checked record of an adapter, without its tensors; its directory, or `hf:USER/NAME[@REVISION]`.

    Raises:
        AdapterError: no adapter, a damaged one, or one of a newer format; or it cannot be had from the hub.
    """
    file, opened = Path(path) / CONFIG, resolve(path) / CONFIG
    if not opened.is_file():
        raise AdapterError(f"{path} is not an adapter: {CONFIG} is missing; pass a folder that `train` or `save` wrote")
    try:
        config = json.loads(opened.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged ({error}); {remedy(path)}") from error
    if isinstance(config, dict) and "peft_type" in config:
        raise AdapterError(f"{path} is of Hugging Face's peft; turn it into an adapter with visgraft import")
    return AdapterRecord.from_json(config, file)


@settled()
def load(path: str | Path, *, weights: str | None = None, backbone: nn.Module | None = None) -> Adapted:
    """Load an adapter with its backbone.

    Args:
        path: the adapter's directory, or `hf:USER/NAME` or `hf:USER/NAME@REVISION` for one on the Hugging Face hub.
        weights: where the backbone's weights come from, in place of what the adapter says (see `Backbone`).
        backbone: a ready plain model, e.g. one made with timm; the adapter is attached to it in place.

    Raises:
        AdapterError: the directory is damaged or foreign, the backbone is not the one it was trained on, or the hub
            does not give the adapter out.
        WeightsError: the backbone's weights cannot be had.
    """
    path = Path(path)
    record = read_record(path)
    try:
        image_transform(record.data_config)
    except Exception as error:  # timm's transform raises whatever comes of a wrong fact
        raise AdapterError(f"{path / CONFIG} is damaged: {error}; restore it or train again") from error
    tensors = read_tensors(path)
    model = backbone
    if model is None:
        model = create_backbone(record.located(path, weights), record.outputs)
    if (head_outputs(unwrapped(model)) or 0) != record.outputs:
        raise AdapterError(
            f"{path} needs a head of {record.outputs} outputs; create the backbone with num_classes={record.outputs}"
        )
    # One that takes other sizes too would run, but with its positions resampled from another size than in training.
    built, trained = built_size(model), recorded_size(model, record.backbone.to_dict())
    if backbone is not None and None not in (built, trained) and built != trained:
        raise AdapterError(
            f"{path} was trained on a backbone for images of {sides(trained)} pixels, but the one given takes "
            f"{sides(built)}; create it with img_size={trained} (image_size= in visgraft.Backbone)"
        )
    assemble(model, record.method)
    try:
        _fill(model, tensors, path, record)
        check_canary(model, record, path)
    except AdapterError:
        detach(model)
        raise
    return Adapted(model.eval(), record)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter.

    Raises:
        AdapterError: they are missing or damaged.
    """
    try:
        return read_safetensors(resolve(path) / TENSORS)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{path / TENSORS} is missing or damaged ({error}); {remedy(path)}") from error


def check_backbone(model: nn.Module, record: AdapterRecord, path: Path) -> None:
    """Raise an AdapterError unless the frozen tensors of a model with the method attached are the adapter's.

    They are compared in the precision in which the adapter saw them.
    """
    attached = get_attached(model)
    attached.adopt(record.own)

    def digest(dtype: torch.dtype) -> str | None:
        return attached.digest if dtype == attached.digest_dtype else backbone_digest(model, record.own, dtype=dtype)

    check_digest(record, path, attached.digest_dtype, digest)


def check_digest(
    record: AdapterRecord, path: str | Path, has: torch.dtype, digest: Callable[[torch.dtype], str | None]
) -> None:
    """Raise an AdapterError unless a backbone in the precision `has` is the one that the adapter was trained on.

    `digest` gives the backbone's in a precision, without the tensors that the record calls the adapter's own.
    """
    if record.digest is None:  # made only to be compared: that takes longer than the rest of loading
        return
    wanted = getattr(torch, record.digest_precision)
    if torch.promote_types(wanted, has) != has:
        raise AdapterError(
            f"{path} was made with the backbone in {record.digest_precision}, but this one is in "
            f"{str(has).removeprefix('torch.')}, in which nobody can tell whether it is the same; pass the backbone in "
            f"{record.digest_precision}, and convert the model after loading"
        )
    found = digest(wanted)
    if found != record.digest:
        raise AdapterError(
            f"{path} was trained on another backbone (sha256 {record.digest[:12]}…, this one is {str(found)[:12]}…); "
            "pass the same weights with --weights (weights= or backbone= in Python)"
        )


def check_canary(model: nn.Module, record: AdapterRecord, path: Path) -> None:
    """Raise an AdapterError unless the model answers the adapter's seeded picture as it did when it was saved.

    Adapters of earlier versions have no canary, and a model without data (meta) does not answer.
    """
    if record.canary is None or any(parameter.is_meta for parameter in model.parameters()):
        return
    if not is_drawn_alike(record.canary, record.data_config):
        raise AdapterError(
            f"{path / CONFIG} is damaged: its canary is about another picture than that of its image size; restore "
            "it or train again"
        )
    found, allowed = canary_difference(model, record.canary, record.data_config)
    if not found <= allowed:
        raise AdapterError(
            f"{path} answers a seeded picture otherwise than when it was saved: a logit differs by {found:.2g}, above "
            f"{allowed:.2g}; its tensors were changed, or this device or torch computes wrongly: restore the "
            "adapter, or load it on the CPU"
        )


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, record: AdapterRecord) -> None:
    """Copy the stored tensors in, after checking the backbone, every name and every shape."""
    check_backbone(model, record, path)
    check_tensors(adapter_tensors(model), tensors, path)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise an AdapterError unless the stored tensors have the names and shapes of the model's own and are finite."""
    wrong = sorted(set(own) ^ set(tensors)) + [
        name for name in own if name in tensors and (own[name].shape, own[name].dtype.is_floating_point)
        != (tensors[name].shape, tensors[name].dtype.is_floating_point)
    ]  # fmt: skip
    if wrong:
        raise AdapterError(
            f"{path / TENSORS} does not fit its config: {', '.join(wrong[:3])}; restore it or train again"
        )
    damaged = first_not_finite(tensors)
    if damaged is not None:
        raise AdapterError(f"{path / TENSORS} is damaged: {damaged} is not finite; restore it or train again")
