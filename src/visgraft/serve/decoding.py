"""Pictures on their way to a model: decoded in threads ahead of it, few at any time."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from visgraft.data.decode import open_image
from visgraft.data.urls import path_or_url
from visgraft.errors import AdapterError, DataError, VisgraftError

AnyPath = str | Path
"""A path; a URL is text."""
Job = TypeVar("Job")
Found = TypeVar("Found")


def path_of(image: Any) -> AnyPath:
    """Return the path that an image is given by, or its URL."""
    if not isinstance(image, str | os.PathLike):
        raise VisgraftError(
            f"images must be paths, but one is of type {type(image).__name__}; save it to a file, or call "
            "adapted.model on what adapted.transform makes of it"
        )
    return path_or_url(image)


def prepared(path: AnyPath, transform: Any, colour: str) -> Tensor:
    """Return what the transform makes of a picture, [3, H, W]."""
    x = transform(open_image(path, colour))
    if not isinstance(x, Tensor) or x.ndim != 3:
        found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise AdapterError(
            f"the transform makes {found} of {path}, but must make a tensor [3, H, W]; use the one that load returns"
        )
    return x


def stacked(good: Sequence[tuple[AnyPath, Tensor]]) -> Tensor:
    """Return the images of a batch as one tensor [B, 3, H, W]."""
    first, x = good[0]
    for path, other in good:
        if other.shape != x.shape:
            raise AdapterError(
                f"the transform makes {first} {tuple(x.shape)} and {path} {tuple(other.shape)}, which are no batch; "
                "use a transform to one size, or batch_size=1"
            )
    return torch.stack([tensor for _, tensor in good])


def readable(
    batch: Sequence[tuple[AnyPath, Found | DataError]], on_broken: Callable[[AnyPath, str], None] | None
) -> list[tuple[AnyPath, Found]]:
    """Return the images of a batch, and report, or raise, what is none."""
    good = []
    for path, found in batch:
        if not isinstance(found, DataError):
            good.append((path, found))
        elif on_broken is None:
            raise found
        else:
            on_broken(path, str(found))
    return good


def decoded(jobs: Iterator[Job], read: Callable[[Job], Found], ahead: int) -> Iterator[tuple[Job, Found | DataError]]:
    """Yield each image as it is read, in order, or why it is none; at most `ahead` wait decoded."""

    def decode(job: Job) -> Found | DataError:
        try:
            return read(job)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(os.cpu_count())
    waiting: deque[tuple[Job, Future[Found | DataError]]] = deque()
    try:
        while True:
            for job in islice(jobs, ahead - len(waiting)):
                waiting.append((job, pool.submit(decode, job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            yield job, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batches(items: Iterator[Job], size: int) -> Iterator[list[Job]]:
    """Yield lists of so many items, the last one of what is left."""
    while batch := list(islice(items, size)):
        yield batch
