"""What an adapter changes of its plain backbone, tensor by tensor, whatever the method: its task vector.

Methods stand at different places: ALoRE before the projections, LoRA beside them. What they have in common is the layer
that their maps fold into, so maps are compared as what they make of its weight and bias, in float64 and one layer
at a time; nothing is folded for it. A map that no layer takes over stands for itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.backbones.heads import head_paths
from visgraft.core.attached import Attached, get_attached
from visgraft.core.families import NORMS, norm_parameters
from visgraft.core.finding import find_sites
from visgraft.core.method import Position, TokenMethod
from visgraft.core.tensors import CHILD
from visgraft.errors import SiteError
from visgraft.export.affine import AffineMap, FoldTarget, fold_target, folded_linear, folded_norm, probe, read_bias
from visgraft.export.peft_change import low_rank_factors


@dataclass(frozen=True, eq=False)
class TensorChange:
    """The change of one tensor, float64: `left` [m, r] · diag(`values` [r]) · `right` [r, n], a vector having n = 1.

    `name` is the tensor's in the backbone, or a position's key where the map there stands for itself. `block` counts
    from 0; None: outside of the blocks. `before` is the Frobenius norm of the frozen tensor, of a map by itself the
    identity's.
    """

    name: str
    block: int | None
    left: Tensor
    values: Tensor
    right: Tensor
    before: float

    @property
    def norm(self) -> float:
        """The Frobenius norm of the change."""
        return self.values.norm().item()


class _Fold(NamedTuple):
    """A position whose map folds into a layer."""

    key: str
    position: Position
    target: FoldTarget


def why_not_linear(attached: Attached) -> str | None:
    """Return why what a method adds is no affine map of each token, as `lora ...`; None where it is."""
    if issubclass(attached.method, TokenMethod):
        return "inserts tokens"
    return None if attached.config.affine or not attached.where else "is not linear"


def tensor_changes(plain: nn.Module, model: nn.Module) -> Iterator[TensorChange]:
    """Yield the changes of all tensors but the head's, one after the other; those that are zero are left out.

    Args:
        plain: the backbone without anything attached.
        model: the backbone with a linear method attached, on the same tensors or others.

    Raises:
        MergeError: a module is not the affine map of each token that its options promise.
    """
    attached, blocks = get_attached(model), block_paths(plain)
    by_layer, alone = _folds(model, attached)
    before, after = _own(plain), _own(model)
    done = set[str]()
    for path, folds in by_layer.items():
        for name, new in _folded(model, attached, path, folds).items():
            done.add(name)
            old = before.get(name, torch.zeros_like(new))
            if (change := _change(name, block_of(name, blocks), old, new)) is not None:
                yield change
    for key, position in alone.items():
        block = position.block if position.last is None else position.last
        affine = position_map(attached, key)
        matrix = torch.diag(affine.matrix) if affine.matrix.ndim == 1 else affine.matrix
        # What passes there unchanged is what an identity makes of it, so that is what the map changes.
        for name, new, before_ in ((key, matrix, len(matrix) ** 0.5), (f"{key}.shift", affine.shift, 0.0)):
            if (change := _change(name, block, torch.zeros_like(new), new)) is not None:
                yield replace(change, before=before_)
    for name, new in after.items():
        if name in done or name not in before or before[name].shape != new.shape:
            continue
        if (change := _change(name, block_of(name, blocks), before[name], new)) is not None:
            yield change


def block_paths(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of a backbone's blocks in order; empty where its family is not known."""
    try:
        return tuple(block["stream.in"].host for block in find_sites(model).blocks)
    except SiteError:  # methods without modules do without
        return ()


def block_of(name: str, blocks: tuple[str, ...]) -> int | None:
    """Return the number of the block that a tensor of this name belongs to."""
    return next((number for number, path in enumerate(blocks) if name.startswith(f"{path}.")), None)


def _folds(model: nn.Module, attached: Attached) -> tuple[dict[str, list[_Fold]], dict[str, Position]]:
    """Return the positions that fold into each layer, in the order of folding, and those that fold into none."""
    by_layer, alone = dict[str, list[_Fold]](), dict[str, Position]()
    for key, position in attached.where.items():
        target = fold_target(*attached.sites.at(position))
        layers = [] if target is None else [model.get_submodule(neighbour.path) for neighbour in target.neighbours]
        if target is None or (not attached.config.diagonal and any(isinstance(layer, NORMS) for layer in layers)):
            alone[key] = position
            continue
        for path in dict.fromkeys(neighbour.path for neighbour in target.neighbours):
            by_layer.setdefault(path, []).append(_Fold(key, position, target))
    return by_layer, alone


def position_map(attached: Attached, key: str) -> AffineMap:
    """Return the map that an attached linear method adds at one of its positions.

    Raises:
        MergeError: the module there is not the affine map of each token that its options promise.
    """
    module: Any = attached.positions[key]
    position = attached.where[key]
    grid = attached.sites.at(position)[0].grid
    return probe(module, position, grid, attached.shared, attached.config.diagonal)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Return the backbone's own tensors as the model has them, the head's left out."""
    apart = tuple(f"{path}." for path in (*head_paths(model), CHILD))
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: t for name, t in state.items() if t.is_floating_point() and not name.startswith(apart)}


def _folded(model: nn.Module, attached: Attached, path: str, folds: list[_Fold]) -> dict[str, Tensor]:
    """Return a layer's weight and bias with the maps of these positions folded in, float64, by their names."""
    layer: Any = model.get_submodule(path)
    if isinstance(layer, NORMS):
        names = norm_parameters(layer)
        factor = _exact(getattr(layer, names[0])).flatten()
        shift = getattr(layer, names[1], None)
        moved = factor, torch.zeros_like(factor) if shift is None else _exact(shift).flatten()
        for fold in folds:
            moved = folded_norm(*moved, position_map(attached, fold.key))
        return {f"{path}.{name}": tensor for name, tensor in zip(names, moved, strict=True)}
    weight = _exact(layer.weight).flatten(1).clone()
    bias = None
    for fold in folds:
        affine = position_map(attached, fold.key)
        for neighbour in (one for one in fold.target.neighbours if one.path == path):
            bias = read_bias(model, layer, neighbour).cpu() if bias is None else bias
            rows = slice(*neighbour.rows) if neighbour.rows else slice(None)
            weight[rows], bias[rows] = folded_linear(weight[rows], bias[rows], fold.target.side, affine)
    assert bias is not None
    return {f"{path}.weight": weight, **_bias_homes(path, layer, folds, bias)}


def _bias_homes(path: str, layer: Any, folds: list[_Fold], bias: Tensor) -> dict[str, Tensor]:
    """Return a bias by the names of the tensors that hold its rows; of a layer without one, as if it had one."""
    homes = next((n.biases for fold in folds for n in fold.target.neighbours if n.path == path and n.biases), None)
    if homes is None or layer.bias is not None:
        return {f"{path}.bias": bias}
    return {name: bias[slice(*rows)] for name, rows in homes}


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _change(name: str, block: int | None, old: Tensor, new: Tensor) -> TensorChange | None:
    """Return a change as factors; None where it is zero but for rounding in float64."""
    if new.dtype == old.dtype and torch.equal(old, new):  # which spares most tensors the conversion
        return None
    start, end = _exact(old).flatten(), _exact(new).flatten()
    shape = (len(new), -1) if new.ndim > 1 else (-1, 1)
    change = (end - start).view(shape)
    before = start.norm().item()
    # An entry of a fold is a sum of at most so many products, each rounded in float64; what is below that is noise.
    noise = torch.finfo(torch.float64).eps * max(change.shape) * (before + end.norm().item())
    if change.norm() <= noise:
        return None
    return TensorChange(name, block, *low_rank_factors(change, noise), before)
