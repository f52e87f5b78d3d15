"""What an adapter changes of its plain backbone, layer by layer, as peft can say it: low-rank factors, a bias, copies.

All is measured as the difference between the folded model and the plain one, in float64, so that every method that
folds, and every family that it folds into, goes one way.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.backbones.heads import head_paths
from visgraft.core.attach import detach, strip
from visgraft.core.attached import find_attached
from visgraft.core.dryrun import meta_copy
from visgraft.export.format import ExportError
from visgraft.export.merge import folded, in_float64

SKETCHES = (32, 96, 256)
"""Widths of the sketches that a change's range is looked for in, before its whole decomposition is made."""


@dataclass(frozen=True, eq=False)
class LayerChange:
    """The change of one linear layer or convolution, float64: `left` [out, r] · diag(`values` [r]) · `right` [r, in].

    Of a convolution, `in` counts the pixels of the kernel too. `values` fall, and are above the noise of float64.
    `bias` [out] is what is added to its bias; None where the layer has none. `shape` is the weight's.
    """

    path: str
    left: Tensor
    values: Tensor
    right: Tensor
    bias: Tensor | None
    shape: torch.Size

    @property
    def rank(self) -> int:
        """The number of factors; 0 where only the bias changes."""
        return len(self.values)

    @property
    def shifts(self) -> bool:
        """Whether its bias changes."""
        return self.bias is not None and bool(self.bias.any())

    def factors(self, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Return `up` [out, r] and `down` [r, in] whose product is the change, or its best of a smaller rank.

        Each takes the root of the values, so that they are alike in size. Where only the bias changes, r is 1 and both
        are zero, because peft has no layer of rank 0.
        """
        kept = self.rank if rank is None else min(rank, self.rank)
        if not kept:
            return self.left.new_zeros(len(self.left), 1), self.right.new_zeros(1, self.right.shape[1])
        root = self.values[:kept].sqrt()
        return self.left[:, :kept] * root, root[:, None] * self.right[:kept]

    def lost(self, rank: int | None) -> float:
        """Return the part of the change, by its Frobenius norm, that a smaller rank leaves out; between 0 and 1."""
        if rank is None or rank >= self.rank:
            return 0.0
        return (self.values[rank:].norm() / self.values.norm()).item()


@dataclass(frozen=True, eq=False)
class Changes:
    """What differs between an adapted model and its plain one.

    `layers` are the linear layers and convolutions that change, `whole` the paths of smaller layers (norms) that are
    copied as they are, `head` those of the head, and `exact` is the folded model, a plain timm model in float64.
    """

    layers: tuple[LayerChange, ...]
    whole: tuple[str, ...]
    head: tuple[str, ...]
    exact: nn.Module


def changes_of(model: nn.Module) -> Changes:
    """Return what the method attached to a model changes, in the head and in front of it.

    Raises:
        MergeError: it does not fold into the backbone's weights.
        ExportError: it changes a tensor that belongs to no layer which peft could replace; the reason, as `it ...`.
    """
    plain = in_float64(model)
    exact = folded(plain)
    detach(plain)
    before, after = plain.state_dict(), exact.state_dict()
    head = head_paths(plain)
    inside = tuple(f"{path}." for path in head)
    changed = [
        name
        for name in after
        if not (inside and name.startswith(inside)) and not torch.equal(before[name], after[name])
    ]
    paths, whole = owners(plain, changed)
    layers = (_layer_change(path, plain.get_submodule(path), exact.get_submodule(path)) for path in paths)
    kept = tuple(change for change in layers if change.rank or change.shifts)
    return Changes(kept, tuple(whole), head, exact)


def owners(model: nn.Module, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the layers that tensors of these names belong to: those that take a LoRA, and those to copy whole.

    Raises:
        ExportError: one belongs to no layer alone; the reason, as `it ...`.
    """
    layers, whole = [], []
    for path, name in {name.rpartition(".")[0]: name for name in names}.items():
        layer = model.get_submodule(path)
        if takes_lora(layer):
            layers.append(path)
        elif path and next(layer.children(), None) is None:
            whole.append(path)
        else:
            raise ExportError(f"changes {name}, which belongs to no layer that peft could replace")
    return layers, whole


def takes_lora(layer: nn.Module) -> bool:
    """Whether peft's LoRA computes beside this layer what a change of its weight would.

    Not of subclasses, whose weights pass through something else first, nor of grouped or dilated convolutions.
    """
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear


def _layer_change(path: str, before: Any, after: Any) -> LayerChange:
    old, new = (layer.weight.detach().flatten(1) for layer in (before, after))
    # An entry of the fold is a sum of at most so many products, each rounded in float64; what is below that is noise.
    noise = torch.finfo(old.dtype).eps * max(old.shape) * (old.norm() + new.norm()).item()
    bias = None if before.bias is None else (after.bias - before.bias).detach()
    return LayerChange(path, *low_rank_factors(new - old, noise), bias, before.weight.shape)


def low_rank_factors(change: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return left [m, r], values [r] and right [r, n] whose product is a matrix [m, n] up to `noise`, a norm.

    Exact, but quick where the rank is small: the range is found in a sketch, and what lies outside is measured.
    """
    generator = torch.Generator().manual_seed(0)
    basis = None
    for width in SKETCHES:
        if 2 * width > min(change.shape):
            break
        drawn = torch.randn(change.shape[1], width, generator=generator, dtype=change.dtype).to(change.device)
        basis = torch.linalg.qr(change @ drawn).Q
        if (change - basis @ (basis.T @ change)).norm() <= noise:
            break
        basis = None
    small = change if basis is None else basis.T @ change
    left, values, right = torch.linalg.svd(small, full_matrices=False)
    kept = int((values > noise).sum())
    left = left if basis is None else basis @ left
    return left[:, :kept], values[:kept], right[:kept]


def never_called(model: nn.Module, paths: Collection[str], input_size: Collection[int]) -> str | None:
    """Return the first of these layers that the plain model does not call when it answers; None where it calls all,
    or does not run without data.

    peft adds in the layer's call, so that its branch would be passed by where a model reads the weight alone.

    Args:
        model: the model, plain or with something attached; a plain copy without data is run.
        paths: of the layers.
        input_size: channels, height and width of an image.
    """
    plain, called = meta_copy(model), set()
    if find_attached(plain):
        strip(plain)  # attaching lets some attentions call a layer that they do not call by themselves
    for path in paths:
        plain.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    try:
        with torch.no_grad():
            plain.eval()(torch.empty(1, *input_size, device="meta", dtype=next(plain.parameters()).dtype))
    except Exception:  # a model that looks at its numbers does not run without data; what is written is proven anyway
        return None
    return next((path for path in paths if path not in called), None)
