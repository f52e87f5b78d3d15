"""What becomes of freed memory between the steps of a training on a CPU."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

from torch import nn

# glibc's names and numbers (malloc.h)
TRIM_THRESHOLD, MMAP_MAX, NEVER = -1, -4, -1
USUAL_MAPPINGS, USUAL_TRIM_THRESHOLD = 65536, 64 * 2**20
"""What glibc's own adjustment arrives at in a process that frees large blocks."""
OWN_WAYS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""How an environment chooses or sets up an allocator."""


@contextlib.contextmanager
def freed_memory_kept(model: nn.Module) -> Iterator[None]:
    """Keep freed memory in the process inside the context where the model is on a CPU, and give it back at the end.

    Every step frees features and allocates the same again. glibc returns large blocks to the system in between, which
    then hands out each page anew: several per cent of a step (`benchmarks/allocation.py`). It holds for the process.
    Other allocators than glibc's, and an environment that sets one up by itself, are left alone.
    """
    like = next(model.parameters(), None)
    if like is None or like.device.type != "cpu" or not _glibc_as_it_is():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(TRIM_THRESHOLD, NEVER)
    libc.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, USUAL_MAPPINGS)
        libc.mallopt(TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
        libc.malloc_trim(0)


def _glibc_as_it_is() -> bool:
    """Whether memory comes from glibc, with nothing set by hand."""
    return platform.libc_ver()[0] == "glibc" and not any(name.startswith(OWN_WAYS) for name in os.environ)
