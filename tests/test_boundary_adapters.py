"""Names, backbones, paths and transforms that do not fit an adapter are said in one line, before anything is done."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boundary import OTHER, SIZE, SIZES, adapted, files, opened, plain, refused
from PIL import Image
from support import family
from torchvision import transforms

import visgraft
from visgraft import LoRAConfig, VisgraftError
from visgraft.backbones.creation import image_transform, shape_from
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError

# Adapters


def test_a_backbone_of_another_size_than_the_adapters_is_refused(tmp_path: Path) -> None:
    model = adapted()
    visgraft.save(model, tmp_path / "a")
    for other in (plain(size=OTHER), plain(size=OTHER, dynamic_img_size=True)):
        with refused(AdapterError, str(tmp_path / "a"), "images of 16 × 16 pixels", "takes 24 × 24", model=other):
            visgraft.load(tmp_path / "a", backbone=other)
        assert not hasattr(other, CHILD)
    assert hasattr(visgraft.load(tmp_path / "a", backbone=plain()).model, CHILD)
    facts = visgraft.model_data_config(plain(size=OTHER))
    with refused(AdapterError, "prepared by data_config", *SIZES, model=model):
        visgraft.save(model, tmp_path / "b", data_config=facts)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([0, 1, 2], "class 0 is of type int; pass names as text"),
        (["a", "b", None], "class 2 is of type NoneType"),
        (np.arange(3), "class 0 is of type int64"),
        (np.array([["a", "b", "c"]]), "class 0 is of type ndarray"),
        ("abc", "classes is one text; pass a list"),
        (b"abc", "classes is one text"),
        ({"a", "b", "c"}, "classes is a set; pass a list of names in the order"),
        ({"a": 0, "b": 1, "c": 2}, "classes is a dict"),
        (3, "classes is int, no list; pass a list"),
        (None, "classes is NoneType, no list"),
        (["a", "b", "a"], "several classes are called a; give each class a name"),
        (["a", "b"], "2 class names for a head of 3 outputs; pass one for each"),
        (np.array(["a", "b"]), "2 class names for a head of 3 outputs"),
    ],
)
def test_what_is_no_list_of_names_is_refused(classes: Any, words: str, tmp_path: Path) -> None:
    model = adapted()
    with refused(AdapterError, words, model=model):
        visgraft.save(model, tmp_path / "a", classes=classes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [list, tuple, np.array, iter, lambda names: (name for name in names)])
def test_names_come_in_whatever_has_an_order(kind: Callable[[list[str]], Any], tmp_path: Path) -> None:
    visgraft.save(adapted(), tmp_path / "a", classes=kind(["b", "a", "c"]))
    names = visgraft.load(tmp_path / "a", backbone=plain()).classes
    assert names == ("b", "a", "c") and {type(name) for name in names} == {str}


# Predictions


def ready(transform: Any = None) -> visgraft.Adapted:
    model = adapted().eval()
    return replace(visgraft.Adapted.of(model, classes=("a", "b", "c")), own_transform=transform)


def test_one_path_is_no_list_of_paths(files: list[Path], opened: list[Path]) -> None:
    one = ready()
    for wrong, words in (
        (str(files[0]), f"'{files[0]}' is one path"),
        (files[0], f"'{files[0]}' is one path"),
        (bytes(files[0]), "bytes is none"),
        (None, "NoneType is none"),
    ):
        for call in (lambda given: visgraft.predict(one, given), lambda given: visgraft.predict_stream([one], given)):
            with refused(VisgraftError, "a list of paths is needed", words, "pass [path]", model=one.model):
                call(wrong)
    with refused(VisgraftError, "one is of type Image", "save it to a file", model=one.model):
        visgraft.predict(one, [Image.new("RGB", (8, 8))])  # type: ignore[list-item]
    assert opened == []
    given = visgraft.predict(one, files)
    assert len(given) == 6 and given == visgraft.predict(one, (str(path) for path in files))  # type: ignore[arg-type]


def test_a_transform_to_another_size_is_refused_before_anything_is_decoded(
    files: list[Path], opened: list[Path]
) -> None:
    facts = visgraft.model_data_config(plain(size=OTHER))
    for mode in ("center", "squash", "border"):
        one = ready(image_transform({**facts, "crop_mode": mode}))
        assert shape_from(one.transform) == (3, (OTHER, OTHER))
        with refused(AdapterError, "the transform of adapter 1", *SIZES, "visgraft.load", model=one.model):
            visgraft.predict_stream([one], files)
    with refused(AdapterError, "the transform of adapter 2", "16 × 16 pixels", "takes 24 × 24"):
        visgraft.predict_stream([ready(), replace(ready(), model=adapted(size=OTHER))], files)
    assert opened == []


def test_what_a_users_own_transform_makes_is_checked_before_the_model_sees_it(files: list[Path]) -> None:
    to_tensor = transforms.ToTensor()
    for steps, words in (
        ([transforms.Resize((OTHER, OTHER)), to_tensor], SIZES),
        ([to_tensor], ("20 × 30 pixels", "takes 16 × 16")),
        ([transforms.Resize(SIZE)], ("makes Image of", str(files[0]), "[3, H, W]")),
        ([to_tensor, lambda x: x[None]], ("a tensor of shape (1, 3, 20, 30)", str(files[0]))),
    ):
        one = ready(transforms.Compose(steps))
        assert shape_from(one.transform) is None
        with refused(AdapterError, *words, model=one.model):
            visgraft.predict(one, files)
    assert len(visgraft.predict(ready(transforms.Compose([transforms.Resize((SIZE, SIZE)), to_tensor])), files)) == 6


def test_images_that_are_no_batch_are_both_named(files: list[Path], tmp_path: Path) -> None:
    Image.new("RGB", (32, 48)).save(tmp_path / "x.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "y.png")
    paths = [tmp_path / "x.png", tmp_path / "y.png"]
    model = visgraft.attach(family("convnext"), LoRAConfig())
    any_size = replace(visgraft.Adapted.of(model), own_transform=transforms.ToTensor())
    with refused(AdapterError, "x.png (3, 48, 32)", "y.png (3, 32, 32)", "batch_size=1"):
        list(visgraft.predict_stream([any_size], paths))
    assert len(list(visgraft.predict_stream([any_size], paths, batch_size=1))) == 2
