"""The dry run: one forward of a copy on the meta device that proves every site sits where its row says.

Counting firings is not enough: a hook in the wrong place fires just as often. So identity is proven as well: the
tensor that leaves a site *is* the one that the linear layers it names multiply, and the one that enters the site *is*
what it says produced it. In between a tensor may be rolled, padded, cut into windows and laid out anew, as long as
its channels stay whole and in order; that is proven by doing the same to a tensor that holds the channels' numbers.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visgraft.backbones.input_size import input_size
from visgraft.core.method import Grid
from visgraft.core.sites import Neighbour, Site
from visgraft.core.taps import Taps
from visgraft.errors import SiteError

REARRANGEMENTS = {
    "roll", "pad", "view", "reshape", "permute", "transpose", "contiguous", "flatten", "unflatten", "movedim",
    "squeeze", "unsqueeze", "__getitem__", "clone",
}  # fmt: skip
ADDITIONS = {"add", "__add__", "__radd__"}
PRODUCTS = {"linear", "conv2d"}


class _Recorder:
    """Act that replaces the tensor of its site by a clone and remembers both."""

    def __init__(self) -> None:
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        self.entered.append(onto)
        self.left.append(onto.clone())
        return self.left[-1]


class _Trace(TorchFunctionMode):
    """Remembers additions, rearrangements, and what each linear layer multiplied and returned.

    Layers are known by their weight, so that one whose weight is used without calling it is seen as well.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.added: list[tuple[Any, Any, Tensor]] = []
        self.moved: dict[int, tuple[Tensor, Tensor, Any, tuple[Any, ...], dict[str, Any]]] = {}
        self.seen: dict[str, list[Tensor]] = {}
        self.weights = {id(m.weight): path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = _shape_only(name, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if name in ADDITIONS:
            self.added.append((args[0], args[1], result))
        elif name in REARRANGEMENTS and isinstance(result, Tensor) and result is not args[0]:
            self.moved[id(result)] = (result, args[0], func, args[1:], kwargs)
        elif name in PRODUCTS:
            path = self.weights.get(id(kwargs.get("weight", args[1] if len(args) > 1 else None)))
            if path is not None:
                self.note(f"{path} input", args[0])
                self.note(f"{path} output", result)
        return result

    def note(self, key: str, tensor: Tensor) -> None:
        """Remember a tensor under a key."""
        self.seen.setdefault(key, []).append(tensor)

    def only(self, key: str) -> Tensor | None:
        """Return the tensor seen under a key; None unless there was exactly one."""
        found = self.seen.get(key, [])
        return found[0] if len(found) == 1 else None

    def watch_input(self, path: str) -> None:
        """Remember what enters a module."""
        hook = self.model.get_submodule(path).register_forward_pre_hook
        hook(lambda _, args: self.note(f"{path} input", args[0]))

    def watch_output(self, path: str) -> None:
        """Remember what leaves a module."""
        hook = self.model.get_submodule(path).register_forward_hook
        hook(lambda _, __, output: self.note(f"{path} output", output))

    def last_channels(self, tensor: Tensor) -> Tensor:
        """Return a [B, C, H, W] tensor with its channels last, remembering where it came from."""
        with self:
            return tensor.movedim(1, -1)

    def carries(self, tensor: Tensor | None, root: Tensor | None, axis: int = -1) -> bool:
        """Whether a tensor is `root` (channels along `axis`), or holds it rearranged with whole channels, last."""
        steps = []
        while tensor is not None and tensor is not root and id(tensor) in self.moved:
            _, tensor, func, args, kwargs = self.moved[id(tensor)]
            steps.append((func, args, kwargs))
        if tensor is None or tensor is not root:
            return False
        if not steps:
            return True
        count = root.shape[axis]
        numbers = torch.arange(1, count + 1, dtype=torch.int32)
        shadow = numbers.view([count if i == axis % root.ndim else 1 for i in range(root.ndim)]).expand(root.shape)
        for func, args, kwargs in reversed(steps):
            shadow = func(shadow, *args, **kwargs)
        # Zeros are padding.
        return shadow.shape[-1] == count and bool(((shadow == numbers) | (shadow == 0)).all())


def _shape_only(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a function makes of meta tensors where its shape is plain to see, else None.

    The meta kernels of these are written in Python on top of further ones, and are most of what a dry run takes.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    # One that holds data shows that the model refers to a tensor outside itself, which the function itself refuses.
    if not (tensors and args and tensors[0] is args[0] and all(tensor.is_meta for tensor in tensors)):
        return None
    x, contiguous = tensors[0], all(tensor.is_contiguous() for tensor in tensors)
    shape: Sequence[int] | None = None
    if name == "scaled_dot_product_attention" and len(args) == 3:
        shape = (*x.shape[:-1], args[2].shape[-1])
    elif (name == "layer_norm" or (name == "gelu" and len(args) == 1)) and contiguous:
        shape = x.shape
    elif name == "linear" and contiguous and x.ndim > 1 and x.shape[-1] == tensors[1].shape[-1]:
        shape = (*x.shape[:-1], len(tensors[1]))
    elif name in ADDITIONS and contiguous and [tensor.shape for tensor in tensors] == [x.shape] * 2 and not kwargs:
        shape = x.shape
    same = len({tensor.dtype for tensor in tensors}) == 1
    return None if shape is None or not same else x.new_empty(shape)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose tensors are on the meta device, without copying any data."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def prove_sites(model: nn.Module, sites: Sequence[Site]) -> None:
    """Run a meta copy of the plain model once and check that every given site is where its row says.

    Raises:
        SiteError: a site does not fire as often as its row says, or its tensor is not the one its neighbours see.
    """
    model = meta_copy(model).eval()
    for attention in {site.separate_bias for site in sites if site.separate_bias}:
        setattr(model.get_submodule(attention), "qkv_bias_separate", True)  # noqa: B010
    trace, recorders, taps = _Trace(model), [_Recorder() for _ in sites], Taps()
    made_by = {site.produced_by.path for site in sites if site.produced_by} | {site.norm for site in sites if site.norm}
    for path in made_by:
        if not isinstance(model.get_submodule(path), nn.Linear | nn.Conv2d):
            trace.watch_output(path)
    for site, recorder in zip(sites, recorders, strict=True):
        taps.put(model, site, recorder)
    # Registered after the taps, so that they see what the taps pass on.
    for path in {path for site in sites for path in (site.entry, site.next) if path}:
        trace.watch_input(path)
    for path in {site.host for site in sites if site.side == "residual"}:
        trace.watch_output(path)
    _run(model, trace)
    for site, recorder in zip(sites, recorders, strict=True):
        _check(model, site, recorder, trace)


def _run(model: nn.Module, trace: _Trace) -> None:
    """Run two images without data through the model while the trace looks on."""
    like = next(model.parameters())
    images = torch.empty(2, *input_size(model), device="meta", dtype=like.dtype)
    try:
        with torch.no_grad(), trace:
            model(images)
    except (RuntimeError, NotImplementedError) as error:
        raise SiteError(
            f"{type(model).__name__} does not run on the meta device ({str(error).strip().splitlines()[0]}), so the "
            "places of its sites cannot be proven; use timm's own model, without a replaced forward"
        ) from error


def _check(model: nn.Module, site: Site, recorder: _Recorder, trace: _Trace) -> None:
    """Raise a SiteError unless the site fired once and its tensors are those of its neighbours."""
    where = f"the site {site.name}{'' if site.block is None else f' of block {site.block}'} ("
    where += f"{type(model).__name__}, {site.host})"
    runs = len(trace.seen.get(f"{site.host} output", [])) if site.side == "residual" else site.calls
    if len(recorder.left) != 1 or runs != site.calls:
        raise SiteError(
            f"{where} passed {len(recorder.left)} times in one forward instead of once; "
            "this model bypasses or repeats the module, so no method can be attached there"
        )
    entered, left = recorder.entered[0], recorder.left[0]
    if left.shape[-1] != site.width:
        raise SiteError(f"{where} passes {left.shape[-1]} channels instead of {site.width}")
    wrong = [n.path for n in site.feeds if not _feeds(model, n, left, trace)]
    if site.entry is not None and not _is_residual(site, left, trace):
        wrong.append(str(site.next))
    if site.produced_by is not None and not _is_output(model, site, site.produced_by, entered, trace):
        wrong.append(site.produced_by.path)
    if site.norm is not None and not _is_output(model, site, Neighbour(site.norm), entered, trace):
        wrong.append(site.norm)
    if wrong:
        raise SiteError(
            f"{where} does not carry the tensor of {', '.join(wrong)}; the model's forward differs from timm's"
        )


def _feeds(model: nn.Module, neighbour: Neighbour, left: Tensor, trace: _Trace) -> bool:
    """Whether a linear layer multiplies the channels of the tensor that left the site."""
    received = trace.only(f"{neighbour.path} input")
    if received is not None and isinstance(model.get_submodule(neighbour.path), nn.Conv2d):
        received = trace.last_channels(received)
    return trace.carries(received, left)


def _is_residual(site: Site, left: Tensor, trace: _Trace) -> bool:
    """Whether the module at `next` receives the sum of the block's input and the tensor that left the hook."""
    entry, received = trace.only(f"{site.entry} input"), trace.only(f"{site.next} input")

    def holds_left(x: Any) -> bool:
        return trace.carries(trace.last_channels(x) if site.channels_first else x, left)

    return any(
        trace.carries(received, total) and any(trace.carries(x, entry) and holds_left(y) for x, y in ((a, b), (b, a)))
        for a, b, total in trace.added
    )


def _is_output(model: nn.Module, site: Site, producer: Neighbour, entered: Tensor, trace: _Trace) -> bool:
    """Whether the tensor that entered the site is the producer's output; it is where the site is on the producer."""
    if site.host == producer.path:
        return True
    made = trace.only(f"{producer.path} output")
    first = site.channels_first or isinstance(model.get_submodule(producer.path), nn.Conv2d)
    return trace.carries(entered, made, 1 if first else -1)
