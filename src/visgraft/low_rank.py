"""Adding a low-rank map to features in few passes over them, with a backward pass of its own.

A step spends its time in the frozen backbone's products; what a low-rank branch adds to them is small in arithmetic,
and what makes it slow is how often the features are read and written. Here the branch is added by the last small
product itself, its gradients come from products only, and what it read is not kept where it can be computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LowRank(NamedTuple):
    """The map x ↦ s drop(x D) M U + b of every token, in blocks: how a method says what its `delta` is.

    `down` D [p, k] maps each of the a blocks of p channels into which x [..., a p] falls; all blocks together are the
    hidden features [..., a k]. `mix` M [a k, b k'] maps those (None: they stay as they are), and `up` U [k', q] maps
    each of b blocks of k' to q channels: [..., b q]. So p = a p and q = b q are the dense forms. `bias` is [b q].

    `scale` s multiplies the product. `dropout` is the rate at which hidden features are dropped, 0 in eval mode; with
    `drop_mixed` those behind M.
    """

    down: Tensor
    up: Tensor
    mix: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    drop_mixed: bool = False

    def delta(self, x: Tensor) -> Tensor:
        """Return what the map adds, without dropout: [..., a p] -> [..., b q]."""
        blocks, leading = x.unflatten(-1, (-1, len(self.down))), x.shape[:-1]
        hidden = (blocks @ self.down).flatten(-2)
        mixed = hidden if self.mix is None else hidden @ self.mix
        added = (mixed.unflatten(-1, (-1, len(self.up))) @ (self.scale * self.up)).reshape(*leading, -1)
        return added if self.bias is None else added + self.bias


@dataclass(frozen=True)
class _How:
    """What the function needs beside tensors: the dropout's place, the rows to add to, how to compute x again."""

    drop_mixed: bool
    rows: tuple[int, int] | None
    again: Callable[[Tensor], Tensor] | None


def add_low_rank(
    x: Tensor,
    onto: Tensor,
    factors: LowRank,
    source: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Return `onto` [..., D] plus the low-rank map of `x` [..., R].

    Args:
        x: the tensor read.
        onto: the tensor added to; where it is `x` itself, their gradients are added in one product.
        factors: the map.
        source: a tensor and the function that makes `x` of it. The tensor is kept for the backward pass instead of x.
        rows: add to these rows of the last axis, in place. `onto` must then be a tensor nobody else needs.
    """
    dtype = compute_dtype(x)
    down, keep, chance = factors.down, None, 1.0
    if factors.dropout:
        wide = down.shape[1] * (x.shape[-1] // len(down))
        if factors.drop_mixed and factors.mix is not None:
            wide = factors.mix.shape[1]
        keep, chance = keep_mask(x.shape[:-1].numel(), wide, factors.dropout, x.device)
    # On the small factor, because on the features it would cost a pass over them.
    up = factors.up * (factors.scale / chance)
    small = [None if t is None else t.to(dtype) for t in (down, factors.mix, up, factors.bias)]
    again = None if source is None or not torch.is_grad_enabled() else source[1]
    kept = source[0].detach() if source is not None and again is not None else None
    how = _How(factors.drop_mixed and factors.mix is not None, rows, again)
    result = _AddLowRank.apply(x.to(dtype), None if onto is x else onto, kept, *small, keep, how)
    return result if result.dtype == onto.dtype else result.to(onto.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which products with `x` are computed: autocast's where it acts on such a tensor."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def keep_mask(tokens: int, features: int, rate: float, device: torch.device) -> tuple[Tensor, float]:
    """Return which features to keep, bool [tokens, features], and the chance that one is kept.

    On a CPU a draw of 64 bits decides on four features, each with a chance that is `1 - rate` to 1/65536: torch's own
    dropout draws for every feature, which takes as long as all else that is done to it.
    """
    if device.type != "cpu":
        return torch.rand(tokens, features, device=device) >= rate, 1 - rate
    count = tokens * features
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(rate * 65536), 65535)
    keep = words.view(torch.int16)[:count].view(tokens, features) >= dropped - 32768
    return keep, 1 - dropped / 65536


class _AddLowRank(torch.autograd.Function):
    """`add_low_rank` on tensors of one precision; `onto` None is x itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        onto: Tensor | None,
        source: Tensor | None,
        down: Tensor,
        mix: Tensor | None,
        up: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        how: _How,
    ) -> Tensor:
        hidden = (x.reshape(-1, len(down)) @ down).view(x.shape[:-1].numel(), -1)
        if keep is not None and not how.drop_mixed:
            hidden.mul_(keep)
        mixed = _mixed(hidden, mix, keep, how).view(-1, len(up))
        ctx.how, ctx.shape, ctx.apart = how, x.shape, onto is not None
        ctx.save_for_backward(x if source is None else source, down, mix, up, bias, keep, hidden)
        target = x if onto is None else onto
        if how.rows is not None:
            # Not marked as changed in place: a linear layer's output is a view, and autograd would then copy the
            # gradient of all its rows. `data` is the same memory as another tensor.
            result = target.data
            _add_product(result.view(-1, result.shape[-1])[:, slice(*how.rows)], mixed, up, bias)
            return result
        if target.dtype == x.dtype:
            result = torch.addmm(target.reshape(-1, up.shape[1]), mixed, up)
            result = torch.ops.aten._unsafe_view(result, target.shape)  # a view could not be changed in place later
        else:
            result = target + (mixed @ up).view(target.shape)
        return result if bias is None else result.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, mix, up, bias, keep, hidden = ctx.saved_tensors
        how, needs = ctx.how, ctx.needs_input_grad
        if how.again is not None and needs[3]:
            x = how.again(x).to(hidden.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        rows = (rows if how.rows is None else rows[:, slice(*how.rows)]).to(hidden.dtype)
        wide = rows.reshape(-1, up.shape[1])
        mixed = _mixed(hidden, mix, keep, how)
        d_up = mixed.view(-1, len(up)).T @ wide if needs[5] else None
        d_bias = rows.sum(0) if bias is not None and needs[6] else None
        d_mixed = (wide @ up.T).view(len(hidden), -1)
        if keep is not None and how.drop_mixed:
            d_mixed.mul_(keep)
        d_mix = hidden.T @ d_mixed if mix is not None and needs[4] else None
        d_hidden = d_mixed if mix is None else d_mixed @ mix.T
        if keep is not None and not how.drop_mixed:
            d_hidden.mul_(keep)
        d_hidden = d_hidden.view(-1, down.shape[1])
        d_down = x.reshape(-1, len(down)).T @ d_hidden if needs[3] else None
        d_x = None
        if needs[0] and ctx.apart:
            d_x = d_hidden @ down.T
        elif needs[0]:
            d_x = torch.addmm(rows.reshape(-1, len(down)), d_hidden, down.T)
        d_x = None if d_x is None else d_x.view(ctx.shape)
        return d_x, gradient if needs[1] else None, None, d_down, d_mix, d_up, d_bias, None, None


def _mixed(hidden: Tensor, mix: Tensor | None, keep: Tensor | None, how: _How) -> Tensor:
    """Hidden features behind the mixing, dropped there if that is the place."""
    mixed = hidden if mix is None else hidden @ mix
    return mixed.mul_(keep) if keep is not None and how.drop_mixed else mixed


def _add_product(rows: Tensor, mixed: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """Add the last product to rows of a tensor, in place."""
    blocks = rows.view(-1, up.shape[1]) if rows.is_contiguous() else rows
    if up.shape[1] == blocks.shape[1] and up.dtype == rows.dtype:
        blocks.addmm_(mixed, up)
    else:
        rows.add_((mixed @ up).view(rows.shape))
    if bias is not None:
        rows.add_(bias)
