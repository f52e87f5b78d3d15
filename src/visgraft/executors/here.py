"""One job after another, in this process."""

from dataclasses import dataclass

from visgraft.executors.job import Event, NextJob, TellEvent, outcome


@dataclass(frozen=True)
class Here:
    """Runs jobs one by one in this process.

    Args:
        raises: let the error of a job's work pass on as it is, instead of telling it as the job's end.
    """

    raises: bool = False
    places = 1

    def run(self, next_job: NextJob, tell: TellEvent) -> None:
        """See `Executor`."""
        while (job := next_job()) is not None:
            key = job.key

            def note(value: object, key: str = key) -> None:
                tell(Event(key, "note", value))

            tell(Event(key, "started", ""))
            tell(Event(key, "done", job.work(note)) if self.raises else outcome(job, note))
