"""Which executor a user means."""

from collections.abc import Sequence

from visgraft.errors import VisgraftError, nearest
from visgraft.executors.here import Here
from visgraft.executors.job import Executor
from visgraft.executors.processes import Processes

KINDS = ("here", "processes", "ray")
LEAST_GPU = 0.0001
"""Ray counts no smaller share."""
_BY_ADDRESS = "ray://"


def is_ray(on: str | None) -> bool:
    """Whether a place is a Ray cluster; what comes before :// means the same in capitals."""
    return on is not None and (on == "ray" or on.lower().startswith(_BY_ADDRESS))


def choose_executor(
    on: str | None = None,
    workers: int | None = None,
    *,
    cpus: int | None = None,
    gpus: float | None = None,
    preload: Sequence[str] = (),
    fresh: bool = True,
    each: str = "trial",
) -> Executor:
    """Return what runs jobs.

    Args:
        on: "here", "processes", "ray" or "ray://HOST:PORT"; None: processes, or here where `workers` is 0.
        workers: jobs at a time; None: 1, or on Ray as many as fit.
        cpus: cores of each job on Ray; None: 1.
        gpus: GPUs of each job on Ray, or a fraction of one; None: one where there are any.
        preload: modules that jobs need.
        fresh: give each job a new process; otherwise a process takes one after another, and keeps what it has loaded.
        each: what the options --cpus-per-… and --gpus-per-… of the verb are called after.

    Raises:
        VisgraftError: there is no such executor, or an option would have no effect.
    """
    kind = on if on is not None else ("here" if workers == 0 else "processes")
    cores, cards = f"--cpus-per-{each}", f"--gpus-per-{each}"
    if kind not in KINDS and not is_ray(on):
        raise VisgraftError(
            f"--on is {on!r}, but must be here, processes, ray or ray://HOST:PORT{nearest(kind, KINDS)}"
        )
    if workers is not None and workers < (0 if on is None or kind == "here" else 1):
        raise VisgraftError(f"--workers is {workers}, but must be {'0' if on is None else '1'} or more")
    if is_ray(on):
        from visgraft.executors.on_ray import OnRay

        if cpus is not None and cpus < 1:
            raise VisgraftError(f"{cores} is {cpus}, but must be 1 or more")
        if gpus is not None and not (gpus == 0 or LEAST_GPU <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
            raise VisgraftError(f"{cards} is {gpus:g}, but must be 0, from {LEAST_GPU} to 1, or a whole number")
        address = None if kind == "ray" else _BY_ADDRESS + kind[len(_BY_ADDRESS) :]
        return OnRay(address, 1 if cpus is None else cpus, gpus, workers, fresh, each)
    if cpus is not None or gpus is not None:
        raise VisgraftError(f"{cards if cpus is None else cores} has an effect with --on ray only; leave it out")
    if kind == "here":
        if workers:
            raise VisgraftError(
                f"--workers {workers} has no effect with --on here; leave it out, or use --on processes"
            )
        return Here()
    return Processes(workers or 1, preload, fresh)
