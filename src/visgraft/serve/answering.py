"""From a request's pictures to answers: each decoded and answered by itself, so that a broken one is alone in that."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from visgraft.data.dataset import Example
from visgraft.data.decode import open_image
from visgraft.errors import DataError, VisgraftError
from visgraft.serve.engine import Answered, Ticket
from visgraft.serve.hosting import HostedAdapter, Hosting
from visgraft.serve.settings import ServeConfig
from visgraft.serve.threads import side_threads

LOG = logging.getLogger(__name__)


class SentPicture(NamedTuple):
    """A picture as it was sent: what to call it, and its bytes."""

    name: str
    content: bytes


@dataclass
class Seconds:
    """Where the time of a request went; of several pictures the longest."""

    decode: float = 0.0
    wait: float = 0.0
    forward: float = 0.0

    def milliseconds(self) -> dict[str, float]:
        """Return them for an answer."""
        return {name: round(1000 * value, 2) for name, value in vars(self).items()}


class SaidOf(NamedTuple):
    """What one adapter says of one picture: logits and probabilities [outputs], or why there is no answer.

    With several tasks, a number in its unit stands in place of a probability. `features` [F] are the plain backbone's,
    where they were asked for.
    """

    image: str
    adapter: HostedAdapter | None
    logits: Tensor = torch.empty(0)
    probabilities: Tensor = torch.empty(0)
    error: str = ""
    features: Tensor | None = None


@dataclass
class Answerer:
    """Decodes in threads ahead of the model, and hands to the engine what is prepared."""

    hosting: Hosting
    config: ServeConfig
    decoders: ThreadPoolExecutor = field(default_factory=lambda: side_threads(os.cpu_count(), "visgraft-decode"))

    async def answer(
        self, pictures: Sequence[SentPicture], names: Sequence[str], owner: str, look: bool = False
    ) -> tuple[list[SaidOf], Seconds]:
        """Answer every picture with every adapter that is named; a broken picture has one entry that says why.

        With `look`, the plain backbone looks at each as well.

        Raises:
            NoAdapterError: there is none of a name.
            QueueFullError: too many pictures are under way.
        """
        adapters = [self.hosting.get(name) for name in names]
        seconds = Seconds()
        with self.hosting.engine.admit(owner, len(pictures) * len(adapters)) as ticket:
            said = await asyncio.gather(*(self._one(picture, adapters, ticket, seconds, look) for picture in pictures))
        return [one for of_picture in said for one in of_picture], seconds

    async def prepared(self, images: Tensor, name: str, owner: str) -> tuple[list[SaidOf], Seconds]:
        """Answer images that the caller has prepared [3, H, W].

        Raises:
            NoAdapterError: there is no adapter of this name.
            QueueFullError: too many images are under way.
            DataError: the backbone takes no such images.
        """
        adapter, seconds = self.hosting.get(name), Seconds()
        with self.hosting.engine.admit(owner, len(images)) as ticket:
            waiting = [asyncio.wrap_future(ticket.put(image, adapter.adapter)) for image in images]
            found = [_said("", adapter, one, seconds) for one in await asyncio.gather(*waiting)]
        return found, seconds

    async def _one(
        self, picture: SentPicture, adapters: Sequence[HostedAdapter], ticket: Ticket, seconds: Seconds, look: bool
    ) -> list[SaidOf]:
        begin = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            images = await loop.run_in_executor(self.decoders, self._prepare, picture, adapters)
        except DataError as error:
            for _ in adapters:
                ticket.forgo()
            return [SaidOf(picture.name, None, error=str(error))]
        seconds.decode = max(seconds.decode, time.perf_counter() - begin)
        waiting = [
            asyncio.wrap_future(ticket.put(image, one.adapter, look))
            for image, one in zip(images, adapters, strict=True)
        ]
        try:
            answers = await asyncio.gather(*waiting)
        except VisgraftError as error:
            return [SaidOf(picture.name, None, error=str(error))]
        except Exception:  # whatever torch raises: of this picture alone, as the engine has found out
            LOG.exception("the model gave no answer")
            return [SaidOf(picture.name, None, error="the model gave no answer to this picture; see the server's log")]
        return [_said(picture.name, one, answered, seconds) for one, answered in zip(adapters, answers, strict=True)]

    def _prepare(self, picture: SentPicture, adapters: Sequence[HostedAdapter]) -> list[Tensor]:
        """Return the picture as each adapter's model takes it, prepared once for all that prepare alike."""
        opened: dict[str, Image.Image] = {}
        found: dict[Any, Tensor] = {}
        images = []
        for one in adapters:
            colour = one.record.background or "white"
            key = colour, repr(sorted(one.record.data_config.items()))
            if key not in found:
                if colour not in opened:
                    source = Example(Path(picture.name), 0, content=lambda: picture.content)
                    opened[colour] = open_image(source, colour, self.config.max_pixels)
                found[key] = one.adapter.transform(opened[colour])
            images.append(found[key])
        return images


def _said(image: str, adapter: HostedAdapter, answered: Answered, seconds: Seconds) -> SaidOf:
    seconds.wait = max(seconds.wait, answered.wait)
    seconds.forward = max(seconds.forward, answered.forward)
    said = adapter.record.answers(answered.logits)
    return SaidOf(image, adapter, answered.logits, said, features=answered.features)
