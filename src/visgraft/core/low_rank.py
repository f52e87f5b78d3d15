"""Adding a low-rank map to features in few passes over them, with a backward pass of its own.

A step spends its time in the frozen backbone's products; what a low-rank branch adds to them is small in arithmetic,
and what makes it slow is how often the features are read and written. Here the branch is added by the last small
product itself, its gradients come from products only, and what it read is not kept where it can be computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visgraft.core.draws import rows_to_draw


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


Recomputed = tuple[Tensor, Callable[[Tensor], Tensor]]
"""A tensor that is kept for the backward pass instead of another, and the function that makes the other of it."""


def add_low_rank(x: Tensor, onto: Tensor, factors: LowRank, source: Recomputed | None = None) -> Tensor:
    """Return `onto` [..., b q] plus the low-rank map of `x` [..., a p]; they may be the same tensor."""
    same = onto is x
    x, [hidden] = hidden_features(x, [factors], source)
    return add_product(x if same else onto, hidden, factors)


def hidden_features(
    x: Tensor, maps: Sequence[LowRank], source: Recomputed | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return `x` itself and x D [tokens, a k] of each map, all with blocks of as many channels, in one product.

    What uses `x` from there on hands its gradient to the same product as the hidden features: added by autograd, it
    would cost two passes over the features.

    Args:
        x: the tensor read [..., a p].
        maps: the maps that read it.
        source: what to keep in place of x, and how to make x of it.
    """
    dtype = compute_dtype(x)
    down = torch.cat([one.down for one in maps], 1) if len(maps) > 1 else maps[0].down
    kept, again = (None, None) if source is None or not torch.is_grad_enabled() else (source[0].detach(), source[1])
    cast = None if x.dtype == dtype else x.to(dtype)
    x, hidden = _Hidden.apply(x, cast, kept, down.to(dtype), again)
    if len(maps) == 1:
        return x, (hidden,)
    parts = hidden.view(len(hidden), -1, down.shape[1]).split([one.down.shape[1] for one in maps], -1)
    return x, tuple(part.flatten(1) for part in parts)


def add_product(onto: Tensor, hidden: Tensor, factors: LowRank, rows: tuple[int, int] | None = None) -> Tensor:
    """Return `onto` [..., b q] plus s drop(hidden) M U + b, in one pass over it.

    With `rows`, those of its last axis are added to in place; `onto` must then be a tensor nobody else needs.
    """
    keep, chance, late = None, 1.0, factors.drop_mixed and factors.mix is not None
    if factors.dropout:
        width = factors.mix.shape[1] if late and factors.mix is not None else hidden.shape[1]
        keep, chance = keep_mask(len(hidden), width, factors.dropout, hidden.device)
    # On the small factor, because on the features it would cost a pass over them.
    up = factors.up * (factors.scale / chance)
    small = [None if t is None else t.to(hidden.dtype) for t in (factors.mix, up, factors.bias)]
    return _Product.apply(onto, hidden, *small, keep, late, rows)


def add_by_rows(onto: Tensor, hidden: Tensor, up: Tensor, bias: Tensor | None = None, in_place: bool = False) -> Tensor:
    """Return `onto` [B, N, C] plus hidden features [B, N, k] by a factor [B, k, C] and a bias [B, C] of each image.

    With `in_place`, `onto` may be rewritten.
    """
    if bias is not None:  # as one more hidden feature, so that it takes no pass of its own
        hidden = torch.cat((hidden, hidden.new_ones(*hidden.shape[:-1], 1)), -1)
        up = torch.cat((up, bias.unsqueeze(1)), 1)
    if onto.dtype != hidden.dtype:
        # A sum of two precisions is no vectorised pass on a CPU, and autocast would round `onto`.
        wide = torch.promote_types(onto.dtype, hidden.dtype)
        with torch.autocast(onto.device.type, enabled=False):
            hidden, up = hidden.to(wide), up.to(wide)
            if in_place and onto.dtype == wide:
                return onto.baddbmm_(hidden, up)
            return torch.baddbmm(onto.to(wide), hidden, up)
    return onto.baddbmm_(hidden, up.to(hidden.dtype)) if in_place else torch.baddbmm(onto, hidden, up)


def linear_by_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return F.linear of x [B, N, C] by a weight [B, k, C] and a bias [B, k] of each image, in F.linear's precision.

    A product in a wider one would widen the stream that it is added to, and so every later pass over it.
    """
    to = compute_dtype(x)
    return torch.baddbmm(bias.unsqueeze(1).to(to), x.to(to), weight.mT.to(to))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which products with `x` are computed: autocast's where it acts on such a tensor."""
    kind = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(kind):  # no autocast on the meta device
        return x.dtype
    return torch.get_autocast_dtype(kind)


def keep_mask(tokens: int, features: int, rate: float, device: torch.device) -> tuple[Tensor, float]:
    """Return a mask for `masked`, int8 [tokens, features], and the chance that a feature is kept.

    On a CPU a draw of 64 bits decides on four features, each with a chance that is `1 - rate` to 1/65536: torch's own
    dropout draws for every feature, which takes as long as all else that is done to it.
    """
    drawn, own = rows_to_draw(tokens)
    if device.type != "cpu":
        return (torch.rand(drawn, features, device=device)[own] >= rate).to(torch.int8).neg_(), 1 - rate
    count = drawn * features
    words = torch.empty((count + 3) // 4, dtype=torch.int64)
    if torch.compiler.is_compiling():  # where the faster `random_` of all bits is not known
        words = torch.randint_like(words, -(2**63), 2**63 - 1)
    else:
        words.random_(-(2**63), None)
    dropped = min(round(rate * 65536), 65535)
    keep = words.view(torch.int16)[:count].view(drawn, features)[own].ge_(dropped - 32768)
    return keep.to(torch.int8).neg_(), 1 - dropped / 65536


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` with zeros where the mask, int8, is 0, and as it is where all its bits are set.

    The numbers are taken as whole ones, bit by bit: on a CPU, `where` takes several times as long.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(whole) & mask).view(x.dtype)


class _Hidden(torch.autograd.Function):
    """(x, x D) of x, what it is in D's precision (None: itself) and D.

    With `again`, the source is kept and x is made of it anew in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cast: Tensor | None,
        source: Tensor | None,
        down: Tensor,
        again: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.again, ctx.shape, ctx.direct = again, x.shape, cast is None
        cast = x if cast is None else cast
        ctx.save_for_backward(cast if source is None else source, down)
        return x, _narrow(cast.reshape(-1, len(down)), down.T.contiguous()).view(x.shape[:-1].numel(), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor | None, d_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        if d_hidden is None:
            return d_x, None, None, None, None
        blocks, d_down = d_hidden.view(-1, down.shape[1]), None
        if ctx.needs_input_grad[3]:
            x = x if ctx.again is None else ctx.again(x).to(down.dtype)
            d_down = (blocks.T @ x.reshape(-1, len(down))).T  # the narrow factor first: up to three times as fast
        if not any(ctx.needs_input_grad[:2]):
            return None, None, None, d_down, None
        if ctx.direct and d_x is not None:
            return torch.addmm(d_x.reshape(-1, len(down)), blocks, down.T).view(d_x.shape), None, None, d_down, None
        d_cast = (blocks @ down.T).view(ctx.shape)
        return (d_cast, None, None, d_down, None) if ctx.direct else (d_x, d_cast, None, d_down, None)


class _Product(torch.autograd.Function):
    """onto + drop(hidden) M U + b, with the dropout behind M if it is `late`."""

    @staticmethod
    def forward(
        ctx: Any,
        onto: Tensor,
        hidden: Tensor,
        mix: Tensor | None,
        up: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        late: bool,
        rows: tuple[int, int] | None,
    ) -> Tensor:
        if keep is not None and not late:
            hidden = masked(hidden, keep)
        mixed = _mixed(hidden, mix, keep, late).view(-1, len(up))
        ctx.late, ctx.rows = late, rows
        ctx.save_for_backward(mix, up, bias, keep, hidden)
        if rows is not None:
            # Not marked as changed in place: a linear layer's output is a view, and autograd would then copy the
            # gradient of all its rows. `data` is the same memory as another tensor.
            result = onto.data
            _add_product(result.view(-1, result.shape[-1])[:, slice(*rows)], mixed, up, bias)
            return result
        if onto.dtype == mixed.dtype:
            result = torch.addmm(onto.reshape(-1, up.shape[1]), mixed, up)
            # Because a view could not be changed in place later.
            result = torch.ops.aten._unsafe_view.default(result, onto.shape)
        else:
            result = onto + (mixed @ up).view(onto.shape)
        if bias is None:
            return result
        # In place, a compiled one loses all gradients on torch 2.11; the compiler makes one pass of it anyway.
        return result + bias if torch.compiler.is_compiling() else result.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mix, up, bias, keep, hidden = ctx.saved_tensors
        late, needs = ctx.late, ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        rows = (rows if ctx.rows is None else rows[:, slice(*ctx.rows)]).to(hidden.dtype)
        wide = rows.reshape(-1, up.shape[1])
        d_up = _mixed(hidden, mix, keep, late).view(-1, len(up)).T @ wide if needs[3] else None
        d_bias = rows.sum(0) if bias is not None and needs[4] else None
        d_hidden = _narrow(wide, up).view(len(hidden), -1)
        d_mix = None
        if keep is not None and late:
            d_hidden = masked(d_hidden, keep)
        if mix is not None:
            d_mix = hidden.T @ d_hidden if needs[2] else None
            d_hidden = d_hidden @ mix.T
        if keep is not None and not late:
            d_hidden = masked(d_hidden, keep)
        return gradient, d_hidden, d_mix, d_up, d_bias, None, None, None


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """Return x Fᵀ [N, k] of x [N, p] and a small F [k, p].

    To few columns, MKL is up to three times as fast with F laid out like this and, where rows of x lie apart, with the
    product turned round.
    """
    if len(factor) < 16 and x.dtype == torch.float32 and not x.is_contiguous():
        return (factor @ x.T).T.contiguous()
    return x @ factor.T


def _mixed(hidden: Tensor, mix: Tensor | None, keep: Tensor | None, late: bool) -> Tensor:
    """Hidden features behind the mixing, dropped there if that is the place."""
    mixed = hidden if mix is None else hidden @ mix
    return masked(mixed, keep) if keep is not None and late else mixed


def _add_product(rows: Tensor, mixed: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """Add the last product to rows of a tensor, in place."""
    blocks = rows.view(-1, up.shape[1]) if rows.is_contiguous() else rows
    if up.shape[1] == blocks.shape[1] and up.dtype == rows.dtype:
        blocks.addmm_(mixed, up)
    else:
        rows.add_((mixed @ up).view(rows.shape))
    if bias is not None:
        rows.add_(bias)
