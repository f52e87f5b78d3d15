"""The adapters that answer a stream of images together, and what prepares an image for all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from visgraft.adapters.directory import Adapted
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import image_transform, shape_from
from visgraft.core.fitting import check_shape
from visgraft.errors import AdapterError


class ReadyAdapter(NamedTuple):
    """An adapter that answers: one loaded, or, where there is none, that of this name in the bank."""

    name: str
    record: AdapterRecord
    adapted: Adapted | None = None

    @property
    def background(self) -> str:
        """The colour behind transparent places."""
        return self.record.background or "white"


def transform_of(ready: Sequence[ReadyAdapter]) -> Any:
    """Return what prepares an image for all adapters."""
    first, facts = _own_transform(ready[0]), ready[0].record.data_config
    for one in ready[1:]:
        alike = one.adapted is None and ready[0].adapted is None and one.record.data_config == facts
        if not alike and repr(_own_transform(one)) != repr(first):
            raise AdapterError(f"adapters {ready[0].name} and {one.name} prepare images differently; run each apart")
    if made := shape_from(first):
        check_prepared(ready, *made)
    return first


def _own_transform(one: ReadyAdapter) -> Any:
    return image_transform(one.record.data_config) if one.adapted is None else one.adapted.transform


def check_prepared(ready: Sequence[ReadyAdapter], channels: int | None, size: Sequence[int]) -> None:
    """Raise an AdapterError unless all loaded models take the images that the transform makes; a bank checks itself."""
    remedy = "use the transform that visgraft.load returns"
    for one in ready:
        if one.adapted is not None:
            what = f"images from the transform of adapter {one.name}"
            check_shape(one.adapted.model, channels, size, what, kind=AdapterError, remedy=remedy)


def background_of(ready: Sequence[ReadyAdapter]) -> str:
    """Return the colour behind transparent places with which all adapters were trained."""
    for one in ready[1:]:
        if one.background != ready[0].background:
            raise AdapterError(
                f"adapters {ready[0].name} and {one.name} were trained with the backgrounds {ready[0].background} and "
                f"{one.background}; pass background (--background), or run each apart"
            )
    return ready[0].background
