"""Curves for other programs: `--log tensorboard`."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from visgraft.errors import VisgraftError
from visgraft.training.resume import Epoch

LOGS = ("tensorboard",)


@contextmanager
def epoch_log(kind: str | None, folder: Path, show: Callable[[Epoch], None]) -> Iterator[Callable[[Epoch], None]]:
    """Yield a callback for `train` that calls `show` and writes every complete epoch's figures; for None, `show`.

    Raises:
        VisgraftError: no such log, its library is missing, or the folder cannot be written.
    """
    if kind is None:
        yield show
        return
    if kind not in LOGS:
        raise VisgraftError(f"--log is {kind!r}, but must be {' or '.join(LOGS)}")
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise VisgraftError(
            "--log tensorboard needs the library tensorboard; run pip install 'visgraft[tensorboard]'"
        ) from error
    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise VisgraftError(f"{folder} cannot be written ({error.strerror}); choose another --out") from error

    def write(epoch: Epoch) -> None:
        show(epoch)
        if not epoch.complete:
            return
        for name, value in dataclasses.asdict(epoch).items():
            if isinstance(value, float) and name != "seconds_left":
                writer.add_scalar(
                    name.replace("val_", "val/") if name.startswith("val_") else f"train/{name}", value, epoch.epoch
                )
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
