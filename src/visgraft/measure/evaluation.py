"""Accuracy with its interval, macro-F1, and what a run costs."""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, recall_score
from torch import Tensor, nn

from visgraft.core.tensors import eval_mode
from visgraft.data.fit import check_classes_fit, check_fit
from visgraft.data.images import Images
from visgraft.errors import DataError
from visgraft.executors.distributed import in_shares
from visgraft.measure.precision import Compute, make_compute


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on a set of images.

    All rates lie between 0 and 1. `top1_ci95` is Wilson's 95 % interval of top-1 (over images, not seeds),
    `balanced_accuracy` the mean over the classes of the share of their images that is right; it and `macro_f1` are
    taken over the classes of which there are images. `probabilities` is
    [N, classes] and `labels` int64 [N].

    Where an image may have several classes, `probabilities` are those of each class alone, `labels` float32
    [N, classes] of 0 and 1, `macro_f1` takes a class as answered from 0.5 on, and `mean_average_precision` (over the
    classes that occur) stands in place of `top1`, `top1_ci95` and `balanced_accuracy`, which are None.
    """

    top1: float | None
    top1_ci95: tuple[float, float] | None
    macro_f1: float
    balanced_accuracy: float | None
    mean_average_precision: float | None
    images: int
    seconds: float
    probabilities: Tensor
    labels: Tensor

    @property
    def figure(self) -> float:
        """What settings are chosen by: mean average precision where images have several classes, otherwise top-1."""
        figure = self.top1 if self.mean_average_precision is None else self.mean_average_precision
        assert figure is not None
        return figure


def logits_of(model: nn.Module, images: Images, compute: Compute, batch_size: int = 64) -> Tensor:
    """Return the model's outputs [N, outputs] in float32 on the CPU, in eval mode and without gradient.

    Several processes each answer their share of the images, and all of them get all answers.
    """
    model.to(compute.device)
    dtype = next(model.parameters(), torch.empty(0)).dtype

    def answer(batch: slice) -> Tensor:
        logits: Tensor = model(images.normalised(images.pixels[batch], compute.device).to(dtype))
        return logits.float().cpu()

    with torch.inference_mode(), compute.autocast(), eval_mode(model):
        outputs = in_shares(len(images), batch_size, answer)
    return outputs.clone()


def probabilities_of(logits: Tensor, multi_label: bool) -> Tensor:
    """Return probabilities [N, classes]: over all classes, or of each class alone where an image may have several."""
    return logits.sigmoid() if multi_label else logits.softmax(-1)


def evaluate(model: nn.Module, images: Images, precision: str = "auto") -> Evaluation:
    """Measure a model on images with labels.

    Raises:
        DataError: there are no images, or their size, channels or labels do not fit the model; nothing is done before.
    """
    check_fit(model, images)
    start = time.perf_counter()
    logits = logits_of(model, images, make_compute(precision))
    check_classes_fit(images, logits.shape[1])  # again, as not every model says how many outputs it has
    probabilities = probabilities_of(logits, images.multi_label)
    return score(probabilities, images.labels, time.perf_counter() - start)


def score(probabilities: Tensor, labels: Tensor, seconds: float = 0.0) -> Evaluation:
    """Return the figures of probabilities [N, classes] against labels: int64 [N], or [N, classes] of 0 and 1."""
    if labels.ndim == 2:
        return _score_multi_label(probabilities, labels, seconds)
    predicted, truth = probabilities.argmax(-1).numpy(), labels.numpy()
    right = int((predicted == truth).sum())
    interval = binomtest(right, len(truth)).proportion_ci(0.95, method="wilson")
    there = np.unique(truth)
    macro = float(f1_score(truth, predicted, labels=there, average="macro", zero_division=0))
    balanced = float(recall_score(truth, predicted, labels=there, average="macro", zero_division=0))
    limits = (float(interval.low), float(interval.high))
    return Evaluation(right / len(truth), limits, macro, balanced, None, len(truth), seconds, probabilities, labels)


def _score_multi_label(probabilities: Tensor, labels: Tensor, seconds: float) -> Evaluation:
    present = labels.sum(0) > 0
    if not bool(present.any()):
        raise DataError("none of the images has a class, so average precision has no meaning; add labelled images")
    precision = average_precision_score(labels[:, present].numpy(), probabilities[:, present].numpy(), average="macro")
    macro = float(f1_score(labels.numpy(), (probabilities >= 0.5).numpy(), average="macro", zero_division=0))
    return Evaluation(None, None, macro, None, float(precision), len(labels), seconds, probabilities, labels)


def peak_memory_bytes(to_come: int = 0) -> int:
    """Largest memory so far: of the accelerator where one is used, otherwise the resident set of this process.

    `to_come` bytes that the host is still to hold are added to the latter.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if (resident := _peak_of_linux()) is not None:
        return resident + to_come
    try:
        import resource
    except ImportError:  # Windows, where psutil knows the peak; elsewhere it only knows what is held now
        held = psutil.Process().memory_info()
        return int(getattr(held, "peak_wset", held.rss)) + to_come
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024) + to_come


def _peak_of_linux() -> int | None:
    """Return the largest resident set in bytes as Linux counts it; None elsewhere.

    Its `ru_maxrss` begins at that of the process which started this one, such as a notebook that holds another model.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, flags=re.M)
    return int(found[1]) * 1024 if found else None


def confusion(evaluation: Evaluation, classes: int) -> Any:
    """Return the confusion matrix as counts, int64 [true, predicted]."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (evaluation.labels.numpy(), evaluation.probabilities.argmax(-1).numpy()), 1)
    return counts


def is_multi_label(evaluation: Evaluation) -> bool:
    """Whether an image may have several classes: labels are then float [N, classes]."""
    return evaluation.labels.ndim == 2
