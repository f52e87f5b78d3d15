"""How sure: sets and intervals hold the truth as often as they promise, and a temperature makes probabilities true."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from support import CONFIGS, fitted
from torch import Tensor
from torch.nn import functional as F

from visgraft import Adapted
from visgraft.adapters.calibrated import Calibrated
from visgraft.adapters.record import AdapterRecord
from visgraft.errors import AdapterError
from visgraft.measure.conformal import (
    MOST_KEPT,
    CoverageError,
    bound,
    calibrate,
    class_scores,
    class_sets,
    condense,
    images_needed,
    interval,
    number_scores,
    rank_of,
)
from visgraft.measure.evaluation import score
from visgraft.measure.temperature import fit_temperature, recalibrated

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


def answers(count: int, seed: int, several: bool = False, sharp: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits [N, 6] that are `sharp` times too sure, and labels drawn from what they say before."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 6, generator=generator)
    if several:
        return sharp * logits, torch.bernoulli(logits.sigmoid(), generator=generator)
    return sharp * logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def probabilities(logits: Tensor, several: bool) -> Tensor:
    return logits.sigmoid() if several else logits.softmax(-1)


def test_the_coverage_is_distributed_as_the_theory_says() -> None:
    """Over calibrations it is beta(k, n + 1 - k), where scores are uniform and the bound is the coverage itself."""
    generator = np.random.default_rng(0)
    for images, coverage in ((99, 0.9), (150, 0.95), (900, 0.8)):
        reached = [bound(condense(generator.random(images)), coverage) for _ in range(1000)]
        rank = rank_of(coverage, images)
        assert kstest(reached, beta(rank, images + 1 - rank).cdf).pvalue > 1e-3
        assert np.mean(reached) >= coverage - 4 * np.std(reached) / 1000**0.5
    loose = [bound(condense(generator.random(99)), 0.93) for _ in range(1000)]
    assert kstest(loose, beta(90, 10).cdf).pvalue < 1e-3  # the test sees a rank that is 3 off


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("images", [60, 400])
def test_sets_hold_the_truth_as_often_as_promised(several: bool, images: int) -> None:
    held = {coverage: list[float]() for coverage in (0.8, 0.9, 0.95)}
    for seed in range(100):
        logits, labels = answers(images + 500, seed, several, sharp=2.5)
        p = probabilities(logits, several)
        known = calibrate(score(p[:images], labels[:images]))
        logs = recalibrated(p[images:], known.temperature, several)
        for coverage, shares in held.items():
            inside = class_sets(logs, bound(known, coverage), several)
            assert several or bool(inside.any(1).all()), "a set of one class is never empty"
            truth = labels[images:] > 0.5 if several else F.one_hot(labels[images:], 6).bool()
            shares.append(float((inside | ~truth).all(1).float().mean()))
    for coverage, shares in held.items():
        error = np.std(shares) / len(shares) ** 0.5
        assert coverage - 4 * error <= np.mean(shares) <= coverage + 1 / (images + 1) + 4 * error


def test_intervals_hold_the_number() -> None:
    generator, shares = np.random.default_rng(0), []
    for _ in range(200):
        truth, found = (generator.normal(size=300) for _ in range(2))
        highest = bound(condense(number_scores(truth[:100], found[:100])), 0.9)
        limits = [interval(prediction, highest) for prediction in found[100:]]
        shares.append(np.mean([low <= y <= high for y, (low, high) in zip(truth[100:], limits, strict=True)]))
    assert abs(np.mean(shares) - 91 / 101) <= 4 * np.std(shares) / 200**0.5


@pytest.mark.parametrize(("coverage", "images"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (0.999, 999), (0.93, 14)])
def test_too_few_images_are_refused_with_the_number_that_it_takes(coverage: float, images: int) -> None:
    assert images_needed(coverage) == images and rank_of(coverage, images) <= images
    assert bound(condense(np.arange(images)), coverage) == images - 1
    if images > 1:
        with pytest.raises(CoverageError, match=rf"takes {images:,} validation images, and there were {images - 1:,};"):
            bound(condense(np.arange(images - 1)), coverage)


@pytest.mark.parametrize("coverage", [0.0, 1.0, -1, 95, math.nan, math.inf])
def test_a_coverage_lies_between_0_and_1(coverage: float) -> None:
    with pytest.raises(CoverageError, match="must be above 0 and below 1"):
        bound(condense(np.arange(100)), coverage)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**32 - 1), st.sampled_from(LEVELS))
def test_what_is_kept_never_promises_too_much(images: int, seed: int, coverage: float) -> None:
    scores = np.sort(np.random.default_rng(seed).exponential(size=images) ** 3)
    kept = condense(scores)
    assert len(kept.scores) == min(images, MOST_KEPT) and kept.ranks[-1] == kept.images == images
    assert Calibrated.from_json(json.loads(json.dumps(kept.to_json()))) == kept
    rank = rank_of(coverage, images)
    if rank <= images:
        found, exact = bound(kept, coverage), scores[rank - 1]
        above = scores[min(rank - 1 + images // (MOST_KEPT // 2), images - 1)]
        assert exact <= found <= above * (1 + 1e-5)


def test_a_temperature_undoes_what_made_logits_too_sure() -> None:
    for several in (False, True):
        for sharp in (0.3, 1.0, 4.0):
            logits, labels = answers(4000, 1, several, sharp)
            found = fit_temperature(probabilities(logits, several), labels)
            assert found == pytest.approx(sharp, rel=0.12)


def test_calibration_lowers_the_loss_of_other_images() -> None:
    logits, labels = answers(3000, 2, sharp=3.0)
    p = logits.softmax(-1)
    temperature = fit_temperature(p[:200], labels[:200])
    before, after = (F.nll_loss(recalibrated(p[200:], t, False), labels[200:]) for t in (1.0, temperature))
    assert after < before - 0.1


def test_the_temperature_is_scikit_learns() -> None:
    if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8):
        pytest.skip("scikit-learn below 1.8 has no temperature")
    from sklearn.calibration import _TemperatureScaling

    logits, labels = answers(3000, 3, sharp=2.0)
    theirs = 1 / float(_TemperatureScaling().fit(logits.double().numpy(), labels.numpy()).beta_)
    assert fit_temperature(logits.softmax(-1), labels) == pytest.approx(theirs, rel=0.01)


def test_answers_that_are_all_right_do_not_become_certain() -> None:
    labels = torch.arange(30) % 3
    for several in (False, True):
        truth = F.one_hot(labels, 3).float()
        p = probabilities(8 * truth - 4, several)
        logs = recalibrated(p, fit_temperature(p, truth if several else labels), several)
        mean = float(logs.exp()[truth > 0].mean())
        assert 0.95 < mean < 0.995  # the next of 30 is wrong about once in 32


@pytest.mark.parametrize("several", [False, True])
def test_probabilities_that_overflow_float32_stay_finite(several: bool) -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([[0.0, 1, 0], [0, 1, 0]]) if several else torch.tensor([1, 1])
    known = calibrate(score(p, labels))
    assert all(map(math.isfinite, known.scores)) and 0 < known.temperature < math.inf
    inside = class_sets(recalibrated(p, known.temperature, several), known.scores[-1], several)
    assert bool(inside[:, 1].all())


def test_scores_of_several_classes_are_those_of_the_least_sure_true_one() -> None:
    logs = torch.tensor([[0.9, 0.2], [0.9, 0.2], [0.9, 0.2]]).double().log()
    found = class_scores(logs, torch.tensor([[1.0, 0], [1, 1], [0, 0]]))
    assert found == pytest.approx([-math.log(0.9), -math.log(0.2), 0.0])


GOOD = condense(np.linspace(0, 1, 20), 1.5).to_json()


@pytest.mark.parametrize(
    "damage",
    [
        {"scores": []}, {"scores": [2.0, 1.0] * 10}, {"images": 21}, {"images": "20"}, {"temperature": 0},
        {"temperature": None}, {"scores": ["a"] * 20}, {"ranks": [1]}, {"ranks": "ab"}, {"scores": [math.inf] * 20},
        {"ranks": [*range(2, 21), 20]}, {"temperature": math.nan},
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_one_line(damage: dict[str, Any], tmp_path: Path) -> None:
    good = Adapted.of(fitted(CONFIGS["sct-0"])).record.to_json()
    assert AdapterRecord.from_json({**good, "calibration": GOOD}, tmp_path).to_json()["calibration"] == GOOD
    with pytest.raises(AdapterError, match=r"is damaged: calibration: .*; restore it or train again"):
        AdapterRecord.from_json({**good, "calibration": {**GOOD, **damage}}, tmp_path / "c.json")
