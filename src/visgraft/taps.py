"""Taps: reading and rewriting the tensor of a site with forward hooks.

Every hook is an object of a module-level class that holds what it needs, so that deepcopy and pickle carry it along
(closures and lambdas do not survive them). State-dict keys are left as they are. However a backbone lays out its
features, what an act sees are tokens [B, N, C]; the hook puts what comes back into the backbone's own shape.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.method import Grid, Method
from visgraft.sites import Site

Act = Callable[[Tensor, Tensor, Grid], Tensor]
"""act(value, onto, grid) -> what replaces `onto`. `value` is the site's tensor; `onto` is the same, or the part of it
to which can be added (the branch, at `stream.mid`; the projection without its bias, where that is added apart)."""


class Lens:
    """How a site's tensor is seen as tokens."""

    def __init__(self, grid: Grid | None, channels_first: bool) -> None:
        self.grid, self.channels_first = grid, channels_first

    def tokens(self, x: Tensor) -> Tensor:
        """View [B, N, C], [B, H, W, C], [B, C, H, W] (channels first) or [B, C] as [B, N, C]."""
        if self.channels_first:
            x = x.movedim(1, -1)
        if x.ndim == 2:
            return x.unsqueeze(1)
        return x if x.ndim == 3 else x.flatten(1, -2)

    def restored(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Undo `tokens`; tokens that were inserted stay."""
        if like.ndim == 2:
            return tokens.squeeze(1)
        if like.ndim == 3:
            return tokens
        if self.channels_first:
            return tokens.unflatten(1, like.shape[2:]).movedim(-1, 1)
        return tokens.unflatten(1, like.shape[1:-1])

    def grid_of(self, x: Tensor) -> Grid:
        """How the tokens of this tensor lie."""
        if x.ndim == 4:
            height, width = x.shape[2:] if self.channels_first else x.shape[1:3]
            return Grid(height, width, 0)
        if x.ndim == 2 or self.grid is None:
            return Grid(1, 1, 0)
        return self.grid

    def act(self, act: Act, onto: Tensor, missing: Tensor | None = None) -> Tensor:
        """Let an act rewrite a tensor; one that comes back as it was is handed on untouched.

        Where the site's tensor is `missing + onto`, the act reads the sum, but adds to `onto`.
        """
        seen = self.tokens(onto)
        value = seen if missing is None or isinstance(act, ApplyKept) else self.tokens(missing + onto)
        new = act(value, seen, self.grid_of(onto))
        return onto if new is seen else self.restored(new, onto)


class Kept:
    """One tensor handed from one hook to a later one of the same forward; never copied, never stored."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def take(self) -> Tensor:
        """Return the tensor and forget it, so that no memory is held after the forward."""
        tensor, self.tensor = self.tensor, None
        if tensor is None:
            raise RuntimeError("a site was read before its tensor passed; the dry run should have refused this model")
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {"tensor": None}


class InputHook:
    """Forward pre-hook: hand the module's first input to `act` and pass on what comes back."""

    def __init__(self, act: Act, lens: Lens) -> None:
        self.act, self.lens = act, lens

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.lens.act(self.act, args[0]), *args[1:])


class KeepInputHook:
    """Forward pre-hook: keep the module's first input for a later hook."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.kept.tensor = args[0]


class OutputHook:
    """Forward hook: hand the module's output, or some rows of its last axis, to `act`.

    `attention` adds the bias behind the module, which the act reads as well.
    """

    def __init__(self, act: Act, lens: Lens, rows: tuple[int, int] | None, attention: Any = None) -> None:
        self.act, self.lens, self.rows, self.attention = act, lens, rows, attention

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = None
        if self.attention is not None:
            bias = torch.cat((self.attention.q_bias, self.attention.k_bias, self.attention.v_bias))
        if self.rows is None:
            return self.lens.act(self.act, output, bias)
        start, stop = self.rows
        part = output[..., start:stop]
        new = self.lens.act(self.act, part, None if bias is None else bias[start:stop])
        if new is part:
            return output
        return torch.cat((output[..., :start], new, output[..., stop:]), dim=-1)


class ResidualHook:
    """Forward hook on the module that ends a residual branch, the first time that it runs in a forward.

    With x the block's input and a the branch, `act(x + a, a)` returns a plus what is added to the stream, and the
    block's own x + a then is the adapted stream.
    """

    def __init__(self, act: Act, lens: Lens, entry: Kept) -> None:
        self.act, self.lens, self.entry = act, lens, entry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.entry.tensor is None:
            return output  # the second run: the module ends the other branch as well
        return self.lens.act(self.act, output, self.entry.take())


class Apply:
    """Act that lets a method read and rewrite one site."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return self.method(value, onto, grid)


class Keep:
    """Act that keeps the tensor of one site for `ApplyKept` at another."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        self.kept.tensor = value
        return onto


class ApplyKept:
    """Act that adds to one site what a method makes of the tensor kept from another."""

    def __init__(self, method: Method, kept: Kept) -> None:
        self.method, self.kept = method, kept

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return self.method(self.kept.take(), onto, grid)


class Insert:
    """Act that lets a method insert tokens."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return self.method.insert(value, grid)


class Remove:
    """Act that lets a method take its tokens out again."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return self.method.remove(value, grid)


def tap(model: nn.Module, site: Site, act: Act) -> list[Any]:
    """Hook `act` to a site and return the handles that remove it again."""
    host, lens = model.get_submodule(site.host), Lens(site.grid, site.channels_first)
    if site.side == "input":
        return [host.register_forward_pre_hook(InputHook(act, lens))]
    if site.side == "output":
        attention = model.get_submodule(site.separate_bias) if site.separate_bias else None
        return [host.register_forward_hook(OutputHook(act, lens, site.rows, attention))]
    assert site.entry is not None
    kept = Kept()
    entry = model.get_submodule(site.entry).register_forward_pre_hook(KeepInputHook(kept))
    return [entry, host.register_forward_hook(ResidualHook(act, lens, kept))]
