"""Chance in a forward pass over some images of a batch: drawn for all of it, so that each gets what it would there.

torch's generators give every image another draw than in the whole batch as soon as fewer images run. So that a batch
can be run in pieces, here or in several processes, what drops features draws for all images and takes its own rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from visgraft.errors import VisgraftError


class Rows(NamedTuple):
    """The images `start` to `stop` of a batch of `total`."""

    start: int
    stop: int
    total: int


_running: list[Rows] = []
"""The images that run; of the process, as torch's generators are, because a block is computed anew in other threads."""


def rows_to_draw(rows: int) -> tuple[int, slice]:
    """Return for how many rows to draw, and which of them are those that run; an image's rows are adjacent."""
    if not _running:
        return rows, slice(None)
    start, stop, total = _running[-1]
    each, rest = divmod(rows, stop - start)
    if rest:  # what is dropped is not images, but something that all share
        return rows, slice(None)
    return total * each, slice(start * each, stop * each)


@contextmanager
def drawn_for_batch(model: nn.Module, rows: Rows | None) -> Iterator[None]:
    """Let a model that runs some images of a batch draw as for all of them; None: they are all.

    timm's DropPath, torch's Dropout and `LowRank` do; `check_divisible` refuses others.
    """
    if rows is None:
        yield
        return
    drawing = [m for m in model.modules() if m.training and isinstance(m, DropPath | nn.Dropout) and _rate(m)]
    before = [vars(module).get("forward") for module in drawing]
    _running.append(rows)
    try:
        for module in drawing:
            vars(module)["forward"] = partial(_drop_path if isinstance(module, DropPath) else _dropout, module)
        yield
    finally:
        _running.pop()
        for module, forward in zip(drawing, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _drop_path(module: DropPath, x: Tensor) -> Tensor:
    """timm's DropPath on x [B, ...] with the draws of all rows."""
    keep = 1 - module.drop_prob
    count, own = rows_to_draw(len(x))
    mask = x.new_empty((count,) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    if keep > 0.0 and module.scale_by_keep:
        mask.div_(keep)
    return x * mask[own]


def _dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    """torch's Dropout on x [B, ...] with the draws of all rows."""
    count, own = rows_to_draw(len(x))
    return x * F.dropout(x.new_ones(count, *x.shape[1:]), module.p, True)[own]


def _rate(module: nn.Module) -> float:
    rates = [getattr(module, name, None) for name in ("p", "prob", "drop_prob")]
    return max((float(rate) for rate in rates if isinstance(rate, int | float)), default=0.0)


def check_divisible(model: nn.Module) -> None:
    """Raise where a batch that is run in pieces would train a model otherwise than in one.

    Args:
        model: the model, with something attached; it is left in eval mode.

    Raises:
        VisgraftError: a module in training mode takes statistics of the batch, or draws for it in a way of its own.
    """
    model.train()
    training = {name: module for name, module in model.named_modules() if module.training}
    model.eval()
    for name, module in training.items():
        if isinstance(module, _NormBase):
            raise VisgraftError(
                f"{name} trains on statistics of the whole batch, which cannot be run in pieces: use one process and "
                "no gradient_accumulation, or a method that leaves the backbone's norms alone"
            )
        own_way = not isinstance(module, DropPath | nn.Dropout) or name.endswith("attn_drop")
        if _rate(module) and own_way:
            raise VisgraftError(
                f"{name} ({type(module).__name__}) draws in a way of its own, which differs in pieces of a batch: use "
                "one process and no gradient_accumulation, or set its rate to 0"
            )


def device_generators(device: torch.device) -> list[int]:
    """Return the devices whose generator a forward pass draws from beside the CPU's, for `torch.random.fork_rng`."""
    return [] if device.type == "cpu" else [device.index or 0]
