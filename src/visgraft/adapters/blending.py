"""One adapter made of several of one backbone, method and task: their maps added with weights, or one map scaled.

What the modules add is summed exactly, whatever the method; tensors of the backbone itself move by the weighted mean of
their moves, and the head is the weighted mean of the heads (weights averaged as in arXiv:2203.05482, and towards the
frozen model as in arXiv:2109.01903).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.adapters.directory import (
    CONFIG,
    Adapted,
    adapter_tensors,
    check_backbone,
    read_record,
    read_tensors,
)  # fmt: skip
from visgraft.adapters.hub import settled
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import create_backbone
from visgraft.core.attach import assemble, count_parameters, detach
from visgraft.core.attached import get_attached
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError
from visgraft.options import MethodConfig

POSITIONS, SHARED = f"{CHILD}.positions.", f"{CHILD}.shared."


@dataclass(frozen=True)
class BlendPart:
    """One of the adapters that a blend is made of: its tensors, by the names that the method gives them.

    `weight` is that of its modules, `share` that of its head and of the backbone's own tensors; all shares add up to 1.
    """

    tensors: Mapping[str, Tensor]
    weight: float
    share: float


@settled()
def blend(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
    backbone_weights: str | None = None,
    backbone: nn.Module | None = None,
) -> Adapted:
    """Return one adapter made of several of the same backbone, method, options and classes.

    Args:
        adapters: their directories, or `hf:USER/NAME`; one alone may be scaled.
        weights: one per adapter, which add up to 1; None: equal ones.
        scale: factor of all that the adapters change besides the head; below 1 it leads towards the frozen model.
        backbone_weights: where the backbone's weights come from, in place of what the first adapter says.
        backbone: a ready plain model, in place.

    Raises:
        AdapterError: adapters do not go together, or cannot be read; or the backbone is another.
        VisgraftError: the weights are not as many, do not add up to 1, or the method inserts tokens.
    """
    paths = [Path(path) for path in adapters]
    records = [read_record(path) for path in paths]
    shares = check_weights(paths, weights, scale)
    check_alike(paths, records)
    parts = [
        part
        for path, record, share in zip(paths, records, shares, strict=True)
        if share  # a weight of nothing need not take up room
        for part in parts_of(read_tensors(path), record.method, share)
    ]
    config = blended_config(records[0].method, parts, scale)
    model = backbone
    if model is None:
        model = create_backbone(records[0].located(paths[0], backbone_weights), records[0].outputs)
    assemble(model, config)
    try:
        check_backbone(model, records[0], paths[0])
        fill(model, parts, scale)
    except AdapterError:
        detach(model)
        raise
    told = {"adapters": [path.name for path in paths], "weights": shares, "scale": scale}
    kept = {name: records[0].facts[name] for name in ("data", "precision") if name in records[0].facts}
    record = dataclasses.replace(
        records[0],
        method=config,
        facts={**kept, "blend": told},
        parameters=dataclasses.asdict(count_parameters(model)),
        canary=None,
    )
    return Adapted(model.eval(), record)


def check_weights(paths: Sequence[Path], weights: Sequence[float] | None, scale: float) -> list[float]:
    """Return a weight per adapter, and raise an AdapterError unless they are as many and add up to 1."""
    if not paths:
        raise AdapterError("no adapter is given; name one to scale, or several to blend")
    shares = [1 / len(paths)] * len(paths) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(paths):
        raise AdapterError(f"there are {len(paths)} adapters, but {len(shares)} weights; give one for each")
    if not abs(sum(shares) - 1) < 1e-6:
        raise AdapterError(f"the weights add up to {sum(shares):g}, but must to 1; a --scale below 1 is something else")
    if not 0 < scale <= 2:
        raise AdapterError(f"scale is {scale:g}, but must be above 0 and at most 2")
    return shares


def check_alike(paths: Sequence[Path], records: Sequence[AdapterRecord]) -> None:
    """Raise an AdapterError unless the adapters have a backbone, a method with its options, and classes in common."""

    def facts(record: AdapterRecord) -> dict[str, Any]:
        return {
            "backbone": (record.digest, record.digest_precision),
            "method": record.method.method,
            "options": dataclasses.replace(record.method, blend=None).to_dict(),
            "classes": record.classes or record.outputs,
            "task": record.task,
            "preprocessing": dict(record.data_config),
            "tensors of the backbone that train besides": record.own,
        }

    first = facts(records[0])
    for path, record in zip(paths[1:], records[1:], strict=True):
        for name, value in facts(record).items():
            if value != first[name]:
                raise AdapterError(
                    f"{path} and {paths[0]} do not blend, because their {name} differ; give adapters of one backbone, "
                    "method and task, or answer with both by predict --ensemble"
                )


def parts_of(tensors: Mapping[str, Tensor], method: MethodConfig, weight: float) -> list[BlendPart]:
    """Return an adapter as parts of a blend: itself, or those that it was blended of."""
    if method.blend is None:
        return [BlendPart(tensors, weight, weight)]
    return [
        BlendPart(_one_of(tensors, number), own * weight, weight / len(method.blend))
        for number, own in enumerate(method.blend)
    ]


def _one_of(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the tensors of one part of a blend by the method's own names, and what all parts have in common."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(POSITIONS):
            key, _, rest = name.removeprefix(POSITIONS).partition(".parts.")
            index, _, inside = rest.partition(".")
            if int(index) == number:
                found[f"{POSITIONS}{key}.{inside}"] = tensor
        elif name.startswith(SHARED):
            index, _, rest = name.removeprefix(SHARED).partition("_")
            if int(index) == number:
                found[SHARED + rest] = tensor
        else:
            found[name] = tensor
    return found


def blended_config(method: MethodConfig, parts: Sequence[BlendPart], scale: float) -> MethodConfig:
    """Return the blend's options: modules stand side by side, unless the mean of their tensors does the same."""
    plain = dataclasses.replace(method, blend=None)
    if not method.has_places or (method.additive and _same_buffers(parts)):
        return plain
    return dataclasses.replace(plain, blend=tuple(part.weight * scale for part in parts))


def _same_buffers(parts: Sequence[BlendPart]) -> bool:
    """Whether what is no floating-point number, such as indices of channels, is the same in all modules."""
    return all(
        torch.equal(tensor, part.tensors[name])
        for part in parts
        for name, tensor in parts[0].tensors.items()
        if name.startswith(CHILD) and not tensor.is_floating_point()
    )


def fill(model: nn.Module, parts: Sequence[BlendPart], scale: float) -> None:
    """Copy the parts' tensors, or their weighted means, into a model with the blend's method attached.

    Raises:
        AdapterError: a tensor is missing or has another shape.
    """
    attached, found = get_attached(model), dict[str, Tensor]()
    head = tuple(f"{path}." for path in attached.head)
    for name, first in parts[0].tensors.items():
        inside = name.startswith(CHILD)
        if inside and attached.config.blend is not None:
            continue
        if not first.is_floating_point():
            found[name] = first
            continue
        weighted = [(part.weight if inside else part.share) * part.tensors[name].double() for part in parts]
        mean = torch.stack(weighted).sum(0)
        if inside:
            found[name] = scale * mean
        elif head and name.startswith(head):
            found[name] = mean
        else:
            own = attached.originals[name].cpu().double()
            found[name] = own + scale * (mean - own)
    if attached.config.blend is not None:
        for number, part in enumerate(parts):
            found |= {_placed(name, number): t for name, t in part.tensors.items() if name.startswith(CHILD)}
    own_tensors = adapter_tensors(model)
    wrong = sorted(found.keys() ^ own_tensors.keys())
    wrong += [name for name in own_tensors if name in found and own_tensors[name].shape != found[name].shape]
    if wrong:
        raise AdapterError(f"the adapters' tensors do not fit their {CONFIG}: {', '.join(wrong[:3])}; restore them")
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in found.items():
            state[name].copy_(tensor)


def _placed(name: str, number: int) -> str:
    """Return the name that a part's tensor has in the blend."""
    if name.startswith(SHARED):
        return f"{SHARED}{number}_{name.removeprefix(SHARED)}"
    key, _, inside = name.removeprefix(POSITIONS).partition(".")
    return f"{POSITIONS}{key}.parts.{number}.{inside}"
