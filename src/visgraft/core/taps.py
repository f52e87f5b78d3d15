"""Taps: reading and rewriting the tensor of a site with forward hooks.

Every hook is an object of a module-level class that holds what it needs, so that deepcopy and pickle carry it along
(closures and lambdas do not survive them). State-dict keys are left as they are. However a backbone lays out its
features, what an act sees are tokens [B, N, C]; the hook puts what comes back into the backbone's own shape.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.core.low_rank import LowRank, add_low_rank, add_product, compute_dtype, hidden_features
from visgraft.core.method import Grid, Method, TokenMethod
from visgraft.core.sites import Site

Act = Callable[[Tensor, Tensor, Grid], Tensor]
"""act(value, onto, grid) -> what replaces `onto`. `value` is the site's tensor; `onto` is the same, or the part of it
to which can be added (the branch, at `stream.mid`; the projection without its bias, where that is added apart)."""


class Lens:
    """How a site's tensor is seen as tokens.

    What only linear layers read is handed over in the precision in which they compute, so that it is converted once.
    """

    def __init__(self, site: Site) -> None:
        self.grid, self.channels_first, self.only_multiplied = site.grid, site.channels_first, bool(site.feeds)

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
        if self.only_multiplied:
            onto = onto.to(compute_dtype(onto))
        seen = self.tokens(onto)
        value = seen if missing is None or isinstance(act, Add) else self.tokens(missing + onto)
        new = act(value, seen, self.grid_of(onto))
        return onto if new is seen else self.restored(new, onto)


class Kept(threading.local):
    """What one hook hands to a later one of the same forward, a tensor or more; never copied, never stored.

    Each thread sees its own, so that forwards in several threads do not meet.
    """

    tensor: Any = None

    def take(self) -> Any:
        """Return what was kept and forget it, so that no memory is held after the forward."""
        tensor, self.tensor = self.tensor, None
        if tensor is None:
            raise RuntimeError("a site was read before its tensor passed; the dry run should have refused this model")
        return tensor

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


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
        if isinstance(self.act, Add) and output.ndim == 3 and type(module) is nn.Linear:
            # A fresh tensor, so that it can be added to in place.
            return self.act.to_rows(output, self.lens.grid_of(output), self.rows)
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


class NormInput:
    """A norm and the kept tensor it read: what a tensor is computed from again."""

    def __init__(self, norm: nn.Module, kept: Kept, lens: Lens) -> None:
        self.norm, self.kept, self.lens = norm, kept, lens

    def take(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the norm's input, and the function that makes the site's tokens of it."""
        x = self.kept.take()
        kind = x.device.type
        cast: Any = contextlib.nullcontext()
        if not x.is_meta:  # which has no autocast
            cast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def again(x: Tensor) -> Tensor:
            with cast:
                return self.lens.tokens(self.norm.forward(x))

        return x, again


def factors_of(method: Method) -> LowRank | None:
    """The method's map as factors; None where it has none, or where its plain form is wanted.

    That is where somebody's hook waits for the module's call, and where a tracer runs (`torch.jit.trace`,
    `torch.export`, the transforms of `torch.func`), which knows no backward pass of our own.
    """
    return None if _is_watched(method) or is_traced() else method.low_rank()


def _is_watched(method: Method) -> bool:
    """Whether somebody's hook waits for the module's call."""
    return bool(method._forward_pre_hooks or method._forward_hooks or method._backward_hooks)


def rewritten(method: Method, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
    """Return `onto` plus what the method makes of `value`, in its plain form.

    A tracer gets the products of the factors where there are any: exported, they run two to three times as fast as what
    a `delta` with einsum becomes.
    """
    factors = method.low_rank() if is_traced() and not _is_watched(method) else None
    if factors is None or factors.dropout:
        return method(value, onto, grid)
    return onto + factors.delta(value).to(onto.dtype)


def is_traced() -> bool:
    """Whether a tracer runs that cannot take a backward pass of our own; `torch.compile` can."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


class Apply:
    """Act that lets a method read and rewrite one site; a low-rank map in fewer passes over the features."""

    def __init__(self, method: Method, source: NormInput | None = None) -> None:
        self.method, self.source = method, source

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        source = None if self.source is None else self.source.take()
        factors = factors_of(self.method)
        if factors is None:
            return rewritten(self.method, value, onto, grid)
        return add_low_rank(value, onto, factors, source)


class Read:
    """Act that keeps what methods read at one site for `Add` at others: of low-rank maps the hidden features.

    Maps with equally wide blocks read the site in one product, so that several cost as many passes over it as one.
    """

    def __init__(self, source: NormInput | None = None) -> None:
        self.source = source
        self.readers: list[tuple[Method, Kept]] = []

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        source = None if self.source is None else self.source.take()
        passed_on = value
        alike: dict[int, list[tuple[LowRank, Kept]]] = {}
        for method, kept in self.readers:
            factors = factors_of(method)
            if factors is None:
                kept.tensor = value, None
            else:
                alike.setdefault(len(factors.down), []).append((factors, kept))
        for pairs in alike.values():
            passed_on, hidden = hidden_features(passed_on, [factors for factors, _ in pairs], source)
            for (factors, kept), one in zip(pairs, hidden, strict=True):
                kept.tensor = one, factors
        return passed_on if value is onto else onto


class Add:
    """Act that adds to one site what a method makes of what `Read` kept at another."""

    def __init__(self, method: Method, kept: Kept) -> None:
        self.method, self.kept = method, kept

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        read, factors = self.kept.take()
        return rewritten(self.method, read, onto, grid) if factors is None else add_product(onto, read, factors)

    def to_rows(self, output: Tensor, grid: Grid, rows: tuple[int, int] | None) -> Tensor:
        """Add to rows of the last axis of a linear output (None: all), in place where the map is of low rank."""
        read, factors = self.kept.take()
        if factors is not None:
            return add_product(output, read, factors, rows or (0, output.shape[-1]))
        if rows is None:
            return rewritten(self.method, read, output, grid)
        start, stop = rows
        new = rewritten(self.method, read, output[..., start:stop], grid)
        return torch.cat((output[..., :start], new, output[..., stop:]), dim=-1)


class Insert:
    """Act that lets a method insert tokens."""

    def __init__(self, method: TokenMethod) -> None:
        self.method = method

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return self.method.insert(value, grid)


class Remove:
    """Act that lets a method take its tokens out again."""

    def __init__(self, method: TokenMethod) -> None:
        self.method = method

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        return self.method.remove(value, grid)


class ForgetHook:
    """Forward hook on the whole model that lets go of what is still kept, as after an exception in between."""

    def __init__(self, kept: list[Kept]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():  # nothing is kept beyond a graph
            for kept in self.kept:
                kept.tensor = None


class Taps:
    """Hooks on the sites of one model, and what they hand to each other within a forward."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.kept: list[Kept] = []

    def keep(self) -> Kept:
        """Return a place for what one hook hands to a later one."""
        self.kept.append(Kept())
        return self.kept[-1]

    def put(self, model: nn.Module, site: Site, act: Act) -> None:
        """Hook `act` to a site."""
        host, lens = model.get_submodule(site.host), Lens(site)
        if site.side == "input":
            self.handles.append(host.register_forward_pre_hook(InputHook(act, lens)))
        elif site.side == "output":
            attention = model.get_submodule(site.separate_bias) if site.separate_bias else None
            self.handles.append(host.register_forward_hook(OutputHook(act, lens, site.rows, attention)))
        else:
            assert site.entry is not None
            kept = self._keep_input(model, site.entry)
            self.handles.append(host.register_forward_hook(ResidualHook(act, lens, kept)))

    def source(self, model: nn.Module, site: Site) -> NormInput | None:
        """Keep what the norm reads whose output a site's tensor is; None where it is no norm's."""
        if site.norm is None:
            return None
        return NormInput(model.get_submodule(site.norm), self._keep_input(model, site.norm), Lens(site))

    def _keep_input(self, model: nn.Module, path: str) -> Kept:
        kept = self.keep()
        self.handles.append(model.get_submodule(path).register_forward_pre_hook(KeepInputHook(kept)))
        return kept

    def forget_after_forward(self, model: nn.Module) -> None:
        """Let nothing be kept beyond a forward of the whole model, even where that ends in an exception."""
        if self.kept:
            self.handles.append(model.register_forward_hook(ForgetHook(self.kept), always_call=True))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
