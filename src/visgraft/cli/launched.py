"""A command that `accelerate launch` or `torchrun` starts as several processes: the first one speaks for all."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from visgraft.errors import VisgraftError
from visgraft.executors import distributed

SHARED = ("train", "eval")
"""The verbs that several processes do together."""


@contextmanager
def joined(words: Sequence[str]) -> Iterator[None]:
    """Do a command together with the processes that were started with this one, if any; only the first one speaks.

    Raises:
        VisgraftError: the verb is done by one process.
    """
    if not distributed.is_launched():
        yield
        return
    _one_interrupt()
    spoken = sys.stdout, sys.stderr
    if os.environ["RANK"] != "0":
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        distributed.join()
        _check(words)
        yield
    finally:
        sys.stdout, sys.stderr = spoken  # for a traceback


def _check(words: Sequence[str]) -> None:
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb and verb not in SHARED:
        instead = "; its trainings run side by side with --on" if verb == "bench" else ""
        raise VisgraftError(
            f"{verb} runs in one process; start it without accelerate launch or torchrun, which train and eval are for"
            f"{instead}"
        )


def refuse_launched(option: str, why: str) -> None:
    """Raise a VisgraftError where several processes were started with an option that one process is for."""
    if distributed.is_launched():
        raise VisgraftError(f"{option} {why}, in one process; start it without accelerate launch or torchrun")


def _one_interrupt() -> None:
    """Take the first signal to stop and no other: launchers send theirs too, while the state is being written."""

    def stop(number: int, frame: Any) -> None:
        distributed.ignore_signals()
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, stop)
