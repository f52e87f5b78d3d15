"""One training loop for every method; it knows no method's name."""

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.adapters.directory import adapter_tensors
from visgraft.backbones.wrappers import unwrapped
from visgraft.core.attached import get_attached
from visgraft.core.draws import check_divisible
from visgraft.data.fit import check_fit
from visgraft.data.images import Images
from visgraft.data.task_tensors import task_answers
from visgraft.errors import DataError, TrainingDiverged, VisgraftError, warn_user
from visgraft.executors import distributed
from visgraft.executors.distributed import in_shares
from visgraft.measure.evaluation import peak_memory_bytes, probabilities_of, score, score_tasks
from visgraft.measure.precision import Compute, frozen_weights_in_bf16, make_compute, unfused_attention
from visgraft.options import TrainConfig
from visgraft.training.allocation import freed_memory_kept
from visgraft.training.objective import Features, Objective, checkpointing, draw_order, make_objective
from visgraft.training.optimizer import make_optimizer, steps_per_epoch
from visgraft.training.pieces import Outcome, Piece, add_gradients, check_pieces, is_divided, pieces_of
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


@dataclass
class StepClock:
    """When the first epoch began, how many images were seen since, and for how many seconds steps waited and took."""

    start: float
    seen: int = 0
    waiting: float = 0.0
    stepping: float = 0.0


class Ready(NamedTuple):
    """What `training_loop` yields before its first epoch."""

    task: Objective
    clock: StepClock


class EpochKept(NamedTuple):
    """What `training_loop` yields when an epoch's tensors are copied, before they are measured."""

    tensors: dict[str, Tensor]


Event = Ready | Epoch | EpochKept | TrainState


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
    on_warning: Callable[[str], None] = warn_user,
) -> Training:
    """Train what `attach` left trainable: AdamW, linear warm-up, cosine, cross-entropy.

    Where images may have several classes, the loss is binary cross-entropy. Chance depends on (seed, epoch, index)
    alone. On images without augmentation, frozen blocks before the first trained one run once per image, as all of the
    backbone does where the head trains alone. Processes that have joined (`visgraft.executors.distributed`) share each
    batch, and all of them end with the same weights.

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
        DataError: there are no images, or their size, channels or labels do not fit the model; nothing is done before.
        VisgraftError: an option would have no effect, or nothing is attached.
    """
    begin, state = time.perf_counter(), resume or TrainState(0, {})
    first = state.epoch
    loop = training_loop(model, images, config, val, features=features, resume=resume, on_warning=on_warning)
    with closing(loop) as events:  # at once, also where a caller's function raises: the model is held as it trains
        for event in events:
            if isinstance(event, Ready):
                ready = event
            elif isinstance(event, TrainState):
                state = event
                if on_state:
                    on_state(state)
            if on_progress and isinstance(event, Epoch | TrainState):
                on_progress(event if isinstance(event, Epoch) else event.history[-1])
    kept = state.best_epoch if config.select == "val" else config.epochs
    if config.select == "val":
        restore(model, state.best)
    model.eval()
    seconds, seen = time.perf_counter() - begin, (config.epochs - first) * len(images)
    waiting = ready.clock.waiting / max(ready.clock.stepping, 1e-9)
    once = ready.task.kept_bytes
    return Training(state.history, kept, seconds, seen / seconds, peak_memory_bytes(), waiting, once)


def training_loop(
    model: nn.Module,
    images: Images,
    config: TrainConfig,
    val: Images | None = None,
    *,
    features: Features | None = None,
    resume: TrainState | None = None,
    on_warning: Callable[[str], None] = warn_user,
) -> Generator[Event, bool | None, None]:
    """Train, and yield what happens: when all is ready, every step's figures, and the state after every epoch.

    Who sends True after a step ends the epoch there. Arguments and errors are those of `train`.
    """
    _check(model, images, config, val)
    network, model, compute = model, unwrapped(model), make_compute(config.precision)
    network.to(compute.device)
    task = make_objective(model, network, images, val, config, compute, features, on_warning)
    optimizer, schedule = make_optimizer(model, config, len(images))
    state = resume or TrainState(0, distributed.take_from_first(_tensors(model)))
    if distributed.count() > 1:  # where the images decided, a device's rounding may have
        restore(model, state.tensors)
    if resume:
        _check_state(model, optimizer, resume, config)
        restore(model, state.tensors)
        restore_optimizer(optimizer, state.optimizer)
    with _held(model, network, task, config) as loader:
        clock, steps = StepClock(time.perf_counter()), steps_per_epoch(len(task.labels), config)
        yield Ready(task, clock)
        for number in range(state.epoch + 1, config.epochs + 1):
            torch.manual_seed(int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0]))
            network.train()
            tally = _Tally(number, config, task.labels, steps, clock)
            with _fast(model, compute):
                for step, (batch, pieces, inputs) in enumerate(_batches(task, config, number, loader, clock)):
                    schedule.step_update((number - 1) * steps + (step if config.schedule == "step" else 0))
                    optimizer.zero_grad(set_to_none=True)
                    found = add_gradients(task, model, batch, pieces, inputs, compute)
                    if not torch.isfinite(found.loss):
                        restore(model, state.tensors)
                        raise _diverged(number, config)
                    optimizer.step()
                    if (yield tally.after(found, len(batch), optimizer.param_groups[0]["lr"])):
                        break
                tensors, moments = _tensors(model), optimizer_tensors(optimizer)
                if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                    restore(model, state.tensors)
                    raise _diverged(number, config)
                yield EpochKept(tensors)
                epoch = replace(tally.last, complete=True, **_validate(network, task, compute))
            state = state.after(epoch, tensors, moments)
            yield state


def _check_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, config: TrainConfig) -> None:
    """Raise unless a state is one of this model and optimizer, tensor by tensor, and before the end."""
    own = get_attached(model).stored()
    wrong = sorted(own.keys() ^ state.tensors.keys())
    wrong += [name for name in own if name in state.tensors and own[name].shape != state.tensors[name].shape]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, moment in state.optimizer.items():
        number = int(key.split(".", 1)[0])
        if number >= len(parameters) or (moment.ndim and moment.shape != parameters[number].shape):
            wrong.append(f"the optimizer's {key}")
    if wrong:
        raise VisgraftError(
            f"the state to resume is of another training: {', '.join(wrong[:3])}; attach the same method to the same "
            "model, and let the same tensors train"
        )
    if state.epoch > config.epochs:
        raise VisgraftError(f"the state to resume is after epoch {state.epoch}, past epochs={config.epochs}; raise it")


@contextmanager
def _held(model: nn.Module, network: nn.Module, task: Objective, config: TrainConfig) -> Iterator[ThreadPoolExecutor]:
    """Keep what all epochs share; yield who makes batches ready."""
    with (
        ThreadPoolExecutor(1) as loader,
        freed_memory_kept(model),
        checkpointing(model, task.network is network, config.grad_checkpointing),
    ):
        yield loader


@contextmanager
def _fast(model: nn.Module, compute: Compute) -> Iterator[None]:
    """Hold the model as it trains fastest; between epochs its callers find it as it was."""
    bf16 = compute.precision == "bf16"
    with frozen_weights_in_bf16(model, bf16), unfused_attention(model, bf16):
        yield


class _Tally:
    """The figures of an epoch of so many steps so far."""

    def __init__(self, number: int, config: TrainConfig, labels: Tensor, steps: int, clock: StepClock) -> None:
        self.number, self.config, self.clock = number, config, clock
        self.count, self.several = min(len(labels), steps * config.batch_size), labels.ndim == 2
        self.loss, self.right, self.seen = labels.new_zeros((), dtype=torch.float32), labels.new_zeros(()), 0
        self.last = Epoch(number, 0.0, None, 0.0, 0.0, 0.0)

    def after(self, found: Outcome, images: int, lr: float) -> Epoch:
        """Return the figures after one more step on so many images."""
        clock = self.clock
        self.loss += found.loss * images
        self.right = self.right + found.right
        self.seen += images
        clock.seen += images
        elapsed = time.perf_counter() - clock.start
        to_come = (self.config.epochs - self.number + 1) * self.count - self.seen
        top1 = None if self.several else float(self.right / self.seen)
        speed, left = clock.seen / elapsed, elapsed / clock.seen * to_come
        self.last = Epoch(self.number, float(self.loss / self.seen), top1, lr, speed, left)
        return self.last


def _batches(
    task: Objective, config: TrainConfig, number: int, loader: ThreadPoolExecutor, clock: StepClock
) -> Iterator[tuple[Tensor, list[Piece], Iterator[Tensor]]]:
    """Yield an epoch's batches: the images' numbers [B], the pieces of it that run here, and the inputs of each."""
    order = draw_order(task.labels, config, number)
    batches = order.split(config.batch_size)[: steps_per_epoch(len(task.labels), config)]
    pieces = [pieces_of(batch, config) for batch in batches]
    inputs = _inputs(task, [piece for some in pieces for piece in some], number, loader, clock)
    for batch, some in zip(batches, pieces, strict=True):
        begin = time.perf_counter()
        yield batch, some, inputs
        clock.stepping += time.perf_counter() - begin


def _inputs(
    task: Objective, pieces: list[Piece], number: int, loader: ThreadPoolExecutor, clock: StepClock
) -> Iterator[Tensor]:
    """Yield the inputs of pieces; the next one's are made ready while the model computes."""
    ready: Future[Tensor] | None = None
    for piece, following in zip(pieces, (*pieces[1:], None), strict=True):
        begin = time.perf_counter()
        inputs = (ready or loader.submit(task.inputs, piece.loaded, number)).result()
        clock.waiting += time.perf_counter() - begin
        ready = None if following is None else loader.submit(task.inputs, following.loaded, number)
        yield inputs


def _validate(model: nn.Module, task: Objective, compute: Compute, batch_size: int = 64) -> dict[str, Any]:
    """Return loss and figures on the validation images, nothing where there are none."""
    if task.val_inputs is None or task.val_labels is None:
        return {}
    model.eval()
    everything, seen = torch.arange(len(task.val_labels)), task.val_inputs
    with torch.no_grad(), compute.autocast():
        logits = in_shares(len(everything), batch_size, lambda part: task.network(seen(everything[part])).float())
    if task.tasks:
        answers = task_answers(logits, task.tasks).cpu()
        found = score_tasks(answers, task.val_labels.cpu(), task.tasks, resamples=0)
        return {"val_loss": float(task.loss(logits, task.val_labels)), "val_mean": found.figure}
    several = task.val_labels.ndim == 2
    plain_loss = F.binary_cross_entropy_with_logits if several else F.cross_entropy
    found = score(probabilities_of(logits, several).cpu(), task.val_labels.cpu())
    return {
        "val_loss": float(plain_loss(logits, task.val_labels)),
        "val_top1": found.top1,
        "val_macro_f1": found.macro_f1,
        "val_map": found.mean_average_precision,
    }


def _diverged(epoch: int, config: TrainConfig) -> TrainingDiverged:
    return TrainingDiverged(
        f"the loss is no longer finite in epoch {epoch}; the state after epoch {epoch - 1} is kept; "
        f"train with a lower --lr (it was {config.lr})",
        epoch - 1,
    )


def _check(model: nn.Module, images: Images, config: TrainConfig, val: Images | None) -> None:
    """Raise where the images do not fit the model or each other, or an option would silently do nothing."""
    get_attached(model)
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise VisgraftError(
            f"the model is in {str(dtype).removeprefix('torch.')}; call model.float() first, and train with "
            "precision='bf16' for bf16 arithmetic"
        )
    check_fit(model, images, "training images")
    if val is not None:
        check_fit(model, val, "validation images")
        if val.multi_label != images.multi_label:
            raise DataError(
                "of training and validation images only one kind may have several classes per image; give both labels "
                "int64 [N], or both float32 [N, classes]"
            )
        if val.tasks != images.tasks:
            raise DataError("training and validation images have labels for other tasks; read both from one data set")
    if config.select == "val" and val is None:
        raise VisgraftError("select='val' needs validation images; add a val folder, or raise --val-fraction")
    has_drop_path = any(isinstance(m, DropPath) and (m.drop_prob or 0) > 0 for m in model.modules())
    if config.drop_path and not has_drop_path:
        raise VisgraftError(
            f"drop_path is {config.drop_path}, but the model was created without; "
            "pass drop_path_rate to timm.create_model, or set drop_path=0"
        )
    check_pieces(config)
    if is_divided(config):
        if get_attached(model).config.passes:
            raise VisgraftError(
                "tasks with passes of their own cannot be run in pieces of a batch; use one process and no "
                "gradient_accumulation, or let the tasks share all"
            )
        check_divisible(unwrapped(model))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy an adapter's tensors back into a model that has its method attached."""
    own = unwrapped(model).state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
