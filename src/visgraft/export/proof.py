"""What is measured between the model and an exported file, by the runtime that the file is for, and what must hold."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visgraft.adapters.canary import canary_pixels, compare_canary
from visgraft.data.tasks import LabelTask
from visgraft.export.format import ExportError, Subject
from visgraft.export.samples import Samples
from visgraft.export.task_proof import agreement_by_task, least_of_tasks, rightness_by_task

TOLERANCE = 1e-4
"""Largest difference of a logit between two runtimes in float32, per unit of the largest logit, but at least of 1: both
sum the same products in another order."""

SMALL_TOLERANCE = 0.01
"""The same where all logits are small, so that the least tolerance could be the whole of them: this share at most."""

TIMED = 5


@dataclass(frozen=True)
class ExportCertificate:
    """What was measured on an exported file; differences are in units of the logits.

    `largest_difference` of any logit between the adapter in torch, float32, and the file in its own runtime, which had
    to stay below `tolerance` (None: agreement counts instead); `agreement` is the share of `images` with the same
    highest logit (of decisions, where an image may have several classes), which had to reach `least_agreement`.
    `accuracy` and `torch_accuracy` are the share of right answers, where the images have labels. `computed_by` names
    runtime and version. `seconds_per_image` and `torch_seconds_per_image` are medians on a batch of `timed_batch`, the
    latter by the same model in eager torch with as many threads. `facts` are the format's own.

    With several tasks, `tasks` holds for each what `agreement_by_task` says, and with labels what `rightness_by_task`
    says of the file and, with `torch_` before it, of torch; `agreement` is the lowest of them, `accuracy` None.
    """

    format: str
    options: Mapping[str, Any]
    method: str
    backbone: str
    merged: bool
    why_not_merged: str | None
    largest_difference: float
    tolerance: float | None
    agreement: float
    least_agreement: float | None
    images: int
    source: str
    accuracy: float | None
    torch_accuracy: float | None
    canary_difference: float | None
    computed_by: str
    bytes: int
    seconds_per_image: float
    torch_seconds_per_image: float
    timed_batch: int
    facts: Mapping[str, Any]
    versions: Mapping[str, str]
    verdict: str
    tasks: Mapping[str, Any] = field(default_factory=dict)


def torch_answers(model: nn.Module, samples: Samples) -> Tensor:
    """Return the model's logits [N, classes] in float32, computed by torch."""
    like = next(model.parameters())
    with torch.inference_mode():
        chunks = [
            model(samples.normalised(chunk).to(like.device, like.dtype)).float().cpu() for chunk in samples.batches()
        ]
    return torch.cat(chunks).flatten(1)


def compare_logits(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Return by how much any logit found differs, and what is allowed; infinite ones, of masked classes, must be equal.

    The difference is infinite where one of both is not a number, or only one is infinite.
    """
    finite = expected[expected.isfinite()].abs()
    largest = finite.max().item() if len(finite) else 0.0
    allowed = min(TOLERANCE * max(1.0, largest), SMALL_TOLERANCE * largest + 1e-6)
    apart = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return apart.masked_fill(found == expected, 0.0).max().item(), allowed


def check_finite(expected: Tensor, found: Tensor) -> None:
    """Raise where a model answers what is not a number, of which nothing can be proven, or only the file does.

    Raises:
        ExportError: it does; the share of equal answers would not show it.
    """
    if bool(expected.isnan().any()):
        raise ExportError(
            "the model answers what is not a number (NaN), so that nothing can be proven of a file; look for the cause "
            "in its weights or pictures, or train again with a lower learning rate"
        )
    if not bool(found[expected.isfinite()].isfinite().all()):
        raise ExportError(
            "the exported file answers with infinite logits, or what is not a number, where the model does not; "
            "nothing was written: export with --precision fp32"
        )


def agreement_of(expected: Tensor, found: Tensor, multi_label: bool) -> float:
    """Return the share of images with the same highest logit; of decisions where an image may have several classes."""
    if multi_label:
        return ((expected > 0) == (found > 0)).double().mean().item()
    return (expected.argmax(1) == found.argmax(1)).double().mean().item()


def accuracy_of(logits: Tensor, labels: Tensor | None) -> float | None:
    """Return the share of right answers, or decisions; None without labels."""
    if labels is None:
        return None
    if labels.ndim == 2:
        return ((logits > 0) == (labels > 0.5)).double().mean().item()
    return (logits.argmax(1) == labels).double().mean().item()


def measure(
    subject: Subject,
    answer: Callable[[Samples], Tensor],
    least_agreement: float | None,
    prepares: bool,
    images_each: int = 1,
) -> dict[str, Any]:
    """Return the measured fields of a certificate.

    Args:
        subject: what was exported.
        answer: computes the logits [N, classes] of samples by the file, and `images_each` images for each sample.
        least_agreement: share of equal answers demanded; None: every logit must agree.
        prepares: the file resizes and crops by itself.
        images_each: see `answer`.

    Raises:
        ExportError: the file answers otherwise than the model.
    """
    samples, record = subject.samples, subject.adapted.record
    expected = torch_answers(subject.adapted.model, samples)
    found = answer(samples).float().flatten(1)
    if found.shape != expected.shape:
        raise ExportError(
            f"the exported file answers {tuple(found.shape)} where the model answers {tuple(expected.shape)}; export "
            "to another format, and report this"
        )
    check_finite(expected, found)
    difference, allowed = compare_logits(expected, found)
    by_task = _by_task(expected, found, samples.labels, record.tasks)
    agreement = least_of_tasks(by_task) if by_task else agreement_of(expected, found, record.multi_label)
    measured = {
        "largest_difference": difference,
        "tolerance": allowed if least_agreement is None else None,
        "agreement": agreement,
        "least_agreement": least_agreement,
        "images": len(samples),
        "source": samples.source,
        "accuracy": None if by_task else accuracy_of(found, samples.labels),
        "torch_accuracy": None if by_task else accuracy_of(expected, samples.labels),
        # To a file that resizes by itself, the seeded picture would be another one.
        "canary_difference": None if prepares else _canary(subject, answer, least_agreement is None),
        **_times(subject, answer, images_each),
        "tasks": by_task,
    }
    measured["verdict"] = _verdict(measured)
    return measured


def _by_task(
    expected: Tensor, found: Tensor, labels: Tensor | None, tasks: Sequence[LabelTask]
) -> dict[str, dict[str, Any]]:
    """Return what the certificate says of each task."""
    told = agreement_by_task(expected, found, tasks)
    for name, right in rightness_by_task(found, labels, tasks).items():
        told[name] |= right
    for name, right in rightness_by_task(expected, labels, tasks).items():
        told[name] |= {f"torch_{figure}": value for figure, value in right.items()}
    return told


def _canary(subject: Subject, answer: Callable[[Samples], Tensor], demanded: bool) -> float | None:
    """Return by how much the file's answer to the adapter's seeded picture differs; None where there is no canary.

    Raises:
        ExportError: by more than is allowed, where that is demanded.
    """
    record = subject.adapted.record
    if record.canary is None:
        return None
    pixels = canary_pixels(record.data_config["input_size"])[None]
    one = Samples(pixels, None, record.data_config, "canary", lambda _: pixels[0].movedim(0, -1).numpy())
    found, allowed = compare_canary(answer(one)[0].flatten(), record.canary)
    if demanded and not found <= allowed:
        raise ExportError(
            f"the exported file answers the seeded picture otherwise than the adapter when saved: a logit differs by "
            f"{found:.2g}, above {allowed:.2g}; nothing was written: try another format"
        )
    return found


def _times(subject: Subject, answer: Callable[[Samples], Tensor], images_each: int) -> dict[str, Any]:
    """Return the median seconds per image of the file and of eager torch, in turn, on one small batch."""
    few = subject.samples.first(8)
    runs: dict[str, Callable[[], Any]] = {
        "seconds_per_image": lambda: answer(few),
        "torch_seconds_per_image": lambda: torch_answers(subject.model, few),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TIMED):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - begin) / len(few))
    seconds["seconds_per_image"] = [value / images_each for value in seconds["seconds_per_image"]]
    return {**{name: statistics.median(values) for name, values in seconds.items()}, "timed_batch": len(few)}


def _verdict(measured: Mapping[str, Any]) -> str:
    """Return a sentence that says what was measured and what it had to be.

    Raises:
        ExportError: it is not that.
    """
    difference, allowed = measured["largest_difference"], measured["tolerance"]
    agreement, least = measured["agreement"], measured["least_agreement"]
    by_task = measured["tasks"]
    to = f" to {min(by_task, key=lambda name: by_task[name]['agreement'])}" if by_task else ""
    where = f"on {measured['images']} {measured['source']}"
    if allowed is not None:
        if not difference <= allowed:
            raise ExportError(
                f"the exported file answers otherwise than the model: a logit differs by {difference:.2g} {where}, "
                f"above {allowed:.2g}; nothing was written: try another format, or with onnx another --opset"
            )
        return f"no logit differs by more than {difference:.1e} {where} ({allowed:.1e} allowed)"
    if not agreement >= least:
        raise ExportError(
            f"only {agreement:.1%} of the answers{to} are the model's {where}, below {least:.1%}; nothing was written: "
            "export with --precision fp32 (of peft: a larger --rank), or accept it with --least-agreement "
            f"{max(0.0, agreement - 0.001):.3f}"
        )
    return f"{agreement:.1%} of the answers{to} are the model's {where} ({least:.0%} demanded)"
