"""Taps: reading and rewriting the tensor of a site with forward hooks.

Every hook is an object of a module-level class that holds what it needs, so that deepcopy and pickle carry it along
(closures and lambdas do not survive them). State-dict keys are left as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.method import Grid, Method
from visgraft.sites import Site

Act = Callable[[Tensor, Tensor], Tensor]
"""act(value, onto) -> what replaces `onto`; for all sites but `stream.mid` both are the same tensor."""


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

    def __init__(self, act: Act) -> None:
        self.act = act

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.act(args[0], args[0]), *args[1:])


class KeepInputHook:
    """Forward pre-hook: keep the module's first input for a later hook."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.kept.tensor = args[0]


class OutputHook:
    """Forward hook: hand the module's output, or some rows of its last axis, to `act`."""

    def __init__(self, act: Act, rows: tuple[int, int] | None) -> None:
        self.act, self.rows = act, rows

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.rows is None:
            return self.act(output, output)
        start, stop = self.rows
        part = output[..., start:stop]
        new = self.act(part, part)
        if new is part:
            return output
        return torch.cat((output[..., :start], new, output[..., stop:]), dim=-1)


class ResidualHook:
    """Forward hook on the module that ends a residual branch.

    With x the block's input and a the branch, `act(x + a, a)` returns a plus what is added to the stream, and the
    block's own x + a then is the adapted stream.
    """

    def __init__(self, act: Act, entry: Kept) -> None:
        self.act, self.entry = act, entry

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.act(self.entry.take() + output, output)


class Apply:
    """Act that lets a method read and rewrite one site."""

    def __init__(self, method: Method, grid: Grid) -> None:
        self.method, self.grid = method, grid

    def __call__(self, value: Tensor, onto: Tensor) -> Tensor:
        return self.method(value, onto, self.grid)


class Keep:
    """Act that keeps the tensor of one site for `ApplyKept` at another."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __call__(self, value: Tensor, onto: Tensor) -> Tensor:
        self.kept.tensor = value
        return onto


class ApplyKept:
    """Act that adds to one site what a method makes of the tensor kept from another."""

    def __init__(self, method: Method, grid: Grid, kept: Kept) -> None:
        self.method, self.grid, self.kept = method, grid, kept

    def __call__(self, value: Tensor, onto: Tensor) -> Tensor:
        return self.method(self.kept.take(), onto, self.grid)


def tap(model: nn.Module, site: Site, act: Act) -> list[Any]:
    """Hook `act` to a site and return the handles that remove it again."""
    host = model.get_submodule(site.host)
    if site.side == "input":
        return [host.register_forward_pre_hook(InputHook(act))]
    if site.side == "output":
        return [host.register_forward_hook(OutputHook(act, site.rows))]
    assert site.entry is not None
    kept = Kept()
    entry = model.get_submodule(site.entry).register_forward_pre_hook(KeepInputHook(kept))
    return [entry, host.register_forward_hook(ResidualHook(act, kept))]
