"""Imbalance and several classes per image: weights, samplers, losses, figures; and starting from an adapter."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from support import CLASSES
from test_cli import SMALL, draw, fail, run, succeed
from test_train import DEFAULTS, HALF, RECIPE, fit, held, ready, task, training
from torch.nn import functional as F

from visgraft import Images, TrainConfig, VisgraftError, load, predict
from visgraft.adapters.directory import TENSORS
from visgraft.data.decode import open_image
from visgraft.measure.evaluation import score
from visgraft.training.objective import class_weights, draw_order, make_loss

RARE = torch.tensor([0] * 30 + [1] * 6 + [2] * 4)
CPU = torch.device("cpu")


def test_balanced_weights_are_those_of_sklearn_and_sqrt_is_their_root() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=RARE.numpy())
    balanced, root = class_weights(RARE, 3, "balanced"), class_weights(RARE, 3, "sqrt")
    assert balanced is not None and root is not None
    np.testing.assert_allclose(balanced.numpy(), expected, rtol=1e-6)
    torch.testing.assert_close(root, balanced.sqrt())
    assert class_weights(RARE, 3, "none") is None


@pytest.mark.parametrize("kind", ["none", "balanced", "sqrt"])
def test_the_loss_weighs_classes(kind: str) -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    loss = make_loss(RARE, 3, TrainConfig(class_weights=kind), CPU)
    each, weights = F.cross_entropy(logits, RARE, reduction="none"), class_weights(RARE, 3, kind)
    factor = torch.ones(40) if weights is None else weights[RARE]
    torch.testing.assert_close(loss(logits, RARE), (factor * each).sum() / factor.sum())


def test_the_balanced_sampler_draws_every_class_equally_often_and_depends_on_seed_and_epoch() -> None:
    config = TrainConfig(sampler="balanced")
    drawn = torch.cat([draw_order(RARE, config, epoch) for epoch in range(100)])
    shares = torch.bincount(RARE[drawn]).double() / len(drawn)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.double), rtol=0, atol=0.03)
    assert torch.equal(draw_order(RARE, config, 1), draw_order(RARE, config, 1))
    assert not torch.equal(draw_order(RARE, config, 1), draw_order(RARE, config, 2))
    assert not torch.equal(draw_order(RARE, config, 1), draw_order(RARE, replace(config, seed=1), 1))
    assert draw_order(RARE, TrainConfig(), 3).sort().values.tolist() == list(range(40))


@pytest.mark.parametrize("options", [{"class_weights": "balanced"}, {"class_weights": "sqrt"}, {"sampler": "balanced"}])
def test_a_rare_class_gains(options: dict[str, str]) -> None:
    images = task(60)
    rare = torch.cat([torch.nonzero(images.labels == c).flatten()[: 12 if c < 4 else 2] for c in range(CLASSES)])
    few = Images(images.pixels[rare], images.labels[rare], HALF, HALF)
    recall = []
    for config in (RECIPE, replace(RECIPE, **options)):  # type: ignore[arg-type]
        model = ready(DEFAULTS["linear"])
        training.train(model, few, replace(config, epochs=8))
        with torch.no_grad():
            answers = model(images.normalised(images.pixels)).softmax(-1)
        recall.append(float(answers[images.labels == 4, 4].mean()))
    assert recall[1] > recall[0]


def several(count: int = 24) -> Images:
    """Noise whose first and last rows of pixels are bright where it has class 0 and class 1; class 2 is never there."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count, CLASSES), generator=generator).float()
    labels[:, 2] = 0
    pixels = torch.randint(0, 90, (count, 3, 16, 16), generator=generator)
    for label in (0, 1, 3, 4):
        pixels[:, :, 3 * label : 3 * label + 3] += (120 * labels[:, label]).long().view(-1, 1, 1, 1)
    return Images(pixels.to(torch.uint8), labels, HALF, HALF)


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("name", ["linear", "alore"])
def test_several_classes_per_image_train_and_are_measured_by_average_precision(name: str, weights: str) -> None:
    model = ready(DEFAULTS[name])
    config = replace(RECIPE, epochs=12, class_weights=weights, select="val")
    result = training.train(model, several(), config, several())
    first, last = result.history[0], result.history[-1]
    assert first.top1 is None and first.val_top1 is None
    assert last.loss < first.loss
    assert first.val_map is not None and last.val_map is not None and last.val_map > first.val_map
    assert result.history[result.kept_epoch - 1].val_map == max(e.val_map or 0 for e in result.history)


def test_multi_label_figures_are_those_of_sklearn_over_the_classes_that_occur() -> None:
    labels = several().labels
    probabilities = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    found = score(probabilities, labels)
    there = [0, 1, 3, 4]
    expected = average_precision_score(labels[:, there].numpy(), probabilities[:, there].numpy(), average="macro")
    assert found.mean_average_precision == pytest.approx(expected) == found.figure
    assert (found.top1, found.top1_ci95, found.balanced_accuracy) == (None, None, None)
    with pytest.raises(VisgraftError, match="none of the images has a class"):
        score(probabilities, torch.zeros_like(labels))


def test_the_multi_label_loss_is_binary_cross_entropy_with_smoothing_and_weights() -> None:
    labels = several().labels
    logits = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    loss = make_loss(labels, CLASSES, TrainConfig(class_weights="balanced", label_smoothing=0.2), CPU)
    positives = labels.sum(0)
    weight = (len(labels) - positives) / positives.clamp_min(1)
    target = 0.8 * labels + 0.1
    expected = -(weight * target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(loss(logits, labels), expected)
    with pytest.raises(VisgraftError, match="use --class-weights balanced instead"):
        make_loss(labels, CLASSES, TrainConfig(sampler="balanced"), CPU)


def test_balanced_accuracy_is_that_of_sklearn_and_of_the_classes_that_occur() -> None:
    probabilities = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    found = score(probabilities, RARE)
    with pytest.warns(UserWarning, match="classes not in y_true"):
        expected = balanced_accuracy_score(RARE.numpy(), probabilities.argmax(-1).numpy())
    assert found.balanced_accuracy == pytest.approx(expected)


def test_features_are_kept_between_calls() -> None:
    passes: list[int] = []
    model: Any = ready(DEFAULTS["linear"])
    model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    features: dict[str, torch.Tensor] = {}
    for lr in (1e-3, 1e-2):
        fit(model, replace(RECIPE, lr=lr), val=task(10, 1), features=features)
    assert len(passes) == 2 and features.keys() == {"train", "val"}
    assert held(model).keys() == {"head.weight", "head.bias"}


def test_waiting_for_images_is_measured() -> None:
    result = fit(ready(DEFAULTS["alore"]), RECIPE)
    assert 0 <= result.waiting_share < 1


def table(folder: Path) -> Path:
    """A table of pictures that are red, bright, both or neither."""
    folder.mkdir()
    rows = ["image_path,labels"]
    generator = np.random.default_rng(0)
    for number in range(40):
        red, bright = number % 2, number // 2 % 2
        pixels = generator.normal((60 + 60 * bright + 80 * red, 60 + 60 * bright, 60 + 60 * bright), 10, (40, 40, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{';'.join(['red'] * red + ['bright'] * bright)}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder / "labels.csv"


def test_a_table_with_several_classes_per_image_goes_through_train_eval_and_predict(tmp_path: Path) -> None:
    data, out = table(tmp_path / "data"), tmp_path / "adapter"
    trained = succeed(
        "train", "--csv", data, "--out", out, "--method", "linear", "--epochs", 20, "--precision", "fp32", *SMALL
    )
    assert trained["top1"] is None and 0 < trained["mean_average_precision"] <= 1
    measured = succeed("eval", out, data)
    assert (measured["images"], measured["split"]) == (8, "test")
    assert measured["mean_average_precision"] > 0.6
    code, told, _ = run("eval", out, data)
    assert code == 0 and "mean average precision" in told and "top-1" not in told
    assert "one class per image" in fail("eval", out, draw(tmp_path / "flat", 12))
    image = data.parent / "3.png"  # red and bright
    (answers,) = predict(load(out), [image], top=2)
    (row,) = succeed("predict", out, image)
    assert {found["class"]: found["probability"] for found in row["classes"]} == pytest.approx(dict(answers))
    adapted = load(out)
    with torch.no_grad():
        each = adapted.model(adapted.transform(open_image(image))[None])[0].sigmoid()
    expected = {name: p for name, p in zip(("bright", "red"), each.tolist(), strict=True) if p >= 0.5}
    assert expected and dict(answers) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_keeps_the_background_of_its_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out, colours = draw(tmp_path / "data", 12), tmp_path / "adapter", list[str]()

    def note(source: Any, background: str = "white") -> Image.Image:
        colours.append(background)
        return open_image(source, background)

    for place in ("visgraft.data.images", "visgraft.serve.decoding"):
        monkeypatch.setattr(importlib.import_module(place), "open_image", note)
    train = ["train", data, "--out", out, "--method", "linear", "--epochs", 1, *SMALL]
    for words, asked, expected in (
        (train, ["--background", "black"], "black"),
        (["eval", out, data], [], "black"),
        (["eval", out, data], ["--background", "#0000ff"], "#0000ff"),
        (["predict", out, data / "red"], [], "black"),
        (["predict", out, data / "red"], ["--background", "#00ff00"], "#00ff00"),
    ):
        colours.clear()
        succeed(*words, *asked)
        assert set(colours) == {expected}, words


@pytest.mark.parametrize("method", ["sct", "alore"])
def test_training_goes_on_from_an_adapter_for_new_images_and_one_more_class(method: str, tmp_path: Path) -> None:
    data, first, second = draw(tmp_path / "data", 12), tmp_path / "first", tmp_path / "second"
    succeed("train", data, "--out", first, "--method", method, "--epochs", 2, *SMALL)
    (tmp_path / "data" / "black").mkdir()
    for number in range(12):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "data" / "black" / f"{number}.png")
    options = ["--init-from", first, "--epochs", 1, "--lr", "1e-12", "--precision", "fp32"]
    code, _, err = run("train", data, "--out", second, *options)
    assert code == 0, err
    assert "new classes, whose part of the head starts at random: black" in err
    before, after = (load_file(path / TENSORS) for path in (first, second))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        grown = after[name][1:] if name.startswith("head.") else after[name]  # black comes first
        torch.testing.assert_close(grown, tensor, rtol=0, atol=1e-9)
    assert succeed("eval", second, data)["images"] == 8
    line = fail("train", data, "--out", second, "--init-from", first, "--method", "lora")
    assert f"--method is lora, but {first} is {method}" in line
    other = {"sct": "channels", "alore": "rank"}[method]
    assert f"--{other} cannot change" in fail("train", data, "--out", second, "--init-from", first, f"--{other}", 2)
