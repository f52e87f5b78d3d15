"""Threads of a server beside the one in which its model computes: they leave it the cores."""

from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]


def compute_alone() -> None:
    """Let torch use one thread for whatever is computed in this thread; in others it uses as many as ever.

    A thread that once computed with several keeps them. As soon as there are more of them than cores, OpenMP puts all
    to sleep between two pieces of work, those of the model too, so one image then takes half as long again.
    """
    torch.get_num_threads()  # torch sets a thread's number when it is first asked there: before this, not after
    threadpool_limits(1, user_api="openmp")


def side_threads(count: int | None, name: str) -> ThreadPoolExecutor:
    """Return a pool of threads beside the one in which a model computes."""
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=compute_alone)
