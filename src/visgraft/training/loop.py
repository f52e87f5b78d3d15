"""One training loop for every method; it knows no method's name."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from statistics import median
from typing import Any
from warnings import warn

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.adapters.directory import adapter_tensors
from visgraft.core.attached import get_attached
from visgraft.data.images import Images
from visgraft.errors import TrainingDiverged, VisgraftError
from visgraft.measure.evaluation import peak_memory_bytes, probabilities_of, score
from visgraft.measure.precision import Compute, frozen_weights_in_bf16, make_compute, unfused_attention
from visgraft.options import TrainConfig
from visgraft.training.allocation import freed_memory_kept
from visgraft.training.objective import Features, Objective, checkpointing, draw_order, make_objective
from visgraft.training.optimizer import make_optimizer, steps_per_epoch
from visgraft.training.resume import Epoch, TrainState, optimizer_tensors, restore_optimizer


@dataclass(frozen=True)
class Training:
    """What a training run did: its completed epochs, the epoch that was kept, and its costs.

    `waiting_share` is the part of the time spent in steps that passed in waiting for images. A resumed run counts its
    seconds from where it went on. `kept_bytes` is the memory taken by what the frozen part gave once: what enters the
    first trained block, or features.
    """

    history: tuple[Epoch, ...]
    kept_epoch: int
    seconds: float
    images_per_second: float
    peak_memory_bytes: int
    waiting_share: float
    kept_bytes: int = 0


MEASURED_STEPS = 4
"""Of an epoch that `measure_pace` looks at."""


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


@dataclass
class _Clock:
    """Seconds of training so far: when it began, after how long, how many images were seen since, how steps waited."""

    start: float
    preparing: float
    seen: int = 0
    waiting: float = 0.0
    stepping: float = 0.0
    validating: float = 0.0


@dataclass(frozen=True)
class _Loop:
    """What every step of a run uses; `most` is after how many steps an epoch ends early."""

    task: Objective
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    schedule: Any
    compute: Compute
    clock: _Clock
    loader: ThreadPoolExecutor
    most: int | None = None


def train(
    model: nn.Module,
    images: Images,
    config: TrainConfig,
    val: Images | None = None,
    on_progress: Callable[[Epoch], None] | None = None,
    *,
    features: Features | None = None,
    resume: TrainState | None = None,
    on_state: Callable[[TrainState], None] | None = None,
    on_warning: Callable[[str], None] = warn,
) -> Training:
    """Train what `attach` left trainable: AdamW, linear warm-up, cosine, cross-entropy.

    Where images may have several classes, the loss is binary cross-entropy. Chance depends on (seed, epoch, index)
    alone. On images without augmentation, frozen blocks before the first trained one run once per image, as all of the
    backbone does where the head trains alone.

    Args:
        model: a model with something attached, in place.
        images: the training images.
        config: how to train.
        val: validation images, measured after every epoch; needed for `select="val"`.
        on_progress: called after every step and, with `complete` set, after every epoch.
        features: a dictionary that keeps those features for further calls with the same backbone and images.
        resume: the state to go on from, for a run with the same arguments.
        on_state: called after every epoch with the state to go on from.
        on_warning: called with a line where only the last blocks are adapted, but the others run in every step.

    Raises:
        TrainingDiverged: the loss stopped being finite; the model holds the last good epoch's state.
        VisgraftError: an option would have no effect, or nothing is attached.
    """
    _check(model, config, val)
    begin = time.perf_counter()
    with _ready(model, images, config, val, features, on_warning) as loop:
        state, clock = resume or TrainState(0, _tensors(model)), loop.clock
        if resume:
            restore(model, state.tensors)
            restore_optimizer(loop.optimizer, state.optimizer)
        first = state.epoch
        for number in range(first + 1, config.epochs + 1):
            state = _advance(model, loop, state, number, on_progress)
            if on_state:
                on_state(state)
            if on_progress:
                on_progress(state.history[-1])
    kept = state.best_epoch if config.select == "val" else config.epochs
    if config.select == "val":
        restore(model, state.best)
    model.eval()
    seconds, seen = time.perf_counter() - begin, (config.epochs - first) * len(images)
    waiting = clock.waiting / max(clock.stepping, 1e-9)
    return Training(state.history, kept, seconds, seen / seconds, peak_memory_bytes(), waiting, loop.task.kept_bytes)


@contextmanager
def _ready(
    model: nn.Module,
    images: Images,
    config: TrainConfig,
    val: Images | None,
    features: Features | None,
    on_warning: Callable[[str], None],
    most: int | None = None,
) -> Iterator[_Loop]:
    """Yield a run that is about to make its first step; its clock runs."""
    begin, compute = time.perf_counter(), make_compute(config.precision)
    model.to(compute.device)
    task = make_objective(model, images, val, config, compute, features, on_warning, most)
    optimizer, schedule = make_optimizer(model, config, len(images))
    bf16 = compute.precision == "bf16"
    with ExitStack() as stack:
        loader = stack.enter_context(ThreadPoolExecutor(1))
        stack.enter_context(frozen_weights_in_bf16(model, bf16))
        stack.enter_context(unfused_attention(model, bf16))
        stack.enter_context(freed_memory_kept(model))
        stack.enter_context(checkpointing(model, task.network, config.grad_checkpointing))
        clock = _Clock(time.perf_counter(), time.perf_counter() - begin + task.spared)
        yield _Loop(task, config, optimizer, schedule, compute, clock, loader)


def measure_pace(
    model: nn.Module,
    images: Images,
    config: TrainConfig,
    val: Images | None = None,
    *,
    features: Features | None = None,
    at_least: float = 1.0,
    then: Callable[[Pace, TrainState], None] | None = None,
    on_warning: Callable[[str], None] = warn,
    most: int | None = None,
) -> Pace:
    """Make one step of training to warm up, then the first few of an epoch until `at_least` seconds have passed.

    They are steps of `train` with the same arguments, so the model is trained by them.

    Args:
        then: called with the result and the last state, while all that training holds is still held.
        most: how many images go through blocks that run once per image, at least, to stand for all; None: all go.

    Raises:
        TrainingDiverged: the loss stopped being finite.
        VisgraftError: as `train`.
    """
    _check(model, config, val)
    with _ready(model, images, config, val, features, on_warning, most) as loop:
        state, (warm, *_) = _time_epoch(model, replace(loop, most=1), TrainState(0, _tensors(model)))
        begin, rounds = time.perf_counter(), list[tuple[float, ...]]()
        while not rounds or time.perf_counter() - begin < at_least:
            state, times = _time_epoch(model, replace(loop, most=MEASURED_STEPS), state)
            rounds.append(times)
        step, start, keeping, validation = (median(values) for values in zip(*rounds, strict=True))
        steps = len(loop.task.labels) / config.batch_size
        steps = float(int(steps)) if config.drop_last else max(steps, 1.0)
        warmup = max(warm - start - step, 0.0)
        pace = Pace(step, start, keeping, validation, warmup, steps, loop.clock.preparing)
        if then:
            then(pace, state)
    return pace


def _time_epoch(model: nn.Module, loop: _Loop, state: TrainState) -> tuple[TrainState, tuple[float, ...]]:
    """Return the state after an epoch that may end early, and `step`, `start`, `keeping` and `validation` of `Pace`."""
    ends, before, begin = list[float](), loop.clock.validating, time.perf_counter()
    state = _advance(model, loop, state, state.epoch + 1, lambda _: ends.append(time.perf_counter()))
    end, validation = time.perf_counter(), loop.clock.validating - before
    full = ends[: max(len(loop.task.labels) // loop.config.batch_size, 1)]  # a last batch may be smaller
    step = median([later - earlier for earlier, later in pairwise(full)] or [ends[0] - begin])
    return state, (step, max(ends[0] - begin - step, 0.0), end - ends[-1] - validation, validation)


def _advance(
    model: nn.Module, loop: _Loop, state: TrainState, number: int, on_progress: Callable[[Epoch], None] | None
) -> TrainState:
    """Train for one epoch, measure, and return the state after it.

    Raises:
        TrainingDiverged: the model holds the state before the epoch again.
    """
    torch.manual_seed(int(np.random.SeedSequence((loop.config.seed, number)).generate_state(1)[0]))
    model.train()
    epoch, tensors = _one_epoch(loop, number, on_progress), _tensors(model)
    if epoch is None or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        restore(model, state.tensors)
        raise _diverged(number, loop.config)
    begin = time.perf_counter()
    epoch = replace(epoch, complete=True, **_validate(model, loop.task, loop.compute))
    loop.clock.validating += time.perf_counter() - begin
    return state.after(epoch, tensors, optimizer_tensors(loop.optimizer))


def _one_epoch(loop: _Loop, number: int, on_progress: Callable[[Epoch], None] | None) -> Epoch | None:
    """Make one pass over the images; None where the loss stopped being finite."""
    epoch = None
    for epoch in islice(_steps(loop, number), loop.most):
        if not np.isfinite(epoch.loss):
            return None
        if on_progress:
            on_progress(epoch)
    return epoch


def _diverged(epoch: int, config: TrainConfig) -> TrainingDiverged:
    return TrainingDiverged(
        f"the loss is no longer finite in epoch {epoch}; the state after epoch {epoch - 1} is kept; "
        f"lower --lr (it was {config.lr})",
        epoch - 1,
    )


def _check(model: nn.Module, config: TrainConfig, val: Images | None) -> None:
    """Raise where an option would silently do nothing."""
    get_attached(model)
    if config.select == "val" and val is None:
        raise VisgraftError("select='val' needs validation images; add a val folder, or raise --val-fraction")
    has_drop_path = any(isinstance(m, DropPath) and (m.drop_prob or 0) > 0 for m in model.modules())
    if config.drop_path and not has_drop_path:
        raise VisgraftError(
            f"drop_path is {config.drop_path}, but the model was created without; "
            "pass drop_path_rate to timm.create_model, or set drop_path=0"
        )


def _batches(loop: _Loop, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, labels) of an epoch's batches; the next one is made ready while the model computes."""
    task = loop.task
    size = loop.config.batch_size
    parts = draw_order(task.labels, loop.config, number).split(size)[: steps_per_epoch(len(task.labels), loop.config)]
    ready: Future[Tensor] = loop.loader.submit(task.inputs, parts[0], number)
    for indices, following in zip(parts, (*parts[1:], None), strict=True):
        begin = time.perf_counter()
        inputs = ready.result()
        loop.clock.waiting += time.perf_counter() - begin
        if following is not None:
            ready = loop.loader.submit(task.inputs, following, number)
        yield inputs, task.labels[indices.to(task.labels.device)]
        loop.clock.stepping += time.perf_counter() - begin


def _steps(loop: _Loop, number: int) -> Iterator[Epoch]:
    """Make one pass over the images and yield the figures so far after every step."""
    task, config, optimizer, clock = loop.task, loop.config, loop.optimizer, loop.clock
    steps = steps_per_epoch(len(task.labels), config)
    count = min(len(task.labels), steps * config.batch_size)
    loss_sum = torch.zeros((), device=loop.compute.device)
    right, seen = torch.zeros_like(loss_sum), 0
    for step, (x, y) in enumerate(_batches(loop, number)):
        loop.schedule.step_update((number - 1) * steps + (step if config.schedule == "step" else 0))
        with loop.compute.autocast():
            logits = task.network(x)
        loss = task.loss(logits.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if torch.isfinite(loss):
            optimizer.step()
        loss_sum += loss.detach() * len(y)
        if y.ndim == 1:
            right += (logits.detach().argmax(-1) == y).sum()
        seen += len(y)
        clock.seen += len(y)
        elapsed = time.perf_counter() - clock.start
        left = elapsed / clock.seen * (config.epochs * count - (number - 1) * count - seen)
        top1 = float(right / seen) if y.ndim == 1 else None
        lr = optimizer.param_groups[0]["lr"]
        yield Epoch(number, float(loss_sum / seen), top1, lr, clock.seen / elapsed, left)


def _validate(model: nn.Module, task: Objective, compute: Compute, batch_size: int = 64) -> dict[str, Any]:
    """Return loss and figures on the validation images, nothing where there are none."""
    if task.val_inputs is None or task.val_labels is None:
        return {}
    model.eval()
    with torch.no_grad(), compute.autocast():
        parts = torch.arange(len(task.val_labels)).split(batch_size)
        logits = torch.cat([task.network(task.val_inputs(indices)).float() for indices in parts])
    several = task.val_labels.ndim == 2
    plain_loss = F.binary_cross_entropy_with_logits if several else F.cross_entropy
    found = score(probabilities_of(logits, several).cpu(), task.val_labels.cpu())
    return {
        "val_loss": float(plain_loss(logits, task.val_labels)),
        "val_top1": found.top1,
        "val_macro_f1": found.macro_f1,
        "val_map": found.mean_average_precision,
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy an adapter's tensors back into a model that has its method attached."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
