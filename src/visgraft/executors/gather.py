"""Run jobs that all have to end well, and return what they return."""

from collections.abc import Callable, Sequence
from typing import Any

from visgraft.errors import VisgraftError
from visgraft.executors.job import Event, Executor, Job


def gather(executor: Executor, jobs: Sequence[Job], tell: Callable[[Event], None] = lambda event: None) -> list[Any]:
    """Return what the jobs return, in their order.

    Args:
        executor: where they run.
        jobs: with a key each that no other has.
        tell: called with what happens to them.

    Raises:
        VisgraftError: one failed; the others are ended.
    """
    waiting, found = list(reversed(jobs)), dict[str, Any]()

    def note(event: Event) -> None:
        tell(event)
        if event.kind == "failed":
            raise VisgraftError(event.value)
        if event.kind == "done":
            found[event.key] = event.value

    executor.run(lambda: waiting.pop() if waiting else None, note)
    return [found[job.key] for job in jobs]
