"""One thread that drives a bank: images of any number of requests, each with its own adapter, in batches."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from visgraft.bank.bank import Bank
from visgraft.bank.held import BankAdapter
from visgraft.errors import DataError, VisgraftError
from visgraft.measure.precision import Compute
from visgraft.measure.unlike import FrozenFeatures

RECENT = 32
"""Batches over which the time of an image is averaged, to say when it is worth to come again."""


class QueueFullError(VisgraftError):
    """There are too many images under way; `seconds` says when it is worth to come again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the server has as many images under way as it takes; try again in {seconds:.0f} s")
        self.seconds = seconds


class Answered(NamedTuple):
    """What the model said of an image: `logits` [outputs] on the CPU; seconds waited and computed, and the batch.

    `features` [F] are those of the plain backbone, where they were asked for.
    """

    logits: Tensor
    wait: float
    forward: float
    batch: int
    features: Tensor | None = None


class _Item(NamedTuple):
    """A prepared image on its way."""

    image: Tensor
    adapter: BankAdapter
    owner: str
    since: float
    future: "Future[Answered]"
    look: bool = False


class Ticket:
    """Leave for so many images of one owner to be under way."""

    def __init__(self, engine: "Engine", owner: str, images: int) -> None:
        self.engine, self.owner, self.left = engine, owner, images

    def put(self, image: Tensor, adapter: BankAdapter, look: bool = False) -> "Future[Answered]":
        """Let a prepared image [3, H, W] wait for the model; the future is done once it has answered.

        With `look`, the plain backbone looks at it as well.
        """
        future: Future[Answered] = Future()
        self.engine.push(_Item(image, adapter, self.owner, time.perf_counter(), future, look))
        self.forgo()
        return future

    def forgo(self) -> None:
        """Tell that one image fewer will come."""
        if self.left:
            self.left -= 1
            self.engine.expect(-1)


class Engine:
    """Batches what waits: it starts when the model is idle, and waits a moment only for images that are announced.

    Requests of several owners take turns, and none may fill the queue for the others.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        max_batch: int = 32,
        max_delay: float = 0.005,
        max_queue: int = 512,
        observe: Callable[[Answered, BankAdapter], None] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            bank: the adapters.
            max_batch: images in one forward at most.
            max_delay: seconds to wait at most for images that are announced and not yet there.
            max_queue: images that may be under way.
            observe: called with every answer, in the engine's thread.
        """
        self.bank, self.max_batch, self.max_delay, self.max_queue = bank, max_batch, max_delay, max_queue
        self._observe = observe
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[_Item]] = OrderedDict()
        self._under_way: dict[str, int] = {}
        self._expected = 0
        self._closing = False
        self._seconds: deque[float] = deque(maxlen=RECENT)  # of an image, in the last batches
        self._plain: FrozenFeatures | None = None  # made when it is first asked for, and used in the thread alone
        self._thread = threading.Thread(target=self._run, name="visgraft-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._closing

    @property
    def under_way(self) -> int:
        """How many images are decoded, wait or are computed."""
        with self._changed:
            return sum(self._under_way.values())

    @contextmanager
    def admit(self, owner: str, images: int) -> Iterator[Ticket]:
        """Reserve places for the images of a request, as long as this lasts.

        Raises:
            QueueFullError: there are too many, of all owners or of this one.
        """
        with self._changed:
            total, own = sum(self._under_way.values()), self._under_way.get(owner, 0)
            share = self.max_queue // len({*self._under_way, owner})
            # An owner who holds less than its share gets in though others have filled the queue before it came.
            if self._closing or (total + images > self.max_queue and own + images > share):
                raise QueueFullError(self._seconds_for(total))
            self._under_way[owner] = own + images
            self._expected += images
        ticket = Ticket(self, owner, images)
        try:
            yield ticket
        finally:
            while ticket.left:
                ticket.forgo()
            with self._changed:
                self._under_way[owner] -= images
                if not self._under_way[owner]:
                    del self._under_way[owner]
                self._changed.notify_all()

    def push(self, item: _Item) -> None:
        """Let an item wait; for a `Ticket`."""
        with self._changed:
            self._waiting.setdefault(item.owner, deque()).append(item)
            self._changed.notify_all()

    def expect(self, images: int) -> None:
        """Count images that are announced; for a `Ticket`."""
        with self._changed:
            self._expected += images
            self._changed.notify_all()

    def close(self, seconds: float = 30.0) -> None:
        """Answer what waits, and take nothing more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _seconds_for(self, images: int) -> float:
        each = sum(self._seconds) / len(self._seconds) if self._seconds else 0.05
        return max(1.0, images * each)

    def _run(self) -> None:
        with ExitStack() as lent:
            while batch := self._next():
                if self._plain is None and any(item.look for item in batch):
                    self._plain = FrozenFeatures(lent.enter_context(self.bank.lent(None)))
                self._answer(batch)

    def _next(self) -> list[_Item]:
        """Return the next batch, in turn of its owners; nothing once closed and empty."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._closing:
                        return []
                    self._changed.wait()
                self._await_announced()
                if batch := self._take():
                    return batch

    def _await_announced(self) -> None:
        until = time.perf_counter() + self.max_delay
        while self._expected and sum(map(len, self._waiting.values())) < self.max_batch:
            left = until - time.perf_counter()
            if left <= 0 or not self._changed.wait(left):
                return

    def _take(self) -> list[_Item]:
        batch: list[_Item] = []
        while self._waiting and len(batch) < self.max_batch:
            owner, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if item.future.set_running_or_notify_cancel():
                batch.append(item)
            if items:
                self._waiting[owner] = items  # behind the others
        return batch

    def _answer(self, batch: Sequence[_Item]) -> None:
        begin = time.perf_counter()
        try:
            self._compute(batch, begin)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for item in batch:  # one of them must not take the others with it
                if not item.future.done():
                    self._answer([item])
        else:
            self._seconds.append((time.perf_counter() - begin) / len(batch))

    def _compute(self, batch: Sequence[_Item], begin: float) -> None:
        with torch.inference_mode():
            found = self.bank([item.image for item in batch], [item.adapter for item in batch])
            logits = [answer.logits.float().cpu() for answer in found]
            features = self._features(batch)
        seconds = time.perf_counter() - begin
        for item, one, seen in zip(batch, logits, features, strict=True):
            if not bool(one.isfinite().all()) or not (seen is None or bool(seen.isfinite().all())):
                item.future.set_exception(
                    DataError("the model's answer is not finite; send smaller numbers, or a picture")
                )
                continue
            answered = Answered(one.clone(), begin - item.since, seconds, len(batch), seen)
            if self._observe is not None:
                self._observe(answered, item.adapter)
            item.future.set_result(answered)

    def _features(self, batch: Sequence[_Item]) -> list[Tensor | None]:
        """Return what the plain backbone sees [F] in the images of which that is asked, in each adapter's precision.

        An image that several adapters answer is looked at once for all of a precision.
        """
        found: list[Tensor | None] = [None] * len(batch)
        alike: dict[tuple[str, torch.Size], dict[int, list[int]]] = {}
        for row, item in enumerate(batch):
            if item.look:
                alike.setdefault((item.adapter.precision, item.image.shape), {}).setdefault(id(item.image), []).append(
                    row
                )
        for (precision, _), rows in alike.items():
            assert self._plain is not None
            x = torch.stack([batch[first].image for first, *_ in rows.values()])
            device = next(self._plain.model.parameters()).device
            for seen, same in zip(self._plain(x, Compute(device, precision)), rows.values(), strict=True):
                for row in same:
                    found[row] = seen.clone()
        return found
