"""Labels, sizes and channels that do not fit a model are said in one line, before anything is done with them."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boundary import (
    CLASSES,
    CONFIG,
    HALF,
    OTHER,
    SIZE,
    SIZES,
    adapted,
    files,
    never,
    opened,
    plain,
    read,
    refused,
    several,
    train,
)
from support import ALL_FAMILIES, batches, enliven, family, vit
from support import images as pictures
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

import visgraft
from visgraft import DataError, Example, Images, LinearConfig, LoRAConfig, SCTConfig, VisgraftError
from visgraft.backbones.creation import image_transform
from visgraft.backbones.heads import head_outputs
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError
from visgraft.methods.full import FullConfig

# Classes and the head


def test_labels_beyond_the_head_are_refused_before_anything_is_read(files: list[Path], opened: list[Path]) -> None:
    model, images = adapted(2), read(files)
    right = replace(images, labels=images.labels.clamp(max=1))
    words = ("labels up to 2", "head has 2 outputs", "num_classes=3")
    with refused(DataError, "training images have", *words, model=model):
        train(model, images)
    with refused(DataError, "validation images have", *words, model=model):
        train(model, right, images)
    with refused(DataError, *words, model=model):
        visgraft.evaluate(model, images)
    assert opened == []
    assert visgraft.evaluate(model, right).images == 6 and len(opened) == 6


def test_a_head_with_more_outputs_than_classes_is_refused_where_those_are_known(
    files: list[Path], opened: list[Path]
) -> None:
    model = adapted(5)
    with refused(DataError, "have 3 classes", "head has 5 outputs", "num_classes=3", model=model):
        train(model, read(files, outputs=CLASSES))
    with refused(DataError, "have 3 classes", "head has 5 outputs", "num_classes=3", model=model):
        visgraft.evaluate(model, read(files, outputs=CLASSES))
    assert opened == []
    assert visgraft.train(model, read(files), CONFIG).kept_epoch == 1, "a class may have no image here"
    assert read(files, outputs=CLASSES).outputs == CLASSES and read(files).outputs == 0


def test_the_width_of_labels_for_several_classes_is_that_of_the_head(files: list[Path], opened: list[Path]) -> None:
    images = several(read(files))
    for outputs in (2, 5):
        model = adapted(outputs)
        with refused(DataError, "3 classes", f"head has {outputs} outputs", "num_classes=3", model=model):
            train(model, images)
    model = adapted()
    with refused(DataError, "training and validation images", "int64 [N]", model=model):
        train(model, images, read(files))
    assert opened == []
    assert visgraft.train(model, images, CONFIG, images).kept_epoch == 1


def test_a_model_without_a_head_is_not_trained(files: list[Path], opened: list[Path]) -> None:
    model = visgraft.attach(plain(0), FullConfig())
    with refused(DataError, "no head (num_classes=0)", "have 3 classes", "num_classes=3", model=model):
        train(model, read(files))
    assert opened == []


WRONG_LABELS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "int32": (Tensor.int, "are int32 of shape [6]"),
    "float": (Tensor.float, "are float32 of shape [6]"),
    "one-hot whole numbers": (lambda y: nn.functional.one_hot(y, CLASSES), "are int64 of shape [6, 3]"),
    "shares": (lambda y: torch.full((6, CLASSES), 1 / 3), "are not all 0 or 1"),
    "negative": (lambda y: y - 1, "go down to -1"),
    "a list": (Tensor.tolist, "are a list"),
    "an array": (Tensor.numpy, "are a ndarray"),
    "too few": (lambda y: y[:4], "6 training images, but 4 labels"),
    "none": (lambda y: y[:0], "there are no training images"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_what_is_no_label_is_named(name: str, files: list[Path], opened: list[Path]) -> None:
    change, words = WRONG_LABELS[name]
    model, images = adapted(), read(files)
    with refused(DataError, words, "pass" if name != "negative" else "numbered from 0", model=model):
        train(model, replace(images, labels=change(images.labels)))
    assert opened == []


def test_what_is_no_pixel_is_named() -> None:
    model, labels = adapted(), torch.arange(6) % CLASSES
    pixels = torch.zeros(6, 3, SIZE, SIZE, dtype=torch.uint8)
    for wrong, means, words in (
        (pixels / 255, HALF, "pixels in float32; pass them as uint8"),
        (pixels.numpy(), HALF, "are a ndarray; pass a tensor"),
        (pixels[0], HALF, "the shape [3, 16, 16]; pass pixels [N, channels"),
        (pixels, (0.5, 0.5), "3 channels, but 2 means and 2 standard deviations; pass one"),
    ):
        with refused(DataError, words, model=model):
            train(model, Images(wrong, labels, means, means))  # type: ignore[arg-type]
    with refused(DataError, "are a list; pass what visgraft.load_images returns", model=model):
        train(model, [(pixels, labels)])


def test_nothing_is_measured_on_no_images(files: list[Path]) -> None:
    model, none = adapted(), replace(read(files), labels=torch.zeros(0, dtype=torch.int64))
    with refused(DataError, "there are no images; pass at least one", model=model):
        visgraft.evaluate(model, none)
    with refused(DataError, "there are no validation images; pass at least one", model=model):
        train(model, read(files), none)


def test_labels_of_examples_are_checked_before_one_is_decoded(files: list[Path], opened: list[Path]) -> None:
    facts = visgraft.model_data_config(plain())

    def load(label: Any, first: Any = 0, outputs: int = CLASSES) -> Tensor:
        return visgraft.load_images([Example(files[0], first), Example(files[1], label)], facts, outputs=outputs).labels

    for label, first, words in (
        (3, 0, "the label 3, but classes are 0 to 2 (outputs=3)"),
        (-1, 0, "the label -1"),
        ("cat", 0, "the label 'cat'; pass the number of its class"),
        (1.0, 0, "the label 1.0"),
        ((0, 1), 0, "the label (0, 1)"),
        ((0, 3), (0,), "the label 3"),
        ((-1,), (0,), "the label -1"),
        (1, (0,), "the label 1; pass a tuple"),
    ):
        with refused(DataError, str(files[1]), words):
            load(label, first)
    with refused(DataError, "the label -1, but classes are numbers from 0 on"):
        load(-1, outputs=0)
    assert opened == []
    assert load(np.int64(2)).tolist() == [0, 2] and load((0, 2), ()).tolist() == [[0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_a_head_says_how_many_outputs_it_has(name: str) -> None:
    assert head_outputs(family(name)) == 5
    assert head_outputs(family(name, num_classes=0)) == 0


def test_a_head_put_in_by_hand_counts_and_not_what_timm_remembers(files: list[Path], tmp_path: Path) -> None:
    model, images = plain(5), read(files, outputs=CLASSES)
    model.head = nn.Linear(32, CLASSES)
    assert model.num_classes == 5
    visgraft.attach(model, LinearConfig())
    assert visgraft.train(model, images, replace(CONFIG, class_weights="balanced")).kept_epoch == 1
    visgraft.save(model, tmp_path / "a", classes=["a", "b", "c"])
    assert visgraft.load(tmp_path / "a", backbone=plain()).classes == ("a", "b", "c")
    model.head = nn.Linear(32, 2)
    with refused(DataError, "head has 2 outputs", model=model):
        visgraft.evaluate(model, images)


class Silent(nn.Module):
    """Answers with so many outputs, and does not say how many."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean(dim=(2, 3)))


def test_a_model_that_does_not_say_its_outputs_is_measured_by_what_it_answers(files: list[Path]) -> None:
    images = read(files)
    assert visgraft.evaluate(Silent(CLASSES), images).images == 6
    with refused(DataError, "labels up to 2", "head has 2 outputs"):
        visgraft.evaluate(Silent(2), images)


# Sizes and channels


def test_images_of_another_size_name_both(files: list[Path], opened: list[Path]) -> None:
    model, right, other = adapted(), read(files), read(files, OTHER)
    with refused(DataError, "training images have", *SIZES, "model_data_config", model=model):
        train(model, other)
    with refused(DataError, "validation images have", *SIZES, model=model):
        train(model, right, other)
    with refused(DataError, *SIZES, model=model):
        visgraft.evaluate(model, other)
    with refused(DataError, f"{OTHER} × {OTHER} pixels", "takes 16 × 32", "img_size=24"):
        visgraft.evaluate(vit(num_classes=CLASSES, img_size=(16, 32)), other)
    assert opened == []


def test_images_to_merge_or_score_on_name_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enliven(adapted())
    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module("visgraft.export.merge"), "folded", never)
        for given in (pictures(size=OTHER), batches(size=OTHER), [pictures(), pictures(size=OTHER)]):
            with refused(DataError, "images to measure on have", *SIZES, model=model):
                visgraft.merge(model, given)
    assert visgraft.merge(model, pictures())[1].images == 6
    backbone = plain()
    for wrong in (batches(size=OTHER), [batches()[0], batches(size=OTHER)[0]]):
        with refused(DataError, "images to score channels with have", *SIZES, model=backbone):
            visgraft.attach(backbone, SCTConfig(channels=4), wrong)
    x, y = batches()[0]
    for wrong in (x, (x, y), [x], [(x, y, y)], [(x, y[:2])], [(x[0], y)], [{"image": x}]):
        with refused(DataError, "must yield pairs (images [B, 3, H, W], labels [B])", model=backbone):
            visgraft.attach(backbone, SCTConfig(channels=4), wrong)  # type: ignore[arg-type]
    assert not hasattr(backbone, CHILD)
    assert hasattr(visgraft.attach(backbone, SCTConfig(channels=4), DataLoader(list(zip(x, y, strict=True)), 4)), CHILD)


def test_models_that_take_any_size_still_do(files: list[Path]) -> None:
    images = read(files, 32)
    for model in (family("convnext"), vit(img_size=SIZE, dynamic_img_size=True)):
        visgraft.attach(model, LoRAConfig(), None)
        assert visgraft.train(model, images, CONFIG, images).kept_epoch == 1
        assert visgraft.evaluate(model, images).images == 6
        assert visgraft.merge(model, pictures(size=32))[1].images == 6
        transform = image_transform(visgraft.model_data_config(plain(size=32)))
        assert len(visgraft.predict(replace(visgraft.Adapted.of(model), own_transform=transform), files)) == 6


def test_a_grey_model_is_told_from_one_in_colour(files: list[Path], opened: list[Path]) -> None:
    model, images = adapted(in_chans=1), read(files)
    words = ("3 channels", "takes 1 (in_chans=1)", "in_chans=3")
    with refused(DataError, *words, "visgraft.Images"):
        visgraft.load_images([Example(files[0], 0)], visgraft.model_data_config(model))
    with refused(DataError, *words, model=model):
        train(model, images)
    with refused(DataError, *words, model=model):
        visgraft.evaluate(model, images)
    transform = image_transform(visgraft.model_data_config(model))
    with refused(AdapterError, *words, model=model):
        visgraft.predict(replace(visgraft.Adapted.of(model), own_transform=transform), files)
    with refused(DataError, "1 channels", "takes 3 (in_chans=3)"):
        visgraft.merge(adapted(), torch.zeros(2, 1, SIZE, SIZE))
    assert opened == []


def test_a_grey_model_works_on_pixels_of_its_own(files: list[Path], tmp_path: Path) -> None:
    x, y = torch.randn(6, 1, SIZE, SIZE), torch.arange(6) % CLASSES
    model = visgraft.attach(plain(in_chans=1), SCTConfig(channels=4, mode="mlp"), [(x, y)])
    own = Images((x * 50 + 128).clamp(0, 255).to(torch.uint8), y, (0.5,), (0.5,))
    with refused(VisgraftError, "rand_augment changes colours", "1 channels", "leave it out", model=model):
        visgraft.train(model, own, replace(CONFIG, rand_augment="rand-m5"), None, never)
    assert visgraft.train(model, own, replace(CONFIG, flip=True), own).kept_epoch == 1
    assert visgraft.merge(model, x)[1].source == "images" and visgraft.merge(model)[1].source == "noise"
    visgraft.save(model, tmp_path / "a")
    loaded = visgraft.load(tmp_path / "a", backbone=plain(in_chans=1)).model
    assert visgraft.evaluate(loaded, own).images == 6
    grey = transforms.Compose([transforms.Grayscale(), transforms.Resize((SIZE, SIZE)), transforms.ToTensor()])
    assert len(visgraft.predict(replace(visgraft.Adapted.of(loaded), own_transform=grey), files)) == 6
