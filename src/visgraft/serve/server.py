"""What all routes of the server share: its adapters, its answers, its figures, and whether all of it works."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException, Request

from visgraft.bank.bank import Bank
from visgraft.bank.held import BankAdapter
from visgraft.bank.opening import empty_bank
from visgraft.errors import VisgraftError
from visgraft.serve.answering import Answerer, SaidOf, Seconds, SentPicture
from visgraft.serve.engine import Answered, Engine
from visgraft.serve.hosting import Hosting
from visgraft.serve.metrics import STAGES, Metrics
from visgraft.serve.settings import ServeConfig
from visgraft.serve.store import FolderStore, Store
from visgraft.serve.threads import compute_alone, side_threads

CHECKED_FOR = 5.0
"""Seconds for which a check of the whole way is taken to hold."""


class Server:
    """What the routes share: adapters, answers, figures, and when the whole way was last seen to work."""

    def __init__(self, config: ServeConfig, store: Store | None = None) -> None:
        store = store or FolderStore(Path(config.store))
        if config.threads:
            torch.set_num_threads(config.threads)
        compute_alone()
        self.config, self.metrics = config, Metrics()
        self.bank = _bank_of(config, store)
        self.engine = Engine(
            self.bank,
            max_batch=config.max_batch,
            max_delay=config.max_delay_ms / 1000,
            max_queue=config.max_queue,
            observe=self._observe,
        )
        self.hosting = Hosting(self.bank, self.engine, store, config.pinned, self.metrics.forget)
        self.answerer = Answerer(self.hosting, config)
        self.loader = side_threads(1, "visgraft-load")
        self.checker = side_threads(1, "visgraft-check")
        self.draining, self._checked = False, -CHECKED_FOR
        self._checking = asyncio.Lock()
        self.together: Callable[[bytes], Awaitable[bytes]] | None = None
        """Makes of the figures of this process those of all, where they are not on one machine."""

    async def load(self, work: Callable[[], Any]) -> Any:
        """Do something with adapters in the one thread that may."""
        return await asyncio.get_running_loop().run_in_executor(self.loader, work)

    async def current(self) -> Hosting:
        """Return the adapters as they are now in all processes."""
        if not await self.hosting.is_current():
            await self.load(self.hosting.refresh)
        return self.hosting

    async def check(self) -> None:
        """Raise unless pictures have gone through the whole way, now or a moment ago."""
        if self.draining:
            raise VisgraftError("the server is about to end")
        async with self._checking:
            if time.monotonic() - self._checked >= CHECKED_FOR:
                check = (await self.current()).check
                await asyncio.get_running_loop().run_in_executor(self.checker, check)
                self._checked = time.monotonic()

    async def answer(
        self, request: Request, pictures: list[SentPicture], names: list[str], look: bool = False
    ) -> tuple[list[SaidOf], Seconds]:
        """Answer pictures, count them, and note in the request's line what it was about (see `Answerer.answer`)."""
        hosting = await self.current()
        if not names:
            if len(hosting.adapters) != 1:
                raise HTTPException(400, "say which adapter: ?adapter=NAME, as often as you like; see GET /adapters")
            names = list(hosting.adapters)
        if not pictures:
            raise HTTPException(400, "no picture was sent; send parts of a form: curl -F image=@photo.jpg")
        if len(names) > self.config.max_queue:
            raise HTTPException(
                413, f"{len(names)} adapters are more than one request may ask; name at most {self.config.max_queue}"
            )
        if len(pictures) > self.config.max_images or len(pictures) * len(names) > self.config.max_queue:
            raise HTTPException(
                413,
                f"{len(pictures)} pictures for {len(names)} adapters are more than one request may have; send at most "
                f"{min(self.config.max_images, self.config.max_queue // len(names))}",
            )
        found, seconds = await self.answerer.answer(pictures, names, request.state.owner, look)
        self.note(request, found, seconds, len(pictures))
        return found, seconds

    async def answer_prepared(self, request: Request, images: torch.Tensor, name: str) -> list[SaidOf]:
        """Answer images that the caller has prepared [B, C, H, W]."""
        hosting = await self.current()
        if len(images) > min(self.config.max_images, self.config.max_queue):
            raise HTTPException(413, f"{len(images)} images are more than the {self.config.max_images} of one request")
        hosting.bank.check_images(images)
        found, seconds = await self.answerer.prepared(images, name, request.state.owner)
        self.note(request, found, seconds, len(images))
        return found

    def note(self, request: Request, found: list[SaidOf], seconds: Seconds, images: int) -> None:
        """Put into the request's line how much there was to do."""
        broken = sum(one.adapter is None for one in found)
        self.metrics.broken.inc(broken)
        for stage, value in vars(seconds).items():
            self.metrics.stage.labels(stage).observe(value)
        adapters = sorted({one.adapter.adapter.name for one in found if one.adapter})
        facts = {"images": images, "broken": broken, "adapters": adapters[:20], **seconds.milliseconds()}
        request.state.facts.update(facts)
        self.count()

    def count(self) -> None:
        """Bring up to date what is no sum."""
        self.metrics.under_way.set(self.engine.under_way)
        self.metrics.adapters.set(len(self.hosting.adapters))

    async def figures(self) -> bytes:
        """Return the figures, of all workers where these share them."""
        self.count()
        own = self.metrics.text()
        return own if self.together is None else await self.together(own)

    def _observe(self, answered: Answered, adapter: BankAdapter) -> None:
        if adapter.name in self.hosting.adapters:  # not one that is only being tried
            self.metrics.answers.labels(adapter.name).inc()
            for stage in STAGES:
                share = getattr(answered, stage) / (answered.batch if stage == "forward" else 1)
                self.metrics.adapter_seconds.labels(adapter.name, stage).inc(share)
        self.metrics.batch.observe(answered.batch)

    def close(self) -> None:
        """Answer what waits, and end."""
        self.engine.close()
        for pool in (self.loader, self.checker, self.answerer.decoders):
            pool.shutdown(wait=False, cancel_futures=True)


def _bank_of(config: ServeConfig, store: Store) -> Bank:
    """Return a bank on the backbone of the first adapter that can be read."""
    errors = []
    for facts in store.read().values():
        try:
            return empty_bank(facts["path"], weights=config.weights, capacity=config.capacity)
        except VisgraftError as error:
            errors.append(error)
    raise errors[0] if errors else VisgraftError(f"{config.store} holds no adapters; start the server anew")
