"""A job, what happens to it, and what every executor does."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from visgraft.errors import VisgraftError
from visgraft.files import as_given

Note = Callable[[Any], None]
"""Called by work that tells how far it is."""


class Job(NamedTuple):
    """A piece of work that can be sent elsewhere, and done again: it depends on nothing but its values.

    `work` is called with a function to which it may tell how far it is; `title` names the job in a few words. `gpus` is
    the share of a GPU that is known to suffice, where that is known and nobody asked for another.
    """

    key: str
    title: str
    work: Callable[[Note], Any]
    gpus: float | None = None


class Event(NamedTuple):
    """What happened to a job.

    `kind` is "started" (`value` says where), "note" (what the work told), "again" (why it was lost, and starts anew),
    "done" (what it returned) or "failed" (why, in one sentence). The last two end it.
    """

    key: str
    kind: str
    value: Any


NextJob = Callable[[], Job | None]
"""Returns a job to start now, None where there is none at present; asked again after each event."""
TellEvent = Callable[[Event], None]


class Executor(Protocol):
    """Runs jobs: where and how many at a time is all in which executors differ."""

    @property
    def places(self) -> int:
        """How many jobs run at a time, as far as is known now."""

    def run(self, next_job: NextJob, tell: TellEvent) -> None:
        """Run jobs until there is none left and none runs.

        `tell` is called in this thread. Whatever it raises ends all jobs.
        """


def outcome(job: Job, note: Note) -> Event:
    """Do a job's work; an error is its outcome, not the executor's."""
    try:
        return Event(job.key, "done", job.work(note))
    except VisgraftError as error:
        return Event(job.key, "failed", as_given(f"{job.title}: {error}"))
    except Exception as error:
        return Event(job.key, "failed", as_given(f"{job.title}: {type(error).__name__}: {error}"))
