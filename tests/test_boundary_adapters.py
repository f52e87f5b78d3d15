"""Names, backbones, paths and transforms that do not fit an adapter are said in one line, before anything is done."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boundary import OTHER, SIZE, SIZES, adapted, files, opened, plain, refused
from PIL import Image
from support import family
from torchvision import transforms

import visgraft
from visgraft import VisgraftError
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
