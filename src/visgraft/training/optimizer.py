"""The optimizer and the schedule of its learning rates, in steps."""

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from visgraft.core.attached import get_attached
from visgraft.errors import VisgraftError
from visgraft.options import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig, images: int) -> tuple[torch.optim.Optimizer, Any]:
    """Return AdamW with groups for the head and the backbone's own tensors, and timm's warm-up and cosine schedule.

    The schedule is stepped per update.

    Raises:
        VisgraftError: `min_lr` lies above the peak, `drop_last` leaves no step, or `backbone_lr` has no effect.
    """
    attached = get_attached(model)
    inside = tuple(f"{path}." for path in attached.head)
    own = set(attached.unfrozen)
    parts: dict[str, list[nn.Parameter]] = {"method": [], "head": [], "backbone": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_head = bool(inside) and name.startswith(inside)
            parts["head" if in_head else "backbone" if name in own else "method"].append(parameter)
    if config.backbone_lr and not parts["backbone"]:
        raise VisgraftError(
            f"backbone_lr has no effect: {attached.config.method} trains no tensor of the backbone itself; "
            "leave it out, or let some train with --also-train"
        )
    steps = {"method": config.lr, "head": config.head_lr or config.lr, "backbone": config.backbone_lr or config.lr}
    groups = [{"params": parts[name], "lr": steps[name]} for name in ("method", "backbone", "head") if parts[name]]
    device = next(p for group in parts.values() for p in group).device.type
    fused = device in ("cpu", "cuda", "mps")  # a fifth of the time for many small tensors
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    per_epoch = steps_per_epoch(images, config)
    lowest = min(steps.values())
    if config.min_lr > lowest:
        raise VisgraftError(f"min_lr is {config.min_lr}, above the peak of {lowest}; lower it")
    warmup = min(round(config.warmup_epochs * per_epoch), config.epochs * per_epoch - 1)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * per_epoch - warmup,
        warmup_t=warmup,
        lr_min=config.min_lr,
        warmup_lr_init=config.warmup_lr or lowest * 1e-3,  # one start for all groups; all rise
        warmup_prefix=True,
        t_in_epochs=False,
    )
    return optimizer, schedule


def steps_per_epoch(images: int, config: TrainConfig) -> int:
    """Return how many steps an epoch over so many images has.

    Raises:
        VisgraftError: `drop_last` leaves none.
    """
    if config.drop_last and images < config.batch_size:
        raise VisgraftError(
            f"drop_last leaves none of {images} images in batches of {config.batch_size}; lower the batch size"
        )
    return images // config.batch_size if config.drop_last else -(-images // config.batch_size)
