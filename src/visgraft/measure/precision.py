"""The device and the precision in which models compute, and what makes bf16 fast on a CPU."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.executors import distributed

MOST_UNFUSED_TOKENS = 400
"""Up to here attention in bf16 on a CPU is computed step by step; beyond, its matrix would take too much memory."""


@dataclass(frozen=True)
class Compute:
    """Where a model computes, and in which precision: `fp32`, or `bf16` by autocast."""

    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which what torch lists for it is computed in bf16, if that is the precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def make_compute(precision: str) -> Compute:
    """Return the device, an accelerator where there is one, with the precision `auto`, `fp32` or `bf16`."""
    found = distributed.device() or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return Compute(found, resolve_precision(precision))


def resolve_precision(precision: str) -> str:
    """Return `fp32` or `bf16`; `auto` is bf16 where this machine computes faster in it."""
    return distributed.from_first(_faster_precision) if precision == "auto" else precision


@cache
def _faster_precision() -> str:
    """Find the faster precision, on a CPU by timing a linear layer for some milliseconds, once per process.

    A CPU's flags do not tell: with the same AVX512-bf16, one runs it 1.7 times as fast in bf16, another half as fast.
    """
    if torch.accelerator.is_available():
        cuda = torch.cuda.is_available()
        return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other busy processes, several threads would time how they wait for each other
    try:
        fp32, bf16 = (min(_linear_seconds(dtype) for _ in range(20)) for dtype in (torch.float32, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    return "bf16" if 1.2 * bf16 < fp32 else "fp32"  # a clear lead only, so that the next run decides alike


@contextlib.contextmanager
def frozen_weights_in_bf16(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Hold the frozen linear and convolutional layers in bf16 inside the context, if `wanted`, and give them back.

    Autocast would convert them in every step, to the very same numbers. The float32 ones stay in memory meanwhile.
    """
    layers = [m for m in model.modules() if wanted and isinstance(m, nn.Linear | nn.Conv2d)]
    found = dict.fromkeys(parameter for layer in layers for parameter in layer.parameters(recurse=False))
    frozen = [parameter for parameter in found if not parameter.requires_grad and parameter.dtype == torch.float32]
    whole = [parameter.data for parameter in frozen]
    try:
        for parameter in frozen:
            parameter.data = parameter.data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in zip(frozen, whole, strict=True):
            parameter.data = data


@contextlib.contextmanager
def unfused_attention(model: nn.Module, bf16: bool = True) -> Iterator[None]:
    """Compute attention as two products and a softmax inside the context: on a CPU, in `bf16`, where gradients flow.

    With few tokens torch's fused attention takes up to five times as long there, nearly all of it in the backward pass
    (`benchmarks/attention.py`). Without gradients it stays, as it rounds less. Modules with timm's switch `fused_attn`
    are meant.
    """
    like = next(model.parameters(), None)
    wanted = bf16 and like is not None and like.device.type == "cpu"
    modules = [m for m in model.modules() if wanted and getattr(m, "fused_attn", False) is True]
    handles = [module.register_forward_pre_hook(_choose_attention) for module in modules]
    try:
        yield
    finally:
        for module, handle in zip(modules, handles, strict=True):
            handle.remove()
            module.fused_attn = True  # type: ignore[assignment]


def _choose_attention(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Set timm's switch by the tokens of the input [B, ..., C] that comes."""
    x: Tensor = args[0]
    module.fused_attn = not torch.is_grad_enabled() or x.shape[1:-1].numel() > MOST_UNFUSED_TOKENS  # type: ignore[assignment]


def _linear_seconds(dtype: torch.dtype) -> float:
    """Time one small linear layer: less than what a scheduler gives to a process at once."""
    x, weight = torch.ones(256, 384, dtype=dtype), torch.ones(1152, 384, dtype=dtype)
    start = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - start
