"""Training and evaluation: the seed decides everything, the schedule, what is kept, divergence, and the figures."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from support import CLASSES, CONFIGS, enliven, vit
from torch import Tensor, nn
from torch.nn import functional as F


from visgraft import Adapted, Epoch, MethodConfig, TrainConfig, Training, VisgraftError, evaluate, load_images, methods
from visgraft.adapter import adapter_tensors
from visgraft.attach import attach, get_attached
from visgraft.backbone import image_transform, model_data_config
from visgraft.data.folders import Example
from visgraft.data.images import Images, augmentation
from visgraft.errors import DataError, TrainingDiverged
from visgraft.evaluate import confusion, predict, score

training: Any = importlib.import_module("visgraft.train")  # the attribute of that name is the function
HALF = (0.5, 0.5, 0.5)
RECIPE = TrainConfig(epochs=3, warmup_epochs=1.0, batch_size=8, lr=5e-3, precision="fp32")
DEFAULTS: dict[str, MethodConfig] = {name: kind.Config() for name, kind in methods().items()}


def task(count: int = 20, seed: int = 0, size: int = 16) -> Images:
    """Noise with the class in its brightness."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 100, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return Images((noise + 30 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, HALF, HALF)


def ready(config: MethodConfig, variant: str = "plain", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return attach(vit(variant), config, task().batches())


def fit(model: nn.Module, config: TrainConfig = RECIPE, **options: Any) -> Training:
    return training.train(model, task(), config, **options)


def trained(config: MethodConfig, recipe: TrainConfig = RECIPE, **options: Any) -> dict[str, Tensor]:
    """What the adapter holds after training from the same start."""
    model = ready(config)
    fit(model, recipe, **options)
    return held(model)


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The seed


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_seed_gives_the_same_weights_bit_for_bit(name: str) -> None:
    recipe = replace(RECIPE, epochs=2, flip=True)
    first = trained(CONFIGS[name], recipe)
    torch.rand(7)  # what else drew random numbers does not matter
    assert same(first, trained(CONFIGS[name], recipe))


@pytest.mark.parametrize("name", DEFAULTS)
def test_another_seed_gives_other_weights(name: str) -> None:
    assert not same(trained(DEFAULTS[name]), trained(DEFAULTS[name], replace(RECIPE, seed=1)))


def test_training_does_not_depend_on_what_drew_random_numbers_before() -> None:
    model, other = ready(DEFAULTS["alore"]), ready(DEFAULTS["alore"])
    fit(model)
    torch.manual_seed(99)
    np.random.seed(99)
    fit(other)
    assert same(held(model), held(other))


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    images, everything = task(), torch.arange(20)
    augment = augmentation(images, True, "rand-m9-mstd0.5-inc1", 0)
    assert augment is not None
    whole = augment(everything, 1)
    torch.manual_seed(5)
    for chosen in (torch.tensor([3]), torch.tensor([11, 3, 7]), everything.flip(0)):
        assert torch.equal(augment(chosen, 1), whole[chosen])
    again = augmentation(images, True, "rand-m9-mstd0.5-inc1", 1)
    assert again is not None
    assert not torch.equal(augment(everything, 2), whole)
    assert not torch.equal(again(everything, 1), whole)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.pixels.shape


def test_flip_mirrors_about_half_of_the_images_and_changes_nothing_else() -> None:
    images = task(200)
    augment = augmentation(images, True, None, 0)
    assert augment is not None
    pixels = augment(torch.arange(200), 1)
    flipped = (pixels == images.pixels.flip(-1)).flatten(1).all(1)
    kept = (pixels == images.pixels).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert 70 < int(flipped.sum()) < 130


def test_no_augmentation_is_none_and_a_wrong_notation_is_refused() -> None:
    assert augmentation(task(), False, None, 0) is None
    with pytest.raises(VisgraftError, match=r"'wild' is not in timm's notation; use e\.g\. rand-m9"):
        augmentation(task(), False, "wild", 0)


# Cached features


def test_training_on_cached_features_equals_training_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    states, figures = [], []
    for cached in (True, False):
        if not cached:
            plain = lambda images, *_: lambda indices, epoch: images.pixels[indices]  # noqa: E731
            monkeypatch.setattr(training, "augmentation", plain)
        model: Any = ready(DEFAULTS["linear"])
        hook = model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
        figures.append(fit(model, val=task(10, seed=1)))
        hook.remove()
        states.append(held(model))
        passes.append(0)
    assert passes.index(0) == 2  # one pass over the training images and one over those of validation
    assert len(passes) > 10
    assert states[0].keys() == states[1].keys() == {"head.weight", "head.bias"}
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-5)
    for first, second in zip(figures[0].history, figures[1].history, strict=True):
        assert (first.loss, first.val_loss) == pytest.approx((second.loss, second.val_loss), abs=1e-5)
        assert (first.top1, first.val_top1) == (second.top1, second.val_top1)


# What is kept


@pytest.mark.parametrize("cached", [True, False])
def test_the_best_validation_epoch_is_kept_on_request_and_the_last_otherwise(
    cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [0.2, 0.8, 0.8, 0.5]
    config = DEFAULTS["linear" if cached else "alore"]
    for select, kept in (("last", 4), ("val", 2)):
        left = iter(rates)
        monkeypatch.setattr(training, "_validate", lambda *_, left=left: {"val_loss": 1.0, "val_top1": next(left)})
        model, states = ready(config), list[dict[str, Tensor]]()
        note = lambda epoch, model=model, states=states: states.append(held(model)) if epoch.complete else None  # noqa: E731
        result = fit(model, replace(RECIPE, epochs=4, select=select), val=task(), on_progress=note)
        assert result.kept_epoch == kept
        assert [same(held(model), state) for state in states] == [number == kept for number in range(1, 5)]
        assert [epoch.val_top1 for epoch in result.history] == rates


def test_validation_figures_are_those_that_evaluate_gives() -> None:
    model, val = ready(DEFAULTS["lora"]), task(15, seed=4)
    last = fit(model, val=val).history[-1]
    found = evaluate(model, val, "fp32")
    assert last.val_top1 == found.top1
    assert last.val_loss == pytest.approx(float(F.nll_loss(found.probabilities.log(), val.labels)), abs=1e-5)


def test_keeping_the_best_epoch_needs_validation_images() -> None:
    with pytest.raises(VisgraftError, match="select='val' needs validation images; add a val folder"):
        fit(ready(DEFAULTS["linear"]), replace(RECIPE, select="val"))


def test_training_needs_something_attached() -> None:
    with pytest.raises(VisgraftError, match=r"nothing is attached.*call visgraft\.attach first"):
        fit(vit())


# Schedule and regularisation


def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_zero_as_a_cosine() -> None:
    rates: list[float] = []
    note = lambda epoch: None if epoch.complete else rates.append(epoch.lr)  # noqa: E731
    recipe = replace(RECIPE, epochs=20, warmup_epochs=2.0, lr=1e-3, batch_size=5)  # 4 steps an epoch
    fit(ready(DEFAULTS["linear"]), recipe, on_progress=note)
    assert len(rates) == 80
    assert rates[0] == pytest.approx(1e-6)
    assert rates[8] == pytest.approx(1e-3)
    assert np.allclose(np.diff(rates[:9]), (1e-3 - 1e-6) / 8)
    expected = [0.5e-3 * (1 + np.cos(np.pi * step / 72)) for step in range(72)]
    assert rates[8:] == pytest.approx(expected)
    assert rates[-1] < 1e-5


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.0), (1, 5.0), (2, 0.5)])
def test_short_runs_and_long_warm_ups_train_too(epochs: int, warmup: float) -> None:
    rates: list[float] = []
    recipe = replace(RECIPE, epochs=epochs, warmup_epochs=warmup)
    result = fit(ready(DEFAULTS["linear"]), recipe, on_progress=lambda epoch: rates.append(epoch.lr))
    assert len(result.history) == epochs
    assert 0 <= min(rates) <= max(rates) <= RECIPE.lr * (1 + 1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_cross_entropy_with_label_smoothing(smoothing: float) -> None:
    model, images = ready(DEFAULTS["linear"]), task()
    with torch.no_grad():
        expected = float(F.cross_entropy(model(images.normalised(images.pixels)), images.labels, None, None))
        smooth = float(-model(images.normalised(images.pixels)).log_softmax(-1).mean())
    recipe = replace(RECIPE, epochs=1, batch_size=64, label_smoothing=smoothing)
    result = fit(model, recipe)
    assert result.history[0].loss == pytest.approx((1 - smoothing) * expected + smoothing * smooth, abs=1e-5)


def test_drop_path_needs_a_model_that_was_created_with_it() -> None:
    with pytest.raises(VisgraftError, match=r"drop_path is 0\.1, but the model was created without; pass drop_path_rate"):
        fit(ready(DEFAULTS["alore"]), replace(RECIPE, drop_path=0.1))
    result = fit(ready(DEFAULTS["alore"], "drop_path"), replace(RECIPE, drop_path=0.2))
    assert len(result.history) == RECIPE.epochs


def test_the_head_has_its_own_learning_rate_on_request() -> None:
    start, common = held(ready(DEFAULTS["lora"])), trained(DEFAULTS["lora"])
    slow = trained(DEFAULTS["lora"], replace(RECIPE, head_lr=1e-9))
    moved = {name: float((slow[name] - start[name]).abs().max()) for name in start}
    assert max(moved[name] for name in ("head.weight", "head.bias")) < 1e-5
    assert max(moved[name] for name in moved if "head" not in name) > 1e-3
    assert float((common["head.weight"] - start["head.weight"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss_and_leaves_frozen_tensors_as_they_are(name: str) -> None:
    model = ready(CONFIGS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = fit(model, replace(RECIPE, epochs=4))
    after, moving = model.state_dict(), adapter_tensors(model).keys()
    assert before.keys() == after.keys()
    assert [key for key in before if key not in moving and not torch.equal(before[key], after[key])] == []
    assert result.history[-1].loss < result.history[0].loss
    assert not model.training


@pytest.mark.parametrize("flip", [False, True])
def test_the_statistics_of_frozen_batch_norms_stay(flip: bool) -> None:
    model = attach(timm.create_model("test_efficientnet", num_classes=CLASSES), DEFAULTS["linear"])
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    training.train(model, task(size=32), replace(RECIPE, flip=flip))
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.named_buffers())


# Divergence


def poison(monkeypatch: pytest.MonkeyPatch, call: int, value: float) -> None:
    """Let the loss become `value` at the given call."""
    count, real = iter(range(1, 1000)), F.cross_entropy

    def loss(*arguments: Any, **options: Any) -> Tensor:
        found = real(*arguments, **options)
        return found * value if next(count) == call else found

    monkeypatch.setattr(training.F, "cross_entropy", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_loss_that_is_not_finite_brings_back_the_last_good_epoch(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, states = ready(DEFAULTS[name]), list[dict[str, Tensor]]()
    poison(monkeypatch, 8, value)  # 3 steps an epoch: the second step of epoch 3
    with pytest.raises(TrainingDiverged, match=r"no longer finite in epoch 3.*after epoch 2 is kept.*lower --lr") as e:
        fit(model, replace(RECIPE, epochs=5), on_progress=lambda x: states.append(held(model)) if x.complete else None)
    assert e.value.last_good_epoch == len(states) == 2
    assert same(held(model), states[-1])


def test_a_first_epoch_that_fails_leaves_the_state_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(DEFAULTS["alore"])
    before = held(model)
    poison(monkeypatch, 3, float("nan"))
    with pytest.raises(TrainingDiverged, match="epoch 1") as caught:
        fit(model)
    assert caught.value.last_good_epoch == 0
    assert same(held(model), before)


def test_weights_that_overflow_in_the_last_step_of_an_epoch_count_as_diverged() -> None:
    model, good = ready(DEFAULTS["linear"]), list[dict[str, Tensor]]()
    steps = iter(range(1, 100))

    def spoil(epoch: Epoch) -> None:
        if epoch.complete:
            good.append(held(model))
        elif next(steps) == 6:  # the loss of this step, the last of epoch 2, was measured before
            adapter_tensors(model)["head.bias"][0] = float("inf")

    with pytest.raises(TrainingDiverged, match=r"epoch 2.*lower --lr") as caught:
        fit(model, on_progress=spoil)
    assert caught.value.last_good_epoch == 1
    assert same(held(model), good[0])
