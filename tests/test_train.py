"""Training and evaluation: the seed decides everything, the schedule, what is kept, divergence, and the figures."""

import importlib
import json
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
from support import CLASSES, CONFIGS, TINY, enliven, live, logits, vit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft import (
    Adapted,
    Epoch,
    MethodConfig,
    TrainConfig,
    Training,
    VisgraftError,
    evaluate,
    list_methods,
    load_images,
)
from visgraft.adapters.directory import adapter_tensors
from visgraft.backbones.creation import model_data_config
from visgraft.core.attach import attach
from visgraft.data.augment import augmentation
from visgraft.data.dataset import Example
from visgraft.data.images import Images
from visgraft.errors import TrainingDiverged
from visgraft.measure.evaluation import confusion, score
from visgraft.measure.precision import resolve_precision
from visgraft.serve.prediction import predict

training: Any = importlib.import_module("visgraft.training.loop")  # the attribute of that name is the function
HALF = (0.5, 0.5, 0.5)
RECIPE = TrainConfig(epochs=3, warmup_epochs=1.0, batch_size=8, lr=5e-3, precision="fp32")
DEFAULTS: dict[str, MethodConfig] = {name: kind.Config() for name, kind in list_methods().items()}


def task(count: int = 20, seed: int = 0, size: int = 16) -> Images:
    """Noise with the class in its brightness."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 100, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return Images((noise + 30 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, HALF, HALF)


def ready(config: MethodConfig, variant: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    return attach(vit(variant), config, task().batches())


def fit(model: nn.Module, config: TrainConfig = RECIPE, **options: Any) -> Training:
    return training.train(model, task(), config, **options)


def held(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what the adapter holds now."""
    return {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_seed_alone_decides_the_weights_bit_for_bit(name: str) -> None:
    states = []
    for chance, seed in ((1, 0), (2, 0), (2, 1)):
        model = ready(CONFIGS[name])
        torch.manual_seed(chance)  # what drew random numbers before does not matter
        np.random.seed(chance)
        fit(model, replace(RECIPE, epochs=2, flip=True, seed=seed))
        states.append(held(model))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    images, everything = task(), torch.arange(20)
    augment = augmentation(images, TrainConfig(flip=True, rand_augment="rand-m9-mstd0.5-inc1"))
    assert augment is not None
    whole = augment(everything, 1)
    torch.manual_seed(5)
    for chosen in (torch.tensor([3]), torch.tensor([11, 3, 7]), everything.flip(0)):
        assert torch.equal(augment(chosen, 1), whole[chosen])
    again = augmentation(images, TrainConfig(flip=True, rand_augment="rand-m9-mstd0.5-inc1", seed=1))
    assert again is not None
    assert not torch.equal(augment(everything, 2), whole)
    assert not torch.equal(again(everything, 1), whole)


def test_augmentation_takes_the_strongest_magnitude_of_every_operation() -> None:
    images = task(4)
    augment = augmentation(images, TrainConfig(rand_augment="rand-m10-n8-mstd0.5-inc1"))
    assert augment is not None
    for epoch in range(60):
        assert augment(torch.arange(4), epoch).shape == (4, 3, 16, 16)


def test_training_on_cached_features_equals_training_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    states, figures = [], []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr("visgraft.training.objective.sees_features", lambda *_: False)
            monkeypatch.setattr("visgraft.training.objective.run_prefix", lambda *_, **__: None)
        model: Any = ready(DEFAULTS["linear"])
        model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
        figures.append(fit(model, val=task(10, seed=1)))
        states.append(held(model))
        # One pass over the training images and one over those of validation; or three epochs of both.
        assert len(passes) == (2 if cached else 2 + 3 * (3 + 1))
    assert states[0].keys() == {"head.weight", "head.bias"}
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-5)
    for first, second in zip(figures[0].history, figures[1].history, strict=True):
        assert (first.loss, first.val_loss) == pytest.approx((second.loss, second.val_loss), abs=1e-5)
        assert (first.top1, first.val_top1) == (second.top1, second.val_top1)


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


def test_training_needs_something_attached_and_select_val_needs_validation_images() -> None:
    with pytest.raises(VisgraftError, match=r"nothing is attached.*call visgraft\.attach first"):
        fit(vit())
    with pytest.raises(VisgraftError, match="select='val' needs validation images; add a val folder"):
        fit(ready(DEFAULTS["linear"]), replace(RECIPE, select="val"))


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


def test_the_rate_can_change_once_per_epoch_between_a_floor_and_the_peak() -> None:
    rates: list[float] = []
    note = lambda epoch: None if epoch.complete else rates.append(epoch.lr)  # noqa: E731
    recipe = replace(RECIPE, epochs=20, warmup_epochs=2.0, lr=1e-3, batch_size=5, min_lr=1e-5, warmup_lr=1e-4)
    fit(ready(DEFAULTS["linear"]), replace(recipe, schedule="epoch"), on_progress=note)
    by_epoch = np.array(rates).reshape(20, 4)
    assert np.array_equal(by_epoch, np.repeat(by_epoch[:, :1], 4, axis=1))
    expected = [1e-4, 5.5e-4, *(1e-5 + (1e-3 - 1e-5) / 2 * (1 + np.cos(np.pi * epoch / 18)) for epoch in range(18))]
    assert by_epoch[:, 0] == pytest.approx(expected)
    with pytest.raises(VisgraftError, match=r"min_lr is 0\.01, above the peak of 0\.001"):
        fit(ready(DEFAULTS["linear"]), replace(recipe, min_lr=1e-2))


def test_the_last_batch_can_be_left_out_where_it_is_not_full() -> None:
    seen: list[int] = []
    head = ready(DEFAULTS["linear"])
    head.get_classifier().register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))  # type: ignore[operator]
    fit(head, replace(RECIPE, epochs=2, batch_size=8, drop_last=True))
    assert seen == [8, 8] * 2
    with pytest.raises(VisgraftError, match="drop_last leaves none of 20 images in batches of 32"):
        fit(ready(DEFAULTS["linear"]), replace(RECIPE, batch_size=32, drop_last=True))


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
    loss = -logits(model, images.normalised(images.pixels)).log_softmax(-1)
    expected = (1 - smoothing) * loss[torch.arange(len(images)), images.labels].mean() + smoothing * loss.mean()
    result = fit(model, replace(RECIPE, epochs=1, batch_size=64, label_smoothing=smoothing))
    assert result.history[0].loss == pytest.approx(float(expected), abs=1e-5)


def test_drop_path_needs_a_model_that_was_created_with_it() -> None:
    with pytest.raises(VisgraftError, match=r"drop_path is 0\.1, but .* created without; pass drop_path_rate"):
        fit(ready(DEFAULTS["alore"]), replace(RECIPE, drop_path=0.1))
    result = fit(ready(DEFAULTS["alore"], "drop_path"), replace(RECIPE, drop_path=0.2))
    assert len(result.history) == RECIPE.epochs


def test_the_head_has_its_own_learning_rate_on_request() -> None:
    for head_lr, slow in ((1e-9, True), (None, False)):
        model = ready(DEFAULTS["lora"])
        start = held(model)
        fit(model, replace(RECIPE, head_lr=head_lr))
        moved = {name: float((tensor - start[name]).abs().max()) for name, tensor in held(model).items()}
        assert (moved["head.weight"] < 1e-6) == (moved["head.bias"] < 1e-6) == slow
        assert max(moved[name] for name in moved if "head" not in name) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss_and_leaves_frozen_tensors_as_they_are(name: str) -> None:
    model = ready(CONFIGS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = fit(model, replace(RECIPE, epochs=4))
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor.cpu(), before[key])}
    assert changed <= adapter_tensors(model).keys()
    assert result.history[-1].loss < result.history[0].loss
    assert not model.training


def test_a_head_of_two_parts_trains_too() -> None:
    model = attach(live(VisionTransformerDistilled(**TINY)), DEFAULTS["linear"])
    history = fit(model, replace(RECIPE, epochs=5)).history
    assert history[-1].loss < history[0].loss


@pytest.mark.parametrize("flip", [False, True])
def test_the_statistics_of_frozen_batch_norms_stay(flip: bool) -> None:
    model = attach(timm.create_model("test_efficientnet", num_classes=CLASSES), DEFAULTS["linear"])
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    training.train(model, task(size=32), replace(RECIPE, flip=flip))
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(tensor.cpu(), before[key]) for key, tensor in model.named_buffers())


def poison(monkeypatch: pytest.MonkeyPatch, call: int, value: float) -> None:
    """Let the loss become `value` at the given call."""
    count, real = iter(range(1, 1000)), F.cross_entropy

    def loss(*arguments: Any, **options: Any) -> Tensor:
        found = real(*arguments, **options)
        return found * value if next(count) == call else found

    monkeypatch.setattr(training.F, "cross_entropy", loss)


@pytest.mark.parametrize(("call", "value", "good"), [(3, float("nan"), 0), (8, float("nan"), 2), (8, float("inf"), 2)])
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_loss_that_is_not_finite_brings_back_the_last_good_epoch(
    name: str, call: int, value: float, good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready(DEFAULTS[name])
    states = [held(model)]
    poison(monkeypatch, call, value)  # there are 3 steps an epoch
    with pytest.raises(TrainingDiverged, match=rf"epoch {good + 1}.*after epoch {good} is kept.*lower --lr") as caught:
        fit(model, replace(RECIPE, epochs=5), on_progress=lambda e: states.append(held(model)) if e.complete else None)
    assert caught.value.last_good_epoch == len(states) - 1 == good
    assert same(held(model), states[-1])


def test_weights_that_overflow_in_the_last_step_of_an_epoch_count_as_diverged() -> None:
    model, good = ready(DEFAULTS["linear"]), list[dict[str, Tensor]]()
    steps = iter(range(1, 100))

    def spoil(epoch: Epoch) -> None:
        if epoch.complete:
            good.append(held(model))
        elif next(steps) == 6:  # the loss of this step, the last of epoch 2, was measured before
            model.get_parameter("head.bias").data[0] = float("inf")

    with pytest.raises(TrainingDiverged, match=r"epoch 2.*lower --lr") as caught:
        fit(model, on_progress=spoil)
    assert caught.value.last_good_epoch == 1
    assert same(held(model), good[0])


def test_every_step_is_told_and_every_epoch_once_as_complete() -> None:
    told: list[Epoch] = []
    result = fit(ready(DEFAULTS["alore"]), val=task(10, seed=1), on_progress=told.append)
    whole = [epoch for epoch in told if epoch.complete]
    assert [epoch.epoch for epoch in whole] == [1, 2, 3]
    assert tuple(whole) == result.history
    assert [epoch.complete for epoch in told] == 3 * [False, False, False, True]
    for epoch in told:
        assert min(epoch.loss, epoch.images_per_second) > 0 <= epoch.seconds_left
        assert 0 <= epoch.top1 <= 1
        assert (epoch.val_top1 is None) == (epoch.val_loss is None) == (not epoch.complete)
    assert told[-1].seconds_left == 0 < told[0].seconds_left
    assert min(result.seconds, result.images_per_second, result.peak_memory_bytes) > 0


@pytest.mark.parametrize("right", [0, 1, 13, 29, 30])
def test_the_interval_is_wilsons_and_holds_top1(right: int) -> None:
    labels = torch.zeros(30, dtype=torch.int64)
    found = score(F.one_hot((torch.arange(30) >= right).long(), 2).float(), labels)
    low, high = found.top1_ci95
    z, n, p = 1.959963984540054, 30, right / 30
    wide = 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / wide, z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / wide
    assert found.top1 == p
    assert 0 <= low <= p <= high <= 1
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert (low, high) == pytest.approx(tuple(binomtest(right, n).proportion_ci(0.95, method="wilson")))


def test_macro_f1_is_the_mean_over_classes_and_that_of_sklearn() -> None:
    torch.manual_seed(0)
    labels, probabilities = torch.arange(40) % 4, torch.rand(40, 4)
    found = score(probabilities, labels)
    counts = confusion(found, 4)
    assert counts.sum(axis=1).tolist() == [10, 10, 10, 10]
    assert counts.trace() / 40 == found.top1
    assert found.macro_f1 == pytest.approx(np.mean(2 * counts.diagonal() / (counts.sum(axis=0) + 10)))
    assert found.macro_f1 == pytest.approx(f1_score(labels, probabilities.argmax(-1), average="macro"))


def test_evaluate_gives_the_probabilities_of_the_model_in_eval_mode_and_leaves_it_as_it_was() -> None:
    model, images = enliven(ready(DEFAULTS["alore"])), task(70, seed=2)
    expected = logits(model.eval(), images.normalised(images.pixels)).softmax(-1)
    found = evaluate(model.train(), images, "fp32")
    assert model.training
    torch.testing.assert_close(found.probabilities, expected)
    assert found.top1 == float((expected.argmax(-1) == images.labels).double().mean())
    assert found.seconds > 0


def test_predict_names_the_same_classes_as_evaluate_most_probable_first(tmp_path: Path) -> None:
    generator, pictures = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(10)]
    for path in pictures:  # larger than the backbone's input
        Image.fromarray(generator.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(path)
    model, classes = enliven(ready(DEFAULTS["lora"])).eval(), tuple("abcde")
    facts = model_data_config(model)
    images = load_images([Example(path, 0) for path in pictures], facts)
    found = evaluate(model, images, "fp32")
    adapted = Adapted.of(model, classes=classes)
    rows = predict(adapted, pictures, top=CLASSES)
    for row, probabilities in zip(rows, found.probabilities, strict=True):
        assert sorted((p for _, p in row), reverse=True) == [p for _, p in row]
        assert sum(p for _, p in row) == pytest.approx(1, abs=1e-5)
        assert row[0][0] == classes[int(probabilities.argmax())]
        assert dict(row) == pytest.approx(dict(zip(classes, probabilities.tolist(), strict=True)), abs=1e-5)
    for (best,), row in zip(predict(adapted, pictures[:2]), rows, strict=False):
        assert best[0] == row[0][0]
        assert best[1] == pytest.approx(row[0][1], abs=1e-6), "a smaller batch may round otherwise, and no more"
    assert predict(Adapted.of(model), pictures[:1])[0][0][0] == str("abcde".index(rows[0][0][0]))


def test_options_survive_the_way_through_plain_values() -> None:
    recipes = [kind.recipe for kind in list_methods().values()]
    for config in (*CONFIGS.values(), *recipes, TrainConfig(head_lr=1.0, rand_augment="rand-m9")):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "TrainConfig has no option 'epoch'; did you mean epochs"),
        ({"lr": "fast"}, "TrainConfig.lr is 'fast', but must be a number"),
        ({"epochs": 1.5}, "TrainConfig.epochs is 1.5, but must be a whole number"),
        ({"epochs": True}, "TrainConfig.epochs is True, but must be a whole number"),
        ({"select": "best"}, "TrainConfig.select is 'best', but must be one of last, val"),
        ({"epochs": 0}, "epochs is 0, but must be above 0"),
        ({"lr": float("nan")}, "lr is nan, but must be above 0"),
        ({"head_lr": -1.0}, "head_lr is -1.0, but must be above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, but must be at least 0 and below 1"),
        ({"warmup_epochs": -1.0}, "warmup_epochs is -1.0, but must not be negative"),
        ({"seed": -1}, "seed is -1, but must not be negative"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_with_its_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(VisgraftError) as caught:
        TrainConfig.from_dict(values)
    assert str(caught.value).startswith(message)


def test_the_automatic_precision_is_one_of_both_and_the_others_are_taken_as_they_are() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    training_precision = resolve_precision("auto")
    assert training_precision in ("fp32", "bf16")
    assert {resolve_precision("auto") for _ in range(3)} == {training_precision}
    assert torch.equal(torch.rand(2), expected), "the measurement leaves the random state alone"
    assert (resolve_precision("fp32"), resolve_precision("bf16")) == ("fp32", "bf16")
