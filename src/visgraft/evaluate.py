"""Accuracy with its interval, macro-F1, and what a run costs."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.backbone import Adapted
from visgraft.data.decode import open_image
from visgraft.data.images import Images


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on a set of images.

    `top1` and `macro_f1` lie between 0 and 1, `top1_ci95` is Wilson's 95 % interval of top-1 (images, not seeds),
    `probabilities` [N, classes] and `labels` [N] allow everything else to be computed.
    """

    top1: float
    top1_ci95: tuple[float, float]
    macro_f1: float
    images: int
    seconds: float
    probabilities: Tensor
    labels: Tensor


def make_accelerator(precision: str) -> Accelerator:
    """Return accelerate's view of the device with the precision `auto`, `fp32` or `bf16`."""
    wanted = "bf16" if resolve_precision(precision) == "bf16" else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state(True)  # accelerate keeps one precision per process and refuses another
    return Accelerator(mixed_precision=wanted)


def resolve_precision(precision: str) -> str:
    """Return `fp32` or `bf16`; `auto` is bf16 where this machine computes faster in it."""
    return _faster_precision() if precision == "auto" else precision


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


def _linear_seconds(dtype: torch.dtype) -> float:
    """Time one small linear layer: less than what a scheduler gives to a process at once."""
    x, weight = torch.ones(256, 384, dtype=dtype), torch.ones(1152, 384, dtype=dtype)
    start = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - start


def logits_of(model: nn.Module, images: Images, accelerator: Accelerator, batch_size: int = 64) -> Tensor:
    """Return the model's outputs [N, outputs] in float32 on the CPU, in eval mode and without gradient."""
    training, outputs = model.training, []
    model.eval().to(accelerator.device)
    with torch.inference_mode(), accelerator.autocast():
        for start in range(0, len(images), batch_size):
            x = images.normalised(images.pixels[start : start + batch_size], accelerator.device)
            outputs.append(model(x).float().cpu())
    model.train(training)
    return torch.cat(outputs).clone()


def evaluate(model: nn.Module, images: Images, precision: str = "auto") -> Evaluation:
    """Measure a model on images with labels."""
    start = time.perf_counter()
    probabilities = logits_of(model, images, make_accelerator(precision)).softmax(-1)
    return score(probabilities, images.labels, time.perf_counter() - start)


def score(probabilities: Tensor, labels: Tensor, seconds: float = 0.0) -> Evaluation:
    """Return the figures of predicted probabilities [N, classes] against labels [N]."""
    predicted = probabilities.argmax(-1)
    right = int((predicted == labels).sum())
    interval = binomtest(right, len(labels)).proportion_ci(0.95, method="wilson")
    macro = f1_score(labels.numpy(), predicted.numpy(), average="macro", zero_division=0)
    limits = (float(interval.low), float(interval.high))
    return Evaluation(right / len(labels), limits, float(macro), len(labels), seconds, probabilities, labels)


def predict(adapted: Adapted, paths: Sequence[str | Path], top: int = 1) -> list[list[tuple[str, float]]]:
    """Return per image the `top` most probable classes with their probabilities, most probable first.

    Raises:
        DataError: a file is no image.
    """
    device = next(adapted.model.parameters()).device
    classes = adapted.classes or tuple(str(i) for i in range(int(getattr(adapted.model, "num_classes", 0))))
    found = []
    with torch.inference_mode():
        for path in paths:
            x = adapted.transform(open_image(Path(path)))[None].to(device)
            best = adapted.model(x)[0].float().softmax(-1).topk(min(top, len(classes)))
            found.append([(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)])
    return found


def peak_memory_bytes() -> int:
    """Largest memory so far: of the accelerator where one is used, otherwise the resident set of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def confusion(evaluation: Evaluation, classes: int) -> Any:
    """Return the confusion matrix as counts, int64 [true, predicted]."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (evaluation.labels.numpy(), evaluation.probabilities.argmax(-1).numpy()), 1)
    return counts
