"""From measured methods to one sentence: which method to use, by how much, and whether the images can tell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from visgraft.core.configure import default_setting
from visgraft.data.tasks import output_slices
from visgraft.measure.intervals import RESAMPLES, Difference, paired_difference, spread
from visgraft.option_types import written as option_text
from visgraft.training.crossval import Predictions

PAIR_IMAGES = 20
"""Fewer images of two classes cannot show that a method confuses them at random."""


@dataclass(frozen=True)
class Candidate:
    """A method at its best setting: its figure, its trained parameters without the head, whether it folds away."""

    method: str
    setting: Mapping[str, Any]
    figure: float
    parameters: int
    mergeable: bool

    @property
    def flags(self) -> str:
        """The options of `visgraft train` that repeat this setting."""
        return " ".join(["--method", self.method, *typed(self.method, self.setting)])

    @property
    def called(self) -> str:
        """Its name in a sentence: what trains no parameter beside the head is a linear probe."""
        return self.method if self.parameters else "a linear probe"


def written(setting: Mapping[str, Any], default: Mapping[str, Any] | None = None) -> list[str]:
    """Return a setting as words of the command line; what is off or None stays out unless `default` has a value."""
    words = []
    for name, value in setting.items():
        nothing = value is None or value is False
        if nothing and (default or {}).get(name) in (None, False):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else option_text(value)]
    return words


def typed(method: str, setting: Mapping[str, Any]) -> list[str]:
    """Return a method's setting as words of the command line that give it whatever the method's default is."""
    return written(setting, default_setting(method))


def difference(first: Predictions, second: Predictions) -> Difference:
    """Return by how much the first's figure is above the second's, on the same images, with its 95 % half-width."""
    if first.multi_label or first.tasks:
        return Difference(first.figure - second.figure, spread(first.resampled - second.resampled))
    return paired_difference(first.right, second.right, first.members)


@dataclass(frozen=True)
class Verdict:
    """The method to use, the one that all gains are measured against, and one sentence that says why."""

    recommended: str
    reference: str
    sentence: str


def decide(
    candidates: Sequence[Candidate],
    gain: Callable[[str, str], Difference],
    images: int,
    *,
    guessing: bool = False,
    points: str = "points",
    most_accurate: bool = False,
) -> Verdict:
    """Recommend the method with the fewest parameters among those that the images cannot tell from the best.

    Where the best method is clearly above the reference (the linear probe, or whatever trains the fewest parameters),
    the one recommended is so too. With `most_accurate` it is the best one, however little that is above the next.

    Args:
        candidates: the methods, at least one.
        gain: (method, other) -> difference of their figures on the same images.
        images: how many those are.
        guessing: no method does better than guessing.
        points: what the figures are counted in.
        most_accurate: recommend the best, not the smallest of those as good.
    """
    cheap = sorted(candidates, key=lambda one: (one.parameters, not one.mergeable))
    reference, best = cheap[0], max(candidates, key=lambda one: (one.figure, -one.parameters))
    if guessing:
        sentence = (
            f"none of the methods is shown to do better than guessing on these {images} images: look at the image size "
            "first (what tells the classes apart should be larger than a patch of the backbone), then at the labels, "
            "and give more images or a longer budget"
        )
        return Verdict(reference.method, reference.method, sentence)
    if len(candidates) == 1:
        return Verdict(
            best.method, best.method, f"only {best.called} was compared; use {best.flags}, or name more methods"
        )
    if most_accurate:
        return Verdict(best.method, reference.method, _best_of(best, cheap, gain, images, points))
    rises = gain(best.method, reference.method).clear

    def enough(one: Candidate) -> bool:
        as_good = not gain(best.method, one.method).clear
        return one is best or (as_good and (not rises or gain(one.method, reference.method).clear))

    chosen = next(one for one in cheap if enough(one))
    sentence = _sentence(chosen, reference, best, cheap, gain, images, points)
    return Verdict(chosen.method, reference.method, sentence)


def _sentence(
    chosen: Candidate,
    reference: Candidate,
    best: Candidate,
    cheap: Sequence[Candidate],
    gain: Callable[[str, str], Difference],
    images: int,
    points: str,
) -> str:
    unsure = f"which {images} images cannot tell from 0"
    if chosen is reference:
        rival = max((one for one in cheap if one is not reference), key=lambda one: one.figure)
        measured = gain(rival.method, reference.method)
        if measured.clear:
            told = f"the best other method, {rival.called}, is {_amount(measured, points)} worse"
        else:
            told = f"the best other method, {rival.called}, differs by {_signed(measured, points)}, {unsure}"
        if reference.parameters:
            return (
                f"{reference.called}, which trains the fewest parameters here, is enough: {told}; use {reference.flags}"
            )
        return f"{reference.called} is enough: {told}; use {reference.flags}"
    measured = gain(chosen.method, reference.method)
    above = (
        reference.called if not reference.parameters else f"{reference.called}, which trains the fewest parameters here"
    )
    said = f"{chosen.called} gains {_amount(measured, points)} over {above}"
    if chosen is best:
        return f"{said}; use {chosen.flags}"
    return (
        f"{said}, and the best, {best.called}, differs from it by {_signed(gain(best.method, chosen.method), points)}, "
        f"{unsure}, but trains more parameters; use {chosen.flags}"
    )


def _best_of(
    best: Candidate, cheap: Sequence[Candidate], gain: Callable[[str, str], Difference], images: int, points: str
) -> str:
    """Say what was chosen, and how sure that is: against the next best on the same images."""
    rival = max((one for one in cheap if one is not best), key=lambda one: one.figure)
    measured = gain(best.method, rival.method)
    told = f"{_signed(measured, points)} above the next, {rival.called}"
    unsure = "" if measured.clear else f", which {images} images cannot tell from 0"
    return f"{best.called} is the best of {len(cheap)} on {images} images, {told}{unsure}; use {best.flags}"


def _amount(measured: Difference, points: str) -> str:
    return f"{100 * abs(measured.mean):.1f} ± {100 * measured.half_width:.1f} {points}"


def _signed(measured: Difference, points: str) -> str:
    sign = "−" if round(100 * measured.mean, 1) < 0 else ""
    return f"{sign}{_amount(measured, points)}"


def is_guessing(found: Predictions) -> bool:
    """Whether the answers are not shown to be better than guessing.

    The mean over the classes of the share of right answers is then not above 1 / classes by more than 1.96 standard
    errors, whatever the classes' shares; with several classes per image, mean average precision is then not above what
    97.5 % of the random exchanges of answers between the images reach. Numbers are guessed where R² is not shown to
    be above 0, which the best constant answer reaches, and several tasks where each of them is.
    """
    if found.tasks:
        if found.labels.shape[1] == 1 and found.tasks[0].kind == "number":
            return bool(np.nanquantile(found.resampled, 0.025) <= 0)
        return all(is_guessing(one) for one in found.by_task.values())
    if found.multi_label:
        everything, generator = np.arange(len(found.labels)), np.random.default_rng(0)
        exchanged = [found.precision(everything, generator.permutation(everything)) for _ in range(RESAMPLES)]
        return found.figure <= float(np.quantile(exchanged, 0.975))
    labels = found.labels.numpy()
    classes = np.unique(labels)
    return _balanced(found.right, labels, classes)[0] <= 1 / len(classes)


def _balanced(right: np.ndarray, labels: np.ndarray, classes: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean over classes of the share of right answers."""
    counts = np.array([(labels == label).sum() for label in classes])
    shares = np.array([right[labels == label].mean() for label in classes])
    error = np.sqrt((shares * (1 - shares) / counts).sum()) / len(classes)
    return float(shares.mean() - 1.96 * error), float(shares.mean() + 1.96 * error)


def confused_pairs(methods: Sequence[Predictions]) -> list[tuple[int, int]]:
    """Return pairs of classes that no method tells apart better than guessing, where the images suffice to say so.

    Of two classes, the one that a method finds likelier counts as its answer. With several tasks, the pairs are those
    of all outputs.
    """
    if methods[0].tasks:
        starts = {
            task.name: own.start for task, own in zip(methods[0].tasks, output_slices(methods[0].tasks), strict=True)
        }
        return [
            (starts[name] + first, starts[name] + second)
            for name, one in methods[0].by_task.items()
            if not one.tasks
            for first, second in confused_pairs([method.by_task[name] for method in methods])
        ]
    if methods[0].multi_label:
        return []
    labels = methods[0].labels.numpy()
    found = []
    for first, second in combinations(np.unique(labels).tolist(), 2):
        chosen = np.flatnonzero((labels == first) | (labels == second))
        if len(chosen) >= PAIR_IMAGES and all(_confused(one, labels, chosen, first, second) for one in methods):
            found.append((first, second))
    return found


def _confused(method: Predictions, labels: np.ndarray, chosen: np.ndarray, first: int, second: int) -> bool:
    """Whether a method's choice between two classes is not shown to be better than a coin's, and shown to be poor."""
    likelier = method.probabilities[:, chosen, second] > method.probabilities[:, chosen, first]
    right = (likelier.numpy() == (labels[chosen] == second)).mean(0)
    low, high = _balanced(right, labels[chosen], (first, second))
    return low <= 0.5 and high < 0.75
