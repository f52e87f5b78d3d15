"""The processes that compute one thing together, as `accelerate launch` or `torchrun` starts them.

Whoever was not started so is alone: every function then does nothing, or what it is given, and torch is not asked.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from visgraft.errors import VisgraftError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(hours=1)
"""How long a process waits for another that is alive; one that has ended is noticed at once, or by the launcher."""
LAST_WORDS = timedelta(seconds=30)
"""How long a process that fails waits for the first one to say so."""
BACKENDS = {"cuda": "cuda:nccl,cpu:gloo", "xpu": "xpu:xccl,cpu:gloo"}
"""By what tensors on devices of a kind, and on the CPU beside them, travel; others than these stay unused."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


class ProcessLost(VisgraftError):
    """Another process of this computation ended before its time."""


class _Group(NamedTuple):
    """The processes: this one's number, how many there are, and where this one computes."""

    rank: int
    size: int
    device: "torch.device"


_group: _Group | None = None
_store: Any = None
"""Where processes leave words for each other, whatever their devices are doing; there before the group is."""


def is_launched() -> bool:
    """Whether this process was started as one of several."""
    return all(name in os.environ for name in LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def join() -> None:
    """Meet the other processes, if this one was started as one of several; from then on they compute together.

    Raises:
        VisgraftError: accelerate is missing, or there are more processes than devices.
        ProcessLost: the others cannot be reached.
    """
    global _group, _store  # noqa: PLW0603  (a process is in one group, as in torch)
    if _group or not is_launched():
        return
    import torch
    from torch.distributed import PrefixStore, TCPStore

    first, ours = os.environ["RANK"] == "0", os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    address, size = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), int(os.environ["WORLD_SIZE"])
    with _lost_named():
        store = TCPStore(*address, is_master=first and ours, wait_for_workers=False, timeout=PATIENCE)
    attempt = f"visgraft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    _store = PrefixStore(f"{attempt}/words", store)
    if find_spec("accelerate") is None:
        raise VisgraftError(
            "several processes need accelerate, which is not installed; run pip install 'visgraft[distributed]'"
        )
    here, there = torch.accelerator.current_accelerator(check_available=True), torch.accelerator.device_count()
    device, backend = torch.device("cpu"), "gloo"
    if here is not None and here.type in BACKENDS and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        if int(os.environ.get("LOCAL_WORLD_SIZE", there)) > there:
            raise VisgraftError(
                f"there are more processes than devices on a machine; start {there} on it, one for each"
            )
        device, backend = torch.device(here.type, int(os.environ["LOCAL_RANK"])), BACKENDS[here.type]
    from accelerate import PartialState

    with _lost_named():
        state = PartialState(
            cpu=backend == "gloo", backend=backend, timeout=PATIENCE,
            store=PrefixStore(f"{attempt}/group", store), rank=int(os.environ["RANK"]), world_size=size,
        )  # fmt: skip
    _group = _Group(state.process_index, state.num_processes, device)


def leave() -> None:
    """Part from the others; those that still wait for this process get a `ProcessLost`."""
    global _group  # noqa: PLW0603
    if _group:
        import torch.distributed

        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()
        _group = None


def count() -> int:
    """Return how many processes compute together: 1 where this one is alone."""
    return _group.size if _group else 1


def count_here() -> int:
    """Return how many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _group.size)) if _group else 1


def rank() -> int:
    """Return this process's number among them, from 0."""
    return _group.rank if _group else 0


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def device() -> "torch.device | None":
    """Return the device that this process has of those shared; None where it is alone and has all."""
    return _group.device if _group else None


def shares(number: int, parts: int | None = None) -> list[slice]:
    """Return which of `number` things each part has: adjacent ones, as evenly as can be, none where there are few."""
    parts = count() if parts is None else parts
    bounds = [number * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def own_share(number: int) -> slice:
    """Return which of `number` things are this process's."""
    return shares(number)[rank()]


@contextlib.contextmanager
def _lost_named() -> Iterator[None]:
    """Turn what torch raises where another process has ended into one line."""
    try:
        yield
    except RuntimeError as error:
        if is_launched():
            ignore_signals()
        raise ProcessLost("another process of this command ended, or cannot be reached") from error


def ignore_signals() -> None:
    """Hear no more signals to stop: this process does, and launchers send theirs while the state is being written."""
    if threading.current_thread() is threading.main_thread():
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_IGN)


def add_up(tensor: "Tensor") -> None:
    """Put the sum over all processes in the place of a tensor, the same bits in each of them."""
    if _group:
        import torch.distributed

        with _lost_named():
            torch.distributed.all_reduce(tensor)


def gather(rows: "Tensor", parts: Sequence[slice]) -> None:
    """Fill a tensor whose rows `parts[rank]` each process has computed, in place, bit for bit."""
    if not _group:
        return
    import torch
    from torch.distributed import broadcast

    for source, part in enumerate(parts):
        if part.start < part.stop:
            sent = rows[part].contiguous().reshape(-1).view(torch.uint8)  # bytes, which every backend can send
            with _lost_named():
                broadcast(sent, source)
            if source != _group.rank:
                rows[part] = sent.view(rows.dtype).view_as(rows[part])


def in_shares(number: int, size: int, compute: "Callable[[slice], Tensor]") -> "Tensor":
    """Return what a function makes of the batches of so many images, [number, ...]; each process computes its share.

    The batches are those of one process, so that not even rounding differs.
    """
    import torch

    batches = batches_of(number, size)
    if len(batches) < count():  # less work than telling each other
        return torch.cat([compute(batch) for batch in batches])
    parts = rows_of_shares(batches)
    own = torch.cat([compute(batch) for batch in batches[own_share(len(batches))]])
    if count() == 1:
        return own
    rows = own.new_empty(number, *own.shape[1:])
    rows[parts[rank()]] = own
    gather(rows, parts)
    return rows


def batches_of(number: int, size: int) -> list[slice]:
    """Return the batches of so many images, in order."""
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def rows_of_shares(batches: Sequence[slice]) -> list[slice]:
    """Return which rows each process computes where batches are shared."""
    found = [batches[share] for share in shares(len(batches))]
    return [slice(some[0].start, some[-1].stop) if some else slice(0, 0) for some in found]


def take_from_first(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return the first process's tensors; those of all have the same names, shapes and types."""
    for tensor in tensors.values() if _group else ():
        gather(tensor.detach().reshape(1, -1), [slice(0, 1)] if tensor.numel() else [])
    return tensors


def from_first(make: Callable[[], T]) -> T:
    """Return what a function returns in the first process; the others wait for it and do not call it."""
    if not _group:
        return make()
    from torch.distributed import broadcast_object_list

    box = [make() if is_first() else None]
    with _lost_named():
        broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def least(value: int) -> int:
    """Return the smallest of the processes' values."""
    if not _group:
        return value
    import torch
    from torch.distributed import ReduceOp, all_reduce

    found = torch.tensor(value, device=_group.device)
    with _lost_named():
        all_reduce(found, ReduceOp.MIN)
    return int(found)


def check_alike(value: str, what: str) -> None:
    """Raise a VisgraftError that names `what`, unless all processes have the same value."""
    if from_first(lambda: value) != value:
        raise VisgraftError(f"process {rank()} has other {what} than process 0; give all machines the same")


@contextlib.contextmanager
def one_per_machine_first() -> Iterator[None]:
    """Let one process of each machine go first, so that the others find what it has left on the disk."""
    waits = _group is not None and os.environ["LOCAL_RANK"] != "0"
    if waits:
        least(0)
    yield
    if not waits:
        least(0)


def words_at_the_end(message: str, lost: bool) -> str | None:
    """Return what this process is to print as all end by an error, None where another one says it.

    One line is printed in all: the first process's own error; where that was `lost`, or stopped, because of another's
    error, that other's.
    """
    if _store is None:
        return message
    own = None if lost else message
    try:
        if os.environ["RANK"] != "0":
            if own:
                _store.compare_set("error", "", own)
            leave()  # wakes who waits for this process
            _store.wait(["told"], LAST_WORDS)
            return None
        others = _store.get("error").decode() if own is None and _store.check(["error"]) else None
        _store.set("told", "")
        return own or others or message
    except RuntimeError:  # the store, or the first process, is gone without a word
        return message
