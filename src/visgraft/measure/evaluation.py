"""Accuracy with its interval, macro-F1, and what a run costs."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from visgraft.data.task_tensors import known, task_answers
from visgraft.data.tasks import LabelTask, column_slices, output_slices
from visgraft.errors import DataError
from visgraft.executors.distributed import in_shares
from visgraft.measure.intervals import RESAMPLES, clusters
from visgraft.measure.numbers import NumberFigures, number_figures
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

    With several tasks, `by_task` holds the figures of each on the images that have its label, `probabilities` are what
    `task_answers` makes of the outputs, and all rates are None.
    """

    top1: float | None
    top1_ci95: tuple[float, float] | None
    macro_f1: float | None
    balanced_accuracy: float | None
    mean_average_precision: float | None
    images: int
    seconds: float
    probabilities: Tensor
    labels: Tensor
    by_task: "Mapping[str, Evaluation | NumberFigures]" = field(default_factory=dict)

    @property
    def figure(self) -> float:
        """What settings are chosen by: mean average precision where images have several classes, otherwise top-1.

        With several tasks, the mean of their figures: these, or R² where it is above 0.
        """
        if self.by_task:
            return float(np.mean([one.figure for one in self.by_task.values()]))
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


def evaluate(model: nn.Module, images: Images, precision: str = "auto", *, resamples: int = RESAMPLES) -> Evaluation:
    """Measure a model on images with labels; intervals of numbers draw the images anew `resamples` times.

    Raises:
        DataError: there are no images, or their size, channels or labels do not fit the model; nothing is done before.
    """
    check_fit(model, images)
    start = time.perf_counter()
    logits = logits_of(model, images, make_compute(precision))
    check_classes_fit(images, logits.shape[1])  # again, as not every model says how many outputs it has
    answers, seconds = answers_of(logits, images.tasks, images.multi_label), time.perf_counter() - start
    return score_images(answers, images, seconds, resamples=resamples)


def answers_of(logits: Tensor, tasks: Sequence[LabelTask], multi_label: bool) -> Tensor:
    """Return what outputs [N, outputs] say: probabilities, and, with several tasks, numbers in their units."""
    return task_answers(logits, tasks) if tasks else probabilities_of(logits, multi_label)


def score_images(answers: Tensor, images: Images, seconds: float = 0.0, *, resamples: int = RESAMPLES) -> Evaluation:
    """Return the figures of answers [N, outputs] against the labels of images."""
    if images.tasks:
        members = clusters(images.groups, len(images))
        return score_tasks(answers, images.labels, images.tasks, seconds, members, resamples=resamples)
    return score(answers, images.labels, seconds)


def score_tasks(
    answers: Tensor,
    labels: Tensor,
    tasks: Sequence[LabelTask],
    seconds: float = 0.0,
    members: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """Return the figures of several tasks, each on the images whose label [N, columns] is known.

    `members` are the images' clusters, which the intervals of numbers draw anew `resamples` times, or not at all. A
    task without a known label is left out.

    Raises:
        DataError: no label is known.
    """
    found: dict[str, Evaluation | NumberFigures] = {}
    for task, outputs, columns in zip(tasks, output_slices(tasks), column_slices(tasks), strict=True):
        there, own = known(labels, task, columns)
        if not len(own) or (task.kind == "several_classes" and not bool(own.any())):
            continue
        said = answers[there][:, outputs]
        if task.kind == "number":
            alike = clusters((), len(labels)) if members is None else members
            found[task.name] = number_figures(said[:, 0], own, task.mean, alike[there.numpy()], resamples)
        else:
            found[task.name] = score(said, own, seconds)
    if not found:
        raise DataError("none of the images has a label of these tasks; fill in some")
    return Evaluation(None, None, None, None, None, len(labels), seconds, answers, labels, found)


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
    """Whether an image may have several classes, and nothing else is asked: labels are then float [N, classes]."""
    return evaluation.labels.ndim == 2 and not evaluation.by_task
