"""A merged model is a plain one: the same operations in the same order, the same modules, as timm opens it too."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import CONFIGS, TINY, enliven, family, images
from test_laws import OBEYING, adapted, in_turn, pictures
from timm.models.vision_transformer import VisionTransformer

from visgraft import attach, list_methods, merge
from visgraft.backbones.creation import model_data_config
from visgraft.export.merge import why_not_merged
from visgraft.export.plain import save_plain

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MERGING = [(name, kind) for name, kind in OBEYING if why_not_merged(family(kind), CONFIGS[name]) is None]


@pytest.fixture(scope="module")
def look() -> dict[str, Any]:
    """What the benchmark of merged models compares them by."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "merged.py"))
    finally:
        sys.path.remove(str(BENCHMARKS))


@in_turn(MERGING)
def test_a_merged_model_does_what_a_plain_one_does_and_nothing_else(name: str, kind: str, look: Any) -> None:
    x, plain, model = pictures(kind, 2), family(kind), adapted(name, kind)
    merged, _ = merge(model, x)
    expected = look["operations"](plain, x)
    assert len(expected) > 10 and any("[2, " in one or "(2, " in one for one in expected), "no shapes were seen"
    assert look["operations"](merged, x) == expected
    assert look["tree"](merged) == look["tree"](plain)
    if hasattr(model, "visgraft") and model.visgraft.positions:
        assert look["operations"](model, x) != expected, "the adapted model's own operations were not seen"


def test_every_method_that_claims_to_be_affine_is_among_them() -> None:
    claiming = {name for name, kind in list_methods().items() if kind.Config().affine}
    assert {"alore", "lora", "repadapter", "ssf"} <= claiming <= {CONFIGS[name].method for name, _ in MERGING} | {"sct"}


@pytest.mark.parametrize("name", ["alore-0", "sct-1", "ssf-0"])
def test_so_does_the_model_that_timm_opens_from_the_folder(name: str, look: Any, tmp_path: Path) -> None:
    size, x = {"img_size": 32}, images(2, size=32)
    torch.manual_seed(0)
    made = [timm.create_model("vit_tiny_patch16_224", num_classes=TINY["num_classes"], **size).eval() for _ in range(2)]
    model = enliven(attach(made[0], CONFIGS[name], [(x, torch.tensor([0, 1]))]), strength=0.01).eval()
    merged, certificate = merge(model, x)
    path = save_plain(merged, tmp_path / "merged", [], model_data_config(merged), certificate)
    opened = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    assert isinstance(opened, VisionTransformer)
    assert look["operations"](opened, x) == look["operations"](made[1], x)
    assert look["tree"](opened) == look["tree"](made[1])
    torch.testing.assert_close(opened(x), merged(x))
