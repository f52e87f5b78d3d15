"""One training loop for every method; it knows no method's name."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.adapter import adapter_tensors
from visgraft.attach import get_attached
from visgraft.config import TrainConfig
from visgraft.data.images import Images, augmentation
from visgraft.errors import TrainingDiverged, VisgraftError
from visgraft.evaluate import make_accelerator, peak_memory_bytes, score


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch; during it, those so far. Rates lie between 0 and 1."""

    epoch: int
    loss: float
    top1: float
    lr: float
    images_per_second: float
    seconds_left: float
    complete: bool = False
    val_loss: float | None = None
    val_top1: float | None = None


@dataclass(frozen=True)
class Training:
    """What a training run did: its completed epochs, the epoch that was kept, and its costs."""

    history: tuple[Epoch, ...]
    kept_epoch: int
    seconds: float
    images_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Task:
    """What a step needs: the network that trains and its inputs, which are images or cached features."""

    network: nn.Module
    inputs: Callable[[Tensor, int], Tensor]
    labels: Tensor
    val_inputs: Callable[[Tensor], Tensor] | None
    val_labels: Tensor | None


def train(
    model: nn.Module,
    images: Images,
    config: TrainConfig,
    val: Images | None = None,
    on_progress: Callable[[Epoch], None] | None = None,
) -> Training:
    """Train what `attach` left trainable: AdamW, linear warm-up, cosine to zero, cross-entropy.

    Order, augmentation and dropout depend on (seed, epoch, index) alone. Where only the head trains and images are
    not augmented, it trains on features computed once.

    Args:
        model: a model with something attached, in place.
        images: the training images.
        config: how to train.
        val: validation images, measured after every epoch; needed for `select="val"`.
        on_progress: called after every step and, with `complete` set, after every epoch.

    Raises:
        TrainingDiverged: the loss stopped being finite; the model holds the last good epoch's state.
        VisgraftError: an option would have no effect, or nothing is attached.
    """
    _check(model, config, val)
    begin = time.perf_counter()
    accelerator = make_accelerator(config.precision)
    model.to(accelerator.device)
    task = _make_task(model, images, val, config, accelerator)
    optimizer, schedule = _optimizer(model, config, len(images))
    start, history, good = time.perf_counter(), list[Epoch](), _state(model)
    best = (-1.0, 0, good)
    parts = {"optimizer": optimizer, "schedule": schedule, "accelerator": accelerator, "start": start}
    for number in range(1, config.epochs + 1):
        torch.manual_seed(int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0]))
        model.train()
        for epoch in _steps(task, config, number, **parts):
            finite = np.isfinite(epoch.loss)
            if not finite:
                break
            if on_progress:
                on_progress(epoch)
        state = _state(model)
        if not (finite and all(bool(tensor.isfinite().all()) for tensor in state.values())):
            _restore(model, good)
            message = f"the loss is no longer finite in epoch {number}; the state after epoch {number - 1} is kept; "
            raise TrainingDiverged(f"{message}lower --lr (it was {config.lr})", number - 1)
        good = state
        epoch = replace(epoch, complete=True, **_validate(model, task, accelerator))
        history.append(epoch)
        if epoch.val_top1 is not None and epoch.val_top1 > best[0]:
            best = (epoch.val_top1, number, good)
        if on_progress:
            on_progress(epoch)
    kept = config.epochs
    if config.select == "val":
        kept = best[1]
        _restore(model, best[2])
    seconds = time.perf_counter() - begin
    model.eval()
    return Training(tuple(history), kept, seconds, config.epochs * len(images) / seconds, peak_memory_bytes())


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


def _make_task(model: nn.Module, images: Images, val: Images | None, config: TrainConfig, accelerator: Any) -> _Task:
    """Train the whole model on images, or only its head on features that never change."""
    attached, device = get_attached(model), accelerator.device
    augment = augmentation(images, config.flip, config.rand_augment, config.seed)
    val_labels = None if val is None else val.labels.to(device)
    frozen_features = not (attached.where or attached.unfrozen or augment or config.drop_path)
    if frozen_features and len(attached.head) == 1:  # a distilled model's head has two parts, which see two tokens
        features = _features(model, images, accelerator)
        val_features = None if val is None else _features(model, val, accelerator)
        return _Task(
            model.get_classifier(),  # type: ignore[operator]
            lambda indices, epoch: features[indices],
            images.labels.to(device),
            None if val_features is None else lambda indices: val_features[indices],
            val_labels,
        )

    def inputs(indices: Tensor, epoch: int) -> Tensor:
        pixels = augment(indices, epoch) if augment else images.pixels[indices]
        return images.normalised(pixels, device)

    def val_inputs(indices: Tensor) -> Tensor:
        assert val is not None
        return val.normalised(val.pixels[indices], device)

    return _Task(model, inputs, images.labels.to(device), None if val is None else val_inputs, val_labels)


def _features(model: Any, images: Images, accelerator: Any, batch_size: int = 64) -> Tensor:
    """Return what enters the head, [N, width] in float32."""
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        parts = [
            model.forward_head(model.forward_features(x.to(accelerator.device)), pre_logits=True).float()
            for x, _ in images.batches(batch_size)
        ]
    return torch.cat(parts)


def _optimizer(model: nn.Module, config: TrainConfig, images: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW with a group for the head, and timm's warm-up and cosine schedule, stepped per update."""
    inside = tuple(f"{path}." for path in get_attached(model).head)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if inside and name.startswith(inside)]
    rest = [p for name, p in trained if not (inside and name.startswith(inside))]
    groups = [{"params": rest, "lr": config.lr}, {"params": head, "lr": config.head_lr or config.lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, weight_decay=config.weight_decay)
    per_epoch = -(-images // config.batch_size)
    warmup = min(round(config.warmup_epochs * per_epoch), config.epochs * per_epoch - 1)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * per_epoch - warmup,
        warmup_t=warmup,
        warmup_lr_init=min(config.lr, config.head_lr or config.lr) * 1e-3,  # one start for both groups; both rise
        warmup_prefix=True,
        t_in_epochs=False,
    )
    return optimizer, schedule


def _steps(
    task: _Task, config: TrainConfig, number: int, *, optimizer: Any, schedule: Any, accelerator: Any, start: float
) -> Iterator[Epoch]:
    """Make one pass over the images and yield the figures so far after every step."""
    count = len(task.labels)
    order = torch.from_numpy(np.random.default_rng((config.seed, number)).permutation(count))
    parts = order.split(config.batch_size)
    loss_sum = torch.zeros((), device=accelerator.device)
    right, seen = torch.zeros_like(loss_sum), 0
    for step, indices in enumerate(parts):
        schedule.step_update((number - 1) * len(parts) + step)
        x, y = task.inputs(indices, number), task.labels[indices.to(task.labels.device)]
        with accelerator.autocast():
            logits = task.network(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        if torch.isfinite(loss):
            optimizer.step()
        loss_sum += loss.detach() * len(y)
        right += (logits.detach().argmax(-1) == y).sum()
        seen += len(y)
        elapsed = time.perf_counter() - start
        done = (number - 1) * count + seen
        left = elapsed / done * (config.epochs * count - done)
        lr = optimizer.param_groups[0]["lr"]
        yield Epoch(number, float(loss_sum / seen), float(right / seen), lr, done / elapsed, left)


def _validate(model: nn.Module, task: _Task, accelerator: Any, batch_size: int = 64) -> dict[str, Any]:
    """Return loss and accuracy on the validation images, nothing where there are none."""
    if task.val_inputs is None or task.val_labels is None:
        return {}
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        parts = torch.arange(len(task.val_labels)).split(batch_size)
        logits = torch.cat([task.network(task.val_inputs(indices)).float() for indices in parts])
    loss = F.cross_entropy(logits, task.val_labels)
    return {"val_loss": float(loss), "val_top1": score(logits.softmax(-1).cpu(), task.val_labels.cpu()).top1}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
