"""The sentence that a comparison ends with, and what it is made of: guessing, confused classes, paired gains."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from visgraft.measure.intervals import Difference
from visgraft.search.verdict import Candidate, confused_pairs, decide, difference, is_guessing
from visgraft.training.crossval import Predictions

LINEAR = Candidate("linear", {"lr": 0.01}, 0.80, 0, True)
SCT = Candidate("sct", {"lr": 5e-3, "scale": 1.0}, 0.80, 28_224, True)
ALORE = Candidate("alore", {"lr": 2e-3, "scale": 5.0}, 0.80, 73_792, True)
LORA = Candidate("lora", {"lr": 2e-3, "rank": 8}, 0.80, 147_456, True)
UNSURE = "which 240 images cannot tell from 0"


def gains(half: float, **points: float) -> tuple[list[Candidate], Callable[[str, str], Difference]]:
    """Candidates by name with their figures, and differences that all have one half-width."""
    known = {one.method: one for one in (LINEAR, SCT, ALORE, LORA)}
    candidates = [replace(known[name], figure=figure / 100) for name, figure in points.items()]
    return candidates, lambda a, b: Difference((points[a] - points[b]) / 100, half / 100)


@pytest.mark.parametrize(
    ("half", "points", "recommended", "sentence"),
    [
        (1.3, {"linear": 80, "alore": 84.1}, "alore",
         "alore gains 4.1 ± 1.3 points over a linear probe; use --method alore --lr 0.002 --scale 5"),
        (1.1, {"linear": 80, "alore": 79, "lora": 80.4}, "linear",
         f"a linear probe is enough: the best other method, lora, differs by 0.4 ± 1.1 points, {UNSURE}; "
         "use --method linear --lr 0.01"),
        (1.1, {"linear": 80, "sct": 79.5}, "linear",
         f"a linear probe is enough: the best other method, sct, differs by −0.5 ± 1.1 points, {UNSURE}; "
         "use --method linear --lr 0.01"),
        (1.1, {"linear": 80, "sct": 75, "lora": 76}, "linear",
         "a linear probe is enough: the best other method, lora, is 4.0 ± 1.1 points worse; "
         "use --method linear --lr 0.01"),
        (1.5, {"linear": 80, "sct": 84, "alore": 84.6}, "sct",
         "sct gains 4.0 ± 1.5 points over a linear probe, and the best, alore, differs from it by 0.6 ± 1.5 points, "
         f"{UNSURE}, but trains more parameters; use --method sct --lr 0.005 --scale 1"),
        (2.0, {"linear": 80, "sct": 81.5, "alore": 83}, "alore",
         "alore gains 3.0 ± 2.0 points over a linear probe; use --method alore --lr 0.002 --scale 5"),
        (1.0, {"sct": 80, "lora": 85}, "lora",
         "lora gains 5.0 ± 1.0 points over sct, which trains the fewest parameters here; "
         "use --method lora --lr 0.002 --rank 8"),
        (6.0, {"sct": 80, "lora": 85}, "sct",
         "sct, which trains the fewest parameters here, is enough: the best other method, lora, differs by "
         f"5.0 ± 6.0 points, {UNSURE}; use --method sct --lr 0.005 --scale 1"),
        (1.0, {"alore": 80}, "alore",
         "only alore was compared; use --method alore --lr 0.002 --scale 5, or name more methods"),
    ],
)  # fmt: skip
def test_one_sentence_says_which_method_and_why(
    half: float, points: dict[str, float], recommended: str, sentence: str
) -> None:
    candidates, gain = gains(half, **points)
    for order in (candidates, candidates[::-1]):
        verdict = decide(order, gain, 240)
        assert (verdict.recommended, verdict.sentence) == (recommended, sentence)
        assert verdict.reference == ("linear" if "linear" in points else candidates[0].method)


def test_where_all_methods_guess_the_sentence_looks_elsewhere() -> None:
    candidates, gain = gains(9, linear=34, alore=36)
    verdict = decide(candidates, gain, 90, guessing=True)
    assert verdict.sentence.startswith(
        "none of the methods is shown to do better than guessing on these 90 images: look"
    )
    assert verdict.recommended == "linear"


def test_average_precision_is_counted_in_its_own_points() -> None:
    candidates, gain = gains(1, linear=80, alore=90)
    assert "gains 10.0 ± 1.0 points of mAP over" in decide(candidates, gain, 9, points="points of mAP").sentence


def predicted(labels: Tensor, answered: Tensor, classes: int = 3) -> Predictions:
    return Predictions((0.8 * torch.eye(classes)[answered] + 0.2 / classes)[None], labels)


def test_guessing_is_known_whatever_the_classes_shares() -> None:
    labels = torch.tensor([0] * 95 + [1] * 5)
    always, good = torch.zeros(100, dtype=torch.long), labels.clone()
    good[[0, 1, 2]] = 1
    assert is_guessing(predicted(labels, always)), "95 % right, by always saying the same"
    assert not is_guessing(predicted(labels, good))
    coin = torch.from_numpy(np.random.default_rng(0).integers(0, 3, 300))
    assert is_guessing(predicted(torch.arange(300) % 3, coin))


def test_guessing_is_known_where_images_have_several_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(100, 3, generator=generator) < 0.3).float()
    assert is_guessing(Predictions(torch.rand(1, 100, 3, generator=generator), labels))
    assert not is_guessing(Predictions((0.5 * labels + 0.2)[None], labels))


def test_two_classes_that_no_method_tells_apart_are_found() -> None:
    labels = torch.arange(120) % 3
    flip = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 120))
    blind = predicted(labels, torch.where(labels == 2, labels, flip))  # tells 2 from the others and guesses between
    sharp = predicted(labels, labels)
    assert confused_pairs([blind, blind]) == [(0, 1)]
    assert confused_pairs([blind, sharp]) == [], "one of them can"
    assert confused_pairs([predicted(labels[:12], flip[:12])]) == [], "too few images to say so"


def test_a_gain_is_measured_on_the_same_images() -> None:
    labels = torch.arange(200) % 3
    first, second = labels.clone(), labels.clone()
    second[:20], first[:4] = (labels[:20] + 1) % 3, (labels[:4] + 1) % 3
    paired = difference(predicted(labels, first), predicted(labels, second))
    assert paired.mean == pytest.approx(0.08) and paired.clear
    assert paired.half_width < 0.05, "narrower than of two samples that differ in everything"
