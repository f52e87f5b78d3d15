"""A training that may be stopped at any time: what it writes while it runs, when it is cut short, and at its end."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from visgraft.adapters.calibrated import Calibrated
from visgraft.adapters.directory import save
from visgraft.adapters.reference import Reference
from visgraft.errors import Interrupted, TrainingDiverged, VisgraftError
from visgraft.executors import distributed
from visgraft.executors.distributed import ProcessLost
from visgraft.training.fit import Fitted
from visgraft.training.loop import restore
from visgraft.training.resume import TrainState, state_file, write_state

STATE_SECONDS = 10.0
"""A state is written at the end of an epoch if the last one is older than this."""


@dataclass
class _Kept:
    """The state after the last complete epoch, and when one was last written."""

    state: TrainState | None
    written: float


@dataclass(frozen=True)
class KeptRun:
    """A training that writes its adapter to `out`, and the state to go on from beside it.

    Of several processes only the first one writes. `facts` are what a run must have in common with this one to go on
    from its state, `record` is what the adapter keeps of how it was trained, and `again` what the user is told to do.
    """

    model: nn.Module
    out: Path
    facts: dict[str, Any]
    classes: tuple[str, ...]
    record: dict[str, Any]
    reference: Reference | None
    epochs: int
    again: str

    def write(self, calibrated: Mapping[str, Calibrated] | None = None, **more: Any) -> None:
        """Write the adapter as the model is now, with further facts in its record."""
        if distributed.is_first():
            record = self.record | more
            save(
                self.model, self.out, classes=self.classes, record=record, calibrated=calibrated,
                reference=self.reference,
            )  # fmt: skip

    def train(self, learn: Callable[..., Fitted], state: TrainState | None) -> Fitted:
        """Train, writing the state now and then, and in any case when the run is cut short.

        Raises:
            Interrupted: on Ctrl-C, after writing the state.
            TrainingDiverged: after writing the last good epoch's adapter, where there is one.
            ProcessLost: after writing the state, where another process of the training is gone.
        """
        kept = _Kept(state, time.monotonic())

        def keep(new: TrainState) -> None:
            kept.state = new
            if distributed.is_first() and time.monotonic() - kept.written >= STATE_SECONDS:
                write_state(state_file(self.out), new, self.facts)
                kept.written = time.monotonic()

        try:
            return learn(resume=state, on_state=keep)
        except TrainingDiverged as error:
            raise self._keep_last_good(error) from None
        except KeyboardInterrupt:
            raise self._interrupted(kept.state) from None
        except ProcessLost as error:
            raise ProcessLost(f"{error}: {self._interrupted(kept.state)}") from error

    def finish(self, calibrated: Mapping[str, Calibrated] | None, **more: Any) -> None:
        """Write the adapter and remove the state; where the disk is full, say that the state is still there."""
        file = state_file(self.out)
        if not distributed.is_first():
            return
        try:
            self.write(calibrated, **more)
        except VisgraftError as error:
            if not file.is_file():
                raise
            raise VisgraftError(f"{error}; make room, and {self.again}: {file} is kept") from error
        file.unlink(missing_ok=True)

    def _keep_last_good(self, error: TrainingDiverged) -> TrainingDiverged:
        """Write the last good state, where an epoch was completed, and return the error that says so."""
        if distributed.is_first():
            state_file(self.out).unlink(missing_ok=True)  # going on from it would only diverge again
        if not error.last_good_epoch:
            return TrainingDiverged(f"{error}; nothing was written, as no epoch was completed", 0)
        self.write(diverged_after_epoch=error.last_good_epoch)
        return TrainingDiverged(f"{error}; it is written to {self.out}", error.last_good_epoch)

    def _interrupted(self, state: TrainState | None) -> Interrupted:
        """Write the state, and the adapter unless there is one already; return the error that says how to go on."""
        if state is None or not state.epoch:
            return Interrupted("interrupted before the first epoch was complete; nothing was written")
        if not distributed.is_first():
            return Interrupted(f"interrupted after epoch {state.epoch} of {self.epochs}")
        write_state(state_file(self.out), state, self.facts)
        usable = ""
        if not self.out.exists():
            restore(self.model, state.tensors)
            with contextlib.suppress(VisgraftError):
                self.write(interrupted_after_epoch=state.epoch)
                usable = f"; the adapter so far is in {self.out}"
        return Interrupted(f"interrupted after epoch {state.epoch} of {self.epochs}{usable}; {self.again}")
