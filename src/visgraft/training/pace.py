"""How long the parts of a training take, measured on its first steps."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from torch import nn

from visgraft.data.augment import View, augmentation
from visgraft.data.images import Images
from visgraft.errors import warn_user
from visgraft.measure.precision import make_compute
from visgraft.options import TrainConfig
from visgraft.training.loop import EpochKept, Event, Ready, training_loop
from visgraft.training.objective import Features, Objective
from visgraft.training.prefix import Tail, seconds_per_image
from visgraft.training.resume import Epoch, TrainState

MEASURED_STEPS = 4
"""Of an epoch that `measure_pace` looks at."""
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Pace:
    """How long the parts of training take in seconds, measured on its first steps.

    `step` is a step on a full batch while the next one is made ready; `start` what an epoch takes until its first batch
    is ready; `keeping` the copies at its end; `validation` the figures on the validation images given. `warmup` is what
    the very first step takes beyond the others. `steps` is how many an epoch has, the last one by its share of a batch.
    `preparing` is what comes before the first epoch, such as what a frozen prefix takes to run over all images.
    """

    step: float
    start: float
    keeping: float
    validation: float
    warmup: float
    steps: float
    preparing: float = 0.0

    @property
    def epoch(self) -> float:
        """Seconds of an epoch without its validation."""
        return self.start + self.steps * self.step + self.keeping


def measure_pace(
    model: nn.Module,
    images: Images,
    config: TrainConfig,
    val: Images | None = None,
    *,
    features: Features | None = None,
    at_least: float = 1.0,
    then: Callable[[Pace, TrainState], None] | None = None,
    on_warning: Callable[[str], None] = warn_user,
) -> Pace:
    """Make one step of training to warm up, then the first few of an epoch until `at_least` seconds have passed.

    They are steps of `train` with the same arguments, so the model is trained by them. Of images that repeat
    (`Images.distinct`), those that frozen blocks run over once are run over once each; `preparing` counts all.

    Args:
        then: called with the result and the last state, while all that training holds is still held.

    Raises:
        TrainingDiverged: the loss stopped being finite.
        VisgraftError: as `train`.
    """
    endless = replace(config, epochs=max(config.epochs, MOST_ROUNDS))
    begin = time.perf_counter()
    loop = training_loop(model, images, endless, val, features=features, on_warning=on_warning)
    with closing(loop) as events:
        ready = next(events)
        assert isinstance(ready, Ready)
        preparing = time.perf_counter() - begin + _not_run(ready.task, images, val, config)
        state, (warm, *_) = _time_epoch(events, ready, config, 1)
        begin, rounds = time.perf_counter(), list[tuple[float, ...]]()
        while not rounds or (time.perf_counter() - begin < at_least and len(rounds) < MOST_ROUNDS - 1):
            state, times = _time_epoch(events, ready, config, MEASURED_STEPS)
            rounds.append(times)
        step, start, keeping, validation = (median(values) for values in zip(*rounds, strict=True))
        steps = len(ready.task.labels) / config.batch_size
        steps = float(int(steps)) if config.drop_last else max(steps, 1.0)
        pace = Pace(step, start, keeping, validation, max(warm - start - step, 0.0), steps, preparing)
        if then:
            then(pace, state)
    return pace


def _time_epoch(
    events: Generator[Event, bool | None, None], ready: Ready, config: TrainConfig, most: int
) -> tuple[TrainState, tuple[float, ...]]:
    """Return the state after an epoch of `most` steps at most, and `step`, `start`, `keeping` and `validation`."""
    ends, begin = list[float](), time.perf_counter()
    event = next(events)
    while isinstance(event, Epoch):
        ends.append(time.perf_counter())
        event = events.send(len(ends) == most)
    kept, state = time.perf_counter(), next(events)
    assert isinstance(event, EpochKept) and isinstance(state, TrainState)
    validation = time.perf_counter() - kept
    full = ends[: max(len(ready.task.labels) // config.batch_size, 1)]  # a last batch may be smaller
    step = median([later - earlier for earlier, later in pairwise(full)] or [ends[0] - begin])
    return state, (step, max(ends[0] - begin - step, 0.0), kept - ends[-1], validation)


def _not_run(task: Objective, images: Images, val: Images | None, config: TrainConfig) -> float:
    """Return the seconds that the frozen blocks would have taken for images that are copies of others."""
    views = config.cached_views or 1
    repeats = views * (len(images) - images.distinct) + (len(val) - val.distinct if val else 0)
    if not repeats or not isinstance(task.network, Tail):
        return 0.0
    augment = augmentation(images, config)
    shape = tuple(images.pixels.shape)
    seen = replace(images, pixels=View(augment, shape, images.distinct, 1)) if augment else images
    return repeats * seconds_per_image(task.network, seen, make_compute(config.precision))


def duration(seconds: float) -> str:
    """Write a length of time in the way `parse_budget` reads, in whole seconds, or minutes from 100 seconds on."""
    if seconds < 100:
        return f"{math.ceil(seconds)}s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return "".join(f"{number}{unit}" for number, unit in ((hours, "h"), (minutes, "m")) if number)
