"""Image sizes in every family: what a model takes, what it is built for, and that it comes back from a folder so."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from support import CLASSES, FAMILIES, images, live, logits
from test_backbone import random_picture, refusal
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer

from visgraft import Backbone, create_backbone, load, model_data_config, save
from visgraft.backbones.creation import image_transform
from visgraft.backbones.input_size import built_size, input_size, patch_size
from visgraft.core.attach import attach, head_paths
from visgraft.errors import SiteError, VisgraftError
from visgraft.export.plain import save_plain
from visgraft.methods.linear import LinearConfig

# Those that timm creates by name; its MLPs cannot be made as small so.
SIZED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: facts for name, facts in FAMILIES.items() if isinstance(facts[0], str)},
    "mixer": ("mixer_s32_224", {"img_size": 64}),
    "resmlp": ("resmlp_12_224", {"img_size": 32}),
    "resnet": ("test_resnet", {}),
}
FREE = ("convnext", "convnext_conv", "convnext_v2", "as_mlp", "resnet")  # whose layers take any size
BOUND = ("mixer", "resmlp")  # whose weights fit one size only


@dataclass
class NoCertificate:
    """Stands in for a merge's."""


def origin(family: str, weights: str = "none", size: int | None = None) -> Backbone:
    """A small backbone of a family, created for images of a size."""
    name, arguments = SIZED[family]
    own = {key: value for key, value in arguments.items() if key != "img_size"}
    return Backbone(name, weights, size or arguments.get("img_size", 32), arguments=own)


def create(family: str) -> Any:
    return live(create_backbone(origin(family), CLASSES)).eval()


@pytest.mark.parametrize("family", SIZED)
def test_a_saved_model_comes_back_by_timm_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = create(family)
    size = origin(family).image_size
    assert input_size(model) == (3, size, size)
    x = images(2, size=size)
    assert logits(model, x).std() > 0
    names = [f"class {i}" for i in range(CLASSES)]
    folder = save_plain(model, tmp_path / "m", names, model_data_config(model), NoCertificate())
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_us = create_backbone(Backbone(f"local-dir:{folder}"), CLASSES).eval()
    for again in (by_timm, by_us):
        assert torch.equal(logits(again, x), logits(model, x))
        assert input_size(again) == (3, size, size)
        assert model_data_config(again) == model_data_config(model)
    assert image_transform(model_data_config(model))(random_picture()).shape == (3, size, size)
    config = json.loads((folder / "config.json").read_text())
    assert ("img_size" in config["model_args"]) == (family not in FREE)


def test_a_saved_model_comes_back_without_what_newer_versions_of_timm_remember(tmp_path: Path) -> None:
    for family in ("deit3", "swin", "convnext"):
        model = create(family)
        model._model_args, model._traits = {}, {}
        folder = save_plain(model, tmp_path / family, [], model_data_config(model), NoCertificate())
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert input_size(again) == input_size(model)
        x = images(2, size=input_size(model)[1])
        assert torch.equal(logits(again, x), logits(model, x))


@pytest.mark.parametrize("family", SIZED)
def test_another_image_size_takes_the_same_weights_or_says_why_not(family: str, tmp_path: Path) -> None:
    model = create(family)
    own = input_size(model)[1]
    folder = save_plain(model, tmp_path / "m", [], model_data_config(model), NoCertificate())
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    for backbone in (Backbone(f"local-dir:{folder}", image_size=2 * own), origin(family, str(file), 2 * own)):
        if family in BOUND:
            message = refusal(lambda b=backbone: create_backbone(b, CLASSES))
            assert "depends on" in message and ("linear_tokens" if family == "resmlp" else "mlp_tokens") in message
            continue
        larger = create_backbone(backbone, CLASSES).eval()
        assert input_size(larger) == (3, 2 * own, 2 * own)
        assert model_data_config(larger)["input_size"] == [3, 2 * own, 2 * own]
        assert logits(larger, images(1, size=2 * own)).isfinite().all()
        assert built_size(larger) == (None if family in FREE else (2 * own, 2 * own))


@pytest.mark.parametrize("family", ["convnext", "swin", "mixer"])
def test_an_adapter_keeps_the_image_size(family: str, tmp_path: Path) -> None:
    model = attach(create_backbone(origin(family), CLASSES), LinearConfig())
    save(model, tmp_path / "a")
    size = origin(family).image_size
    loaded = load(tmp_path / "a")
    assert input_size(loaded.model) == (3, size, size)
    assert loaded.transform(random_picture()).shape == (3, size, size)
    by_timm = timm.create_model(SIZED[family][0], num_classes=CLASSES, **SIZED[family][1])
    save(attach(by_timm, LinearConfig()), tmp_path / "b")
    recorded = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    expected = timm.get_pretrained_cfg(SIZED[family][0]).input_size[1]
    assert recorded["backbone"]["image_size"] == (None if family in FREE else size)
    assert recorded["data_config"]["input_size"][1] == (expected if family in FREE else size)


def test_a_model_that_is_not_square_is_recorded_as_it_is(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", img_size=(32, 48), num_classes=CLASSES).eval()
    assert input_size(model) == (3, 32, 48)
    save(attach(model, LinearConfig()), tmp_path / "a")
    backbone = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["backbone"]
    assert (backbone["image_size"], backbone["arguments"]) == (None, {"img_size": [32, 48]})
    again = create_backbone(Backbone(backbone["name"], "none", arguments=backbone["arguments"]))
    assert input_size(again) == (3, 32, 48)
    assert again.pos_embed.shape == model.pos_embed.shape


def test_an_image_size_on_which_a_model_cannot_run_is_refused() -> None:
    for name, size, said in (
        ("test_resnet", 0, "test_resnet does not run on images of 0 pixels"),
        ("test_convnext", -1, "test_convnext does not run on images of -1 pixels"),
        ("tresnet_m", 37, "use 224, its own size"),
        ("efficientformer_l1", 160, "use 224, its own size"),
        ("swin_tiny_patch4_window7_224", 30, "use 28 or 32"),
        ("mixer_s32_224", 48, "use 32 or 64"),
    ):
        message = refusal(lambda n=name, s=size: create_backbone(Backbone(n, "none", image_size=s)), VisgraftError)
        assert said in message


def test_a_model_made_without_timms_factory_says_its_size_or_that_it_does_not() -> None:
    vit = VisionTransformer(img_size=(32, 48), patch_size=16, embed_dim=32, depth=1, num_heads=2, in_chans=1)
    assert input_size(vit) == (1, 32, 48)
    assert patch_size(vit) == (16, 16)
    convnext = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with pytest.raises(SiteError, match="create it with visgraft"):
        input_size(convnext)


# Facts of the real models, built on the meta device: image size, what is built for it, patch, paths of the heads.
REAL: dict[str, tuple[int, bool, int | None, tuple[str, ...]]] = {
    "vit_base_patch16_224": (224, True, 16, ("head",)),
    "vit_huge_patch14_224": (224, True, 14, ("head",)),
    "deit_base_distilled_patch16_224": (224, True, 16, ("head", "head_dist")),
    "deit3_base_patch16_224": (224, True, 16, ("head",)),
    "vit_base_patch14_reg4_dinov2": (518, True, 14, ("head",)),
    "vit_base_patch16_dinov3": (256, True, 16, ("head",)),
    "vit_base_patch16_clip_224": (224, True, 16, ("head",)),
    "vit_base_patch16_siglip_224": (224, True, 16, ("head",)),
    "beit_base_patch16_224": (224, True, 16, ("head",)),
    "eva02_base_patch14_224": (224, True, 14, ("head",)),
    "swin_base_patch4_window7_224": (224, True, 4, ("head.fc",)),
    "swinv2_base_window8_256": (256, True, 4, ("head.fc",)),
    "convnext_base": (224, False, None, ("head.fc",)),
    "convnextv2_base": (224, False, None, ("head.fc",)),
    "mixer_b16_224": (224, True, 16, ("head",)),
    "resmlp_12_224": (224, True, 16, ("head",)),
    "as_mlp_base_patch4_shift5_224": (224, False, 4, ("head",)),
    "levit_128": (224, True, None, ("head", "head_dist")),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_say_what_they_take(name: str) -> None:
    size, built, patch, heads = REAL[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
    assert input_size(model) == (3, size, size)
    assert built_size(model) == ((size, size) if built else None)
    assert patch_size(model) == (None if patch is None else (patch, patch))
    assert head_paths(model) == heads
