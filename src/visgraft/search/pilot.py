"""What trainings of a method cost, from a short one on a few images."""

import time

import numpy as np

from visgraft.core.configure import configure
from visgraft.measure.evaluation import logits_of
from visgraft.measure.precision import make_compute
from visgraft.search.budget import Cost
from visgraft.search.settings import TuningTask
from visgraft.training.crossval import select
from visgraft.training.resume import Epoch

PILOT_IMAGES = 32


def measure_cost(task: TuningTask, method: str) -> Cost:
    """Time a short training on a few images, at a learning rate that cannot diverge.

    Of two epochs after the first, which warms up, the quicker counts: other programs can only slow one down.
    """
    count = min(PILOT_IMAGES, len(task.images))
    few = select(task.images, np.sort(np.random.default_rng(task.seed).permutation(len(task.images))[:count]))
    config, recipe = configure(method, {"epochs": 3, "lr": 1e-6, "seed": task.seed, "precision": task.precision})
    ends = list[float]()

    def note(epoch: Epoch) -> None:
        if epoch.complete:
            ends.append(time.perf_counter())

    fit = task.bench.fit(config, recipe, few, few, on_progress=note, validate=False)
    begin = time.perf_counter()
    logits_of(task.bench.model(recipe.drop_path), few, make_compute(task.precision))
    forward = (time.perf_counter() - begin) / count
    return Cost(fit.attach_seconds / count, float(np.diff(ends).min()) / count, forward, fit.head_only)
