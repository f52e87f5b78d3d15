"""Adapters on their way into a bank: read from a directory or taken from a model, and checked as `load` checks them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from visgraft.adapters.directory import (
    CONFIG,
    Adapted,
    check_digest,
    check_tensors,
    make_record,
    read_record,
    read_tensors,
)
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import image_transform
from visgraft.backbones.input_size import built_size, recorded_size, sides
from visgraft.backbones.wrappers import unwrapped
from visgraft.bank.configuration import Configuration
from visgraft.bank.ground import FrozenBackbone, HeadKind
from visgraft.core.attached import get_attached
from visgraft.core.tensors import first_not_finite
from visgraft.errors import AdapterError, VisgraftError

Configurations = Callable[[AdapterRecord], Configuration]
"""What gives the configuration of an adapter with this record."""


class ReadAdapter(NamedTuple):
    """An adapter that fits the bank's backbone."""

    record: AdapterRecord
    configuration: Configuration
    head: HeadKind
    tensors: dict[str, Tensor]


def read_adapter(
    given: str | Path | Adapted | nn.Module, ground: FrozenBackbone, configurations: Configurations
) -> ReadAdapter:
    """Return an adapter from its directory, or that of a model with something attached.

    Raises:
        AdapterError: it is damaged, or was trained on another backbone.
        VisgraftError: nothing is attached to the model.
    """
    if isinstance(given, str | Path):
        return _from_directory(Path(given), ground, configurations)
    model = given.model if isinstance(given, Adapted) else given
    if not isinstance(model, nn.Module):
        raise VisgraftError(f"an adapter is a path, a loaded adapter or a model, but this is {type(given).__name__}")
    record = given.record if isinstance(given, Adapted) else make_record(model)
    return _from_model(unwrapped(model), record, ground, configurations)


def _from_directory(path: Path, ground: FrozenBackbone, configurations: Configurations) -> ReadAdapter:
    record = read_record(path)
    try:
        image_transform(record.data_config)
    except Exception as error:  # timm's transform raises whatever comes of a wrong fact
        raise AdapterError(f"{path / CONFIG} is damaged: {error}; restore it or train again") from error
    trained = recorded_size(ground.plain, record.backbone.to_dict())
    _check_size(ground, trained, path)
    tensors = read_tensors(path)
    check_digest(record, path, ground.dtype, lambda dtype: ground.digest(frozenset(record.own), dtype))
    passes = sum(record.method.passes)
    if passes and passes != record.outputs:
        raise AdapterError(
            f"{path / CONFIG} is damaged: its tasks have {passes} outputs in all, but it has {record.outputs}; "
            "restore it or train again"
        )
    configuration, head = configurations(record), ground.head(record.outputs)
    check_tensors({**configuration.layout.empty(), **head.layout.empty()}, tensors, path)
    return ReadAdapter(record, configuration, head, tensors)


def _from_model(
    model: Any, record: AdapterRecord, ground: FrozenBackbone, configurations: Configurations
) -> ReadAdapter:
    attached = get_attached(model)
    what = f"the adapter on this {type(model).__name__}"
    if type(model) is not type(ground.plain):
        raise AdapterError(f"{what} is on another backbone than the bank's {type(ground.plain).__name__}")
    _check_size(ground, built_size(model), what)
    tensors = {name: tensor.detach() for name, tensor in attached.stored().items()}
    if any(tensor.is_meta for tensor in tensors.values()) or record.digest is None:
        raise AdapterError(f"{what} holds no data (it is on the meta device); load it first")
    check_digest(record, what, ground.dtype, lambda dtype: ground.digest(frozenset(record.own), dtype))
    configuration, head = configurations(record), ground.head_of(model, record.outputs)
    shapes = configuration.layout.shapes | head.layout.shapes
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise AdapterError(f"{what} does not fit its options: {name}; attach the method anew")
    damaged = first_not_finite({name: tensors[name] for name in shapes})
    if damaged is not None:
        raise AdapterError(f"{what} is damaged: {damaged} is not finite; train it again")
    return ReadAdapter(record, configuration, head, tensors)


def _check_size(ground: FrozenBackbone, size: tuple[int, int] | None, what: str | Path) -> None:
    """Raise an AdapterError where an adapter is of a backbone for images of another size."""
    if None not in (ground.size, size) and ground.size != size:
        raise AdapterError(
            f"{what} was trained on a backbone for images of {sides(size)} pixels, but the bank's takes "
            f"{sides(ground.size)}; create it with img_size={size} (image_size= in visgraft.Backbone)"
        )
