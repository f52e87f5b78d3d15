"""From the command line, on a model of each kind of family: train, measure, merge, and open the result with timm."""

from pathlib import Path

import pytest
import timm
import torch
from test_cli import draw, succeed

from visgraft import load
from visgraft.backbones.input_size import input_size

BACKBONES = [
    ("test_convnext", 64, "sct"),
    ("eva02_tiny_patch14_224", 28, "repadapter"),
    ("swin_tiny_patch4_window7_224", 64, "lora"),
    ("swinv2_tiny_window8_256", 64, "alore"),
    ("vit_small_patch16_dinov3", 32, "fact"),
]
OFTEN = ("test_convnext", "swin_tiny_patch4_window7_224")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("families") / "colours", 8)


@pytest.mark.parametrize(
    ("backbone", "size", "method"),
    [row if row[0] in OFTEN else pytest.param(*row, marks=pytest.mark.long) for row in BACKBONES],
)
def test_a_family_from_images_to_a_plain_model(
    backbone: str, size: int, method: str, colours: Path, tmp_path: Path
) -> None:
    adapter, plain = tmp_path / "adapter", tmp_path / "plain"
    options = ["--backbone", backbone, "--weights", "none", "--image-size", size, "--epochs", 1]
    trained = succeed("train", colours, "--out", adapter, "--method", method, *options)
    measured = succeed("eval", adapter, colours, "--split", "val")
    assert measured["top1"] == trained["top1"]
    certificate = succeed("merge", adapter, "--data", colours, "--out", plain)
    assert certificate["source"] == "images"
    assert certificate["merged_error"] <= certificate["error_tolerance"]
    model, _, classes = load(adapter)
    assert input_size(model) == (3, size, size)
    assert classes == ("blue", "green", "red")
    x = torch.randn(2, 3, size, size)
    reopened = timm.create_model(f"local-dir:{plain}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(x), model.eval()(x), rtol=1e-4, atol=1e-4)
