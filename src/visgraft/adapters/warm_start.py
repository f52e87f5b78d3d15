"""Start a training run from an earlier adapter: new images of its classes, or classes that came or went."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from visgraft.adapters.directory import adapter_tensors, check_backbone, read_record, read_tensors
from visgraft.adapters.hub import TENSORS, settled
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.heads import output_layers
from visgraft.core.attach import assemble, detach
from visgraft.errors import AdapterError
from visgraft.options import MethodConfig


@settled()
def start_from(model: nn.Module, adapter: Path, config: MethodConfig, classes: Sequence[str]) -> list[str]:
    """Attach an adapter's method with its weights to a plain model whose head may have other classes.

    The rows of the head are taken over class by class, by name; those of new classes start as in the model. Nothing is
    chosen or scored anew: SCT keeps its channels.

    Args:
        model: the plain backbone with a head for `classes`, in place.
        adapter: the folder of the earlier adapter, or `hf:USER/NAME`.
        config: the method's options, which must be those of the adapter.
        classes: names of the head's outputs.

    Returns:
        Lines that name the classes that came and went.

    Raises:
        AdapterError: the adapter is damaged, of another method, options or backbone, or shares no class.
    """
    stored = read_record(adapter)
    if stored.method != config:
        raise AdapterError(
            f"{adapter} is {stored.method.method} with {stored.method.to_dict()}; leave the method's options out to go "
            "on with these"
        )
    before = {name: row for row, name in enumerate(stored.classes)}
    rows = [(row, before[name]) for row, name in enumerate(classes) if name in before]
    if not rows:
        raise AdapterError(f"{adapter} knows none of the classes {', '.join(classes[:5])}; train without --init-from")
    assemble(model, config)
    try:
        _take_over(model, adapter, stored, rows)
    except AdapterError:
        detach(model)
        raise
    added = [name for name in classes if name not in before]
    gone = [name for name in before if name not in classes]
    told = [f"new classes, whose part of the head starts at random: {', '.join(added)}"] if added else []
    return told + ([f"classes of {adapter} that are gone: {', '.join(gone)}"] if gone else [])


def _take_over(model: nn.Module, adapter: Path, stored: AdapterRecord, rows: Sequence[tuple[int, int]]) -> None:
    """Copy an adapter's tensors into a model with the method attached; of the outputs' layer only `rows` (new, old).

    Raises:
        AdapterError: the backbone is another, or the tensors are damaged or do not fit.
    """
    check_backbone(model, stored, adapter)
    tensors, own = read_tensors(adapter), adapter_tensors(model)
    last = tuple(f"{path}." for path in output_layers(model))

    def fits(name: str) -> bool:
        start = 1 if name.startswith(last) else 0  # of the outputs' layer the number of rows may differ
        return own[name].shape[start:] == tensors[name].shape[start:] and bool(tensors[name].isfinite().all())

    wrong = sorted(tensors.keys() ^ own.keys()) + [name for name in own if name in tensors and not fits(name)]
    if wrong:
        raise AdapterError(
            f"{adapter / TENSORS} does not fit its config: {', '.join(wrong[:3])}; restore it or train again"
        )
    state = model.state_dict()
    new_rows, old_rows = (list(column) for column in zip(*rows, strict=True))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith(last):
                state[name][new_rows] = tensor[old_rows].to(state[name])
            else:
                state[name].copy_(tensor)
