"""The frozen prefix: the blocks before the first one in which anything trains give the same for an image every time.

So what enters that first block is computed once per image, and a step of training runs the network's *tail* from there
on. Nothing here knows a family: one traced forward pass says where the network can be cut and which modules are done
before; the tail runs the model's own `forward` with those modules standing still, and is compared with the whole.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from visgraft.core.attached import get_attached
from visgraft.core.finding import find_sites
from visgraft.data.images import Images
from visgraft.errors import SiteError
from visgraft.executors import distributed
from visgraft.measure.precision import Compute

MEMORY_SHARE = 0.25
"""The part of the free memory that what enters the first trained block may take, over all images."""
TRACED = 2  # images


class Blank(NamedTuple):
    """What a module returns that stands still: `shape` without the batch, and the type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Cut:
    """Where a network is cut: before the module at path `block`, the blocks' `number` from 0.

    `done` are the outermost modules that images pass before it, by path, with what they return; `entered` are all that
    run before it.
    """

    block: str
    number: int
    done: Mapping[str, Blank]
    entered: tuple[str, ...]


@dataclass(frozen=True)
class Prefix:
    """What the frozen prefix gives: the network behind it, and what enters that, for each set of images [N, ...].

    The tensors lie on the model's device where they take no more than a share of its free memory, else on the CPU.
    """

    tail: "Tail"
    entering: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """The memory that the tensors take."""
        return sum(tensor.nbytes for tensor in self.entering)


class _Entered(Exception):
    """Ends a forward pass where the tail begins, and carries what enters there."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def _stop(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Entered(args[0])


class _Instead:
    """Forward pre-hook that hands the module another first input, in the thread that it was made in alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.thread = tensor, get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.tensor, *args[1:]) if get_ident() == self.thread else args


class Tail(nn.Module):
    """The network from a cut on: it takes what enters the block there [B, ...] instead of images.

    It runs the model's own forward, with its hooks and whatever it does between and behind the blocks. Modules that are
    done before the cut return blanks instead of computing, and the block gets the given tensor in place of what comes
    of those. The parameters are the model's own.
    """

    def __init__(self, model: nn.Module, cut: Cut, image: Tensor) -> None:
        super().__init__()
        self.model, self.cut = model, cut
        self.image = image[:1]  # only its shape matters
        self.blanks: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, entering: Tensor) -> Tensor:
        """Return the model's output for the images whose tensors at the cut are `entering` [B, ...]."""
        block = self.model.get_submodule(self.cut.block)
        # Before the method's own hooks, which may read or rewrite what enters the block.
        handle = block.register_forward_pre_hook(_Instead(entering), prepend=True)
        try:
            with self._standing_still(entering):
                output: Tensor = self.model(self.image.expand(len(entering), *self.image.shape[1:]))
        finally:
            handle.remove()
        return output

    @contextmanager
    def _standing_still(self, entering: Tensor) -> Iterator[None]:
        """Replace the forward of the modules that are done before the cut, for as long as this lasts."""
        before = []
        try:
            for path, blank in self.cut.done.items():
                module = self.model.get_submodule(path)
                before.append((module, vars(module).get("forward")))
                vars(module)["forward"] = partial(_return, self._blank(blank, entering), get_ident(), module.forward)
            yield
        finally:
            for module, forward in before:
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward

    def _blank(self, blank: Blank, entering: Tensor) -> Tensor:
        """Return a tensor of the wanted shape, the same one every time: nothing ever reads its values."""
        key = (len(entering), blank, entering.device)
        if key not in self.blanks:
            self.blanks[key] = entering.new_zeros(len(entering), *blank.shape, dtype=blank.dtype)
        return self.blanks[key]


def _return(value: Tensor, thread: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the value in one thread; in others a module computes as ever."""
    return value if get_ident() == thread else forward(*args, **kwargs)


class _Event(NamedTuple):
    """A module begins (`output` None) or ends; `blank` where it takes a batch and returns one."""

    path: str
    begins: bool
    blank: Blank | None = None
    trained: bool = False


def _trace(model: nn.Module, x: Tensor) -> list[_Event]:
    """Return in which order the modules run on a batch, and of each whether what enters it needs a gradient."""
    events: list[_Event] = []

    def begin(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        trained = bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad
        events.append(_Event(path, True, trained=trained))

    def end(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        batches = [isinstance(t, Tensor) and t.ndim > 1 and len(t) == len(x) for t in (*args[:1], output)]
        blank = Blank(tuple(output.shape[1:]), output.dtype) if args and all(batches) else None
        events.append(_Event(path, False, blank))

    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(partial(begin, path), prepend=True))
            handles.append(module.register_forward_hook(partial(end, path)))
    try:
        with torch.enable_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return events


def find_cut(model: nn.Module, x: Tensor) -> Cut | None:
    """Return where the last block begins before which nothing trains; None where that is the first, or not known.

    Args:
        model: a model with something attached.
        x: some images [B, 3, H, W].
    """
    try:
        blocks = [sites["stream.in"].host for sites in find_sites(model).blocks]
    except SiteError:
        return None
    model.eval()
    events = _trace(model, x)
    begins = {path: [i for i, event in enumerate(events) if event.begins and event.path == path] for path in blocks}
    if any(len(found) != 1 for found in begins.values()):
        return None
    number = sum(not events[found[0]].trained for found in begins.values()) - 1
    if number < 1:
        return None
    at = begins[blocks[number]][0]
    before, after = events[:at], {event.path for event in events[at:] if event.begins}
    entered = [event.path for event in before if event.begins]
    done: dict[str, Blank] = {}
    for event in before:
        if event.blank and entered.count(event.path) == 1 and event.path not in after:
            done = {path: blank for path, blank in done.items() if not path.startswith(f"{event.path}.")}
            done[event.path] = event.blank
    return Cut(blocks[number], number, done, tuple(dict.fromkeys(entered)))


def _random(model: nn.Module, cut: Cut) -> str | None:
    """Return the path of a module before the cut whose output is another every time that the model trains, or None."""
    model.train()
    training = {path: module for path in cut.entered if (module := model.get_submodule(path)).training}
    model.eval()
    for path, module in training.items():
        rates = [getattr(module, name, None) for name in ("p", "prob", "drop_prob")]
        if isinstance(module, _NormBase) or any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return path
    return None


def enter(model: nn.Module, cut: Cut, x: Tensor) -> Tensor:
    """Run images up to the cut and return what enters the block there."""
    handle = model.get_submodule(cut.block).register_forward_pre_hook(_stop, prepend=True)
    try:
        model(x)
    except _Entered as entered:
        return entered.tensor
    finally:
        handle.remove()
    raise RuntimeError(f"{cut.block} was not reached")


def _is_tail(tail: Tail, x: Tensor, entering: Tensor) -> bool:
    """Whether the tail gives bit for bit what the whole model gives, at the head's input too: a head may be zero."""
    if len(entering) != len(x):
        return False
    seen: list[Tensor] = []
    handles = [
        tail.model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for path in get_attached(tail.model).head
    ]
    try:
        whole = [tail.model(x), *seen]
        seen.clear()
        cut = [tail(entering), *seen]
    except (RuntimeError, TypeError, ValueError, IndexError):  # what a model may make of blanks
        return False
    finally:
        for handle in handles:
            handle.remove()
    return len(whole) == len(cut) and all(map(torch.equal, whole, cut))


def _home(needed: int, device: torch.device) -> torch.device | None:
    """Return where so many bytes take no more than their share of the free memory: the device, the CPU, or nowhere.

    Of several processes each holds them, so those of a machine share its memory, and all agree on one place.
    """
    on_host = needed * distributed.count_here() <= MEMORY_SHARE * psutil.virtual_memory().available
    on_device = device.type == "cuda" and needed <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    place = distributed.least(2 if on_device else 1 if on_host else 0)
    return (None, torch.device("cpu"), device)[place]


def run_prefix(
    model: nn.Module, parts: Sequence[Images], compute: Compute, batch_size: int = 64
) -> Prefix | str | None:
    """Run the frozen prefix over sets of images once, over those that are copies of others not at all.

    Args:
        model: a model with something attached, on the device that computes; it is left in eval mode.
        parts: the sets of images.
        compute: the device and the precision.
        batch_size: images per forward pass.

    Returns:
        What it gives; None where no whole block is frozen before the first trained one; or why that is not kept.
        Several processes each run their share of the images, and all of them hold what it gives for all images.
    """
    device = compute.device
    x = parts[0].normalised(parts[0].pixels[:TRACED], device)
    with compute.autocast():
        cut = find_cut(model, x)
        if cut is None:
            return None
        if module := _random(model, cut):
            return f"{module} is random while training"
        with torch.no_grad():
            tail, entering = Tail(model, cut, x), enter(model, cut, x)
            if not distributed.least(_is_tail(tail, x, entering)):
                return f"{type(model).__name__} does not give the same from block {cut.number + 1} on alone"
    needed = entering[0].nbytes * sum(map(len, parts))
    home = _home(needed, device)
    if home is None:
        share = f"{MEMORY_SHARE:.0%} of the free memory"
        return f"what they give would take {needed / 1e9:.1f} GB, more than {share}; fewer or smaller images take less"
    kept = tuple(torch.empty(len(part), *entering.shape[1:], dtype=entering.dtype, device=home) for part in parts)
    with torch.no_grad(), compute.autocast():
        for part, rows in zip(parts, kept, strict=True):
            batches = distributed.batches_of(part.distinct, batch_size)
            for batch in batches[distributed.own_share(len(batches))]:
                rows[batch] = enter(model, cut, part.normalised(part.pixels[batch]).to(device))
            distributed.gather(rows, distributed.rows_of_shares(batches))
            _repeat(rows, part.distinct)
    return Prefix(tail, kept)


def seconds_per_image(tail: Tail, images: Images, compute: Compute, batch_size: int = 64) -> float:
    """Return how long the frozen prefix takes for an image, from one batch of them."""
    x = images.normalised(images.pixels[: min(batch_size, images.distinct)], compute.device)
    begin = time.perf_counter()
    with torch.no_grad(), compute.autocast():
        enter(tail.model, tail.cut, x)
    return (time.perf_counter() - begin) / len(x)


def _repeat(rows: Tensor, distinct: int) -> None:
    """Fill rows from `distinct` on with those that they repeat."""
    for start in range(distinct, len(rows), distinct):
        rows[start : start + distinct] = rows[: min(distinct, len(rows) - start)]
