"""The dry run: one forward of a copy on the meta device that proves every site sits where its row says.

Counting firings is not enough: a hook in the wrong place fires just as often. So identity is proven as well: the
tensor that leaves a site *is* the one that enters the linear layers it names, and the one that enters the site *is*
what it says produced it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visgraft.errors import SiteError
from visgraft.sites import Neighbour, Site, find_image_shape
from visgraft.taps import tap


class _Recorder:
    """Act that replaces the tensor of its site by a clone and remembers both."""

    def __init__(self) -> None:
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []

    def __call__(self, value: Tensor, onto: Tensor) -> Tensor:
        self.entered.append(onto)
        self.left.append(onto.clone())
        return self.left[-1]


class _Sums(TorchFunctionMode):
    """Remembers every addition: the two tensors added and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[tuple[Any, Any, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in {"add", "__add__", "__radd__"}:
            self.added.append((args[0], args[1], result))
        return result


class _Seen:
    """Hooks that remember the inputs or outputs of modules by path."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, list[Tensor]] = {}

    def inputs(self, path: str) -> None:
        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.tensors.setdefault(f"{path} input", []).append(args[0])

        self.model.get_submodule(path).register_forward_pre_hook(remember)

    def outputs(self, path: str) -> None:
        def remember(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.tensors.setdefault(f"{path} output", []).append(output)

        self.model.get_submodule(path).register_forward_hook(remember)

    def only(self, key: str) -> Tensor | None:
        found = self.tensors.get(key, [])
        return found[0] if len(found) == 1 else None


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose tensors are on the meta device, without copying any data."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)


def prove_sites(model: nn.Module, sites: Sequence[Site]) -> None:
    """Run a meta copy of the plain model once and check that every given site is where its row says.

    Raises:
        SiteError: a site does not fire exactly once, or its tensor is not the one that its neighbours see.
    """
    model = meta_copy(model).eval()
    recorders = [_Recorder() for _ in sites]
    seen = _Seen(model)
    for site in sites:
        if site.produced_by is not None:
            seen.outputs(site.produced_by.path)
    for site in sites:
        if site.entry is not None:
            seen.inputs(site.entry)
    for site, recorder in zip(sites, recorders, strict=True):
        tap(model, site, recorder)
    # Registered after the taps, so that they see what the taps pass on.
    for path in dict.fromkeys(path for site in sites for path in _readers(site)):
        seen.inputs(path)
    parameter = next(model.parameters())
    images = torch.empty(2, *find_image_shape(model), device="meta", dtype=parameter.dtype)
    try:
        with torch.no_grad(), _Sums() as sums:
            model(images)
    except (RuntimeError, NotImplementedError) as error:
        raise SiteError(
            f"{type(model).__name__} does not run on the meta device ({str(error).strip().splitlines()[0]}), so the "
            "places of its sites cannot be proven; use timm's own model, without a replaced forward"
        ) from error
    for site, recorder in zip(sites, recorders, strict=True):
        _check(model, site, recorder, seen, sums)


def _readers(site: Site) -> list[str]:
    """Paths of the modules that the row says receive the site's tensor."""
    return [*(neighbour.path for neighbour in site.feeds), *([site.next] if site.next else [])]


def _check(model: nn.Module, site: Site, recorder: _Recorder, seen: _Seen, sums: _Sums) -> None:
    """Raise a SiteError unless the site fired once and its tensors are those of its neighbours."""
    where = f"the site {site.name} of block {site.block} ({type(model).__name__}, {site.host})"
    if len(recorder.left) != 1:
        raise SiteError(
            f"{where} passed {len(recorder.left)} times in one forward instead of once; "
            "this model bypasses or repeats the module, so no method can be attached there"
        )
    entered, left = recorder.entered[0], recorder.left[0]
    if left.shape[-1] != site.width:
        raise SiteError(f"{where} passes {left.shape[-1]} channels instead of {site.width}")
    wrong = [n.path for n in site.feeds if seen.only(f"{n.path} input") is not left]
    if site.entry is not None and not _is_residual(site, left, seen, sums):
        wrong.append(str(site.next))
    if site.produced_by is not None and not _is_output(site, site.produced_by, entered, seen):
        wrong.append(site.produced_by.path)
    if wrong:
        raise SiteError(
            f"{where} does not carry the tensor of {', '.join(wrong)}; the model's forward differs from timm's"
        )


def _is_residual(site: Site, left: Tensor, seen: _Seen, sums: _Sums) -> bool:
    """Whether the module at `next` receives the sum of the block's input and the tensor that left the hook."""
    entry, received = seen.only(f"{site.entry} input"), seen.only(f"{site.next} input")
    return received is not None and any(
        total is received and ((a is entry and b is left) or (a is left and b is entry)) for a, b, total in sums.added
    )


def _is_output(site: Site, producer: Neighbour, entered: Tensor, seen: _Seen) -> bool:
    """Whether the tensor that entered the site is the producer's output; it is where the site is on the producer."""
    return site.host == producer.path or entered is seen.only(f"{producer.path} output")
