"""The digest of the backbone that an adapter belongs to: made late, it is the one of the model as it was given."""

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CONFIGS, DEFAULTS, batches, images, vit
from torch import nn
from torch.nn import functional as F

from visgraft import attach, load, merge, save
from visgraft.core.attached import get_attached
from visgraft.core.tensors import backbone_digest


def given(name: str = "alore-0") -> Any:
    torch.manual_seed(1)
    return attach(vit(), CONFIGS[name], batches())


def steps(model: nn.Module) -> None:
    """Train, so that everything that trains changes in place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        F.cross_entropy(model.train()(images()), torch.arange(6) % 5).backward()
        optimizer.step()


@pytest.mark.parametrize("name", DEFAULTS)
def test_after_training_it_is_that_of_the_plain_model(name: str) -> None:
    model = given(name)
    steps(model)
    assert get_attached(model).digest == backbone_digest(vit())


@pytest.mark.parametrize("name", ["alore-0", "bitfit-0", "full-0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_change_of_precision_does_not_matter(name: str, dtype: torch.dtype) -> None:
    model = given(name).to(dtype)
    assert backbone_digest(model) != backbone_digest(vit())
    assert get_attached(model).digest == backbone_digest(vit())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_carry_the_digest_but_no_second_set_of_tensors(copied: Any) -> None:
    model = given()
    other = copied(model)
    assert not get_attached(other).plain._then
    assert get_attached(other.bfloat16()).digest == backbone_digest(vit())


def test_tensors_that_the_model_has_left_behind_are_let_go() -> None:
    model = given()
    weight = weakref.ref(model.blocks[0].mlp.fc1.weight.untyped_storage())
    model.bfloat16()
    gc.collect()
    assert weight() is not None, "the digest could not be made any more"
    model.train()
    gc.collect()
    assert weight() is None
    assert get_attached(model).digest == backbone_digest(vit())


def test_an_adapter_stored_late_in_another_precision_loads(tmp_path: Path) -> None:
    model = given()
    steps(model)
    save(model.bfloat16(), tmp_path / "a")
    assert get_attached(load(tmp_path / "a", backbone=vit()).model).digest == backbone_digest(vit())


def test_neither_attaching_nor_merging_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgraft.core.tensors._sha256", lambda tensors: pytest.fail("made where nobody asked for it"))
    merge(given().eval(), images())


def test_on_the_meta_device_there_is_none() -> None:
    with torch.device("meta"):
        model = vit_without_data()
    attach(model, CONFIGS["alore-0"])
    assert get_attached(model).digest is None


def vit_without_data() -> Any:
    from support import TINY
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**TINY)
