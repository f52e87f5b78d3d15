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

from visgraft.adapters.directory import Adapted, adapter_tensors, load, read_record
from visgraft.adapters.hub import settled
from visgraft.adapters.record import AdapterRecord
from visgraft.backbones.creation import create_backbone
from visgraft.core.attach import assemble, count_parameters, detach
from visgraft.core.attached import get_attached
from visgraft.core.tensors import CHILD
from visgraft.data.dataset import Split
from visgraft.errors import AdapterError
from visgraft.options import MethodConfig

DIVISION = {"fingerprint", *(field.name for field in dataclasses.fields(Split))}
"""What an adapter's record says of its data by which they are divided again as they were."""
_NOTHING = object()
LARGEST = 10.0
"""A weight beyond is a slip, and such ones that cancel each other leave rounding errors."""
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
    model = backbone
    if model is None:
        model = create_backbone(records[0].located(paths[0], backbone_weights), records[0].outputs)
    # A weight of nothing need not take up room.
    tensors = [checked_tensors(path, model) if share else {} for path, share in zip(paths, shares, strict=True)]
    return blended(model, paths, records, tensors, shares, scale)


def checked_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter, after all that `load` checks on a plain model, which is plain again then.

    Raises:
        AdapterError: the adapter is damaged, or of another backbone.
    """
    tensors = {name: tensor.clone() for name, tensor in adapter_tensors(load(path, backbone=model).model).items()}
    detach(model)
    return tensors


def blended(
    model: nn.Module,
    paths: Sequence[Path],
    records: Sequence[AdapterRecord],
    tensors: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
    scale: float,
) -> Adapted:
    """Attach the blend of adapters that go together to a plain model, in place.

    Raises:
        AdapterError: the blend has values that are not finite.
    """
    parts = [
        part
        for own, record, share in zip(tensors, records, shares, strict=True)
        if share
        for part in parts_of(own, record.method, share)
    ]
    config = blended_config(records[0].method, parts, scale)
    assemble(model, config)
    try:
        get_attached(model).adopt(records[0].own)
        fill(model, parts, scale)
    except AdapterError:
        detach(model)
        raise
    told = {"adapters": [path.absolute().name for path in paths], "weights": list(shares), "scale": scale}
    facts = {name: records[0].facts[name] for name in ("precision",) if name in records[0].facts}
    data = common_data([record.facts.get("data", {}) for record in records])
    record = dataclasses.replace(
        records[0],
        method=config,
        facts={**facts, **({"data": data} if data else {}), "blend": told},
        parameters=dataclasses.asdict(count_parameters(model)),
        canary=None,
        calibrated={},
        unlike=None,
    )
    return Adapted(model.eval(), record)


def common_data(data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what adapters have in common of the data that they were trained on.

    Where those were divided otherwise, nothing is left by which they could be divided again: what one adapter has as
    test images, another may have learned.
    """
    first = data[0]
    common = {name: value for name, value in first.items() if all(o.get(name, _NOTHING) == value for o in data)}
    if not common.keys() >= first.keys() & DIVISION:
        return {name: value for name, value in common.items() if name not in DIVISION}
    return common


def check_weights(paths: Sequence[Path], weights: Sequence[float] | None, scale: float) -> list[float]:
    """Return a weight per adapter, and raise an AdapterError unless they are as many and add up to 1."""
    if not paths:
        raise AdapterError("no adapter is given; name one to scale, or several to blend")
    shares = [1 / len(paths)] * len(paths) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(paths):
        raise AdapterError(f"there are {len(paths)} adapters, but {len(shares)} weights; give one for each")
    if not abs(sum(shares) - 1) < 1e-6:
        raise AdapterError(f"the weights add up to {sum(shares):g}, but must to 1; a --scale below 1 is something else")
    if far := [share for share in shares if abs(share) > LARGEST]:
        raise AdapterError(f"a weight is {far[0]:g}, but must be between {-LARGEST:g} and {LARGEST:g}")
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
            "tasks": record.tasks,  # with their means: heads of other ones say other numbers
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
        AdapterError: a mean is not finite.
    """
    like = next(model.parameters())
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
    if broken := [name for name, tensor in found.items() if not bool(tensor.to(like.dtype).isfinite().all())]:
        raise AdapterError(f"{broken[0]} of the blend is not finite; give smaller weights, or train with a lower --lr")
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
