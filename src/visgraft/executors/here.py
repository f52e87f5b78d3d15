"""One job after another, in this process."""

from visgraft.executors.job import Event, NextJob, TellEvent, outcome


class Here:
    """Runs jobs one by one in this process."""

    places = 1

    def run(self, next_job: NextJob, tell: TellEvent) -> None:
        """See `Executor`."""
        while (job := next_job()) is not None:
            key = job.key
            tell(Event(key, "started", ""))
            tell(outcome(job, lambda value, key=key: tell(Event(key, "note", value))))  # type: ignore[misc]
