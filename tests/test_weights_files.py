"""Published weights files by name, layout and shape: every tensor is accounted for, and nothing in them is run."""

import argparse
import math
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import safetensors.torch
import timm
import torch
from published import Shapes, blank
from support import live
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from visgraft.backbones.heads import classifier_paths
from visgraft.backbones.weights import load_weights
from visgraft.errors import WeightsError

OUTPUTS = 3  # of the new head, other than those of the head in the file


@dataclass(frozen=True)
class Published:
    """A published file: the model that it fills, what it holds, and how many numbers of that are the backbone's."""

    model: str
    shapes: Shapes
    total: int
    arguments: Mapping[str, Any]


def full(model: str, shapes: Shapes, total: int, **arguments: Any) -> Published:
    return Published(model, shapes, total, arguments)


# The totals are the published ones of the models without their heads. ViT-L and ViT-H are two blocks deep here, because
# an .npz, unlike torch's files, cannot be written without its numbers; the totals of all blocks are counted below.
FULL: dict[str, Published] = {
    "ViT-B_16.npz": full("vit_base_patch16_224", published.jax_vit_shapes(768, 12, 12, 16, 14), 85_798_656),
    "ViT-L_16.npz": full(
        "vit_large_patch16_224", published.jax_vit_shapes(1024, 2, 16, 16, 14), 303_301_632 - 22 * 12_596_224, depth=2
    ),
    "ViT-H_14.npz": full(
        "vit_huge_patch14_224", published.jax_vit_shapes(1280, 2, 16, 14, 16), 630_764_800 - 30 * 19_677_440, depth=2
    ),
    "mae_pretrain_vit_base.pth": full("vit_base_patch16_224.mae", published.vit_shapes(768, 12, 16, 14), 85_798_656),
    "linear-vit-b-300ep.pth.tar": full(
        "vit_base_patch16_224", published.vit_shapes(768, 12, 16, 14, classes=1000), 85_798_656
    ),
    "swin_base_patch4_window7_224_22k.pth": full(
        "swin_base_patch4_window7_224", published.swin_shapes(128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 56), 86_743_224
    ),
    "convnext_base_22k_224.pth": full(
        "convnext_base", published.convnext_shapes((128, 256, 512, 1024), (3, 3, 27, 3)), 87_566_464
    ),
    "as_mlp_base_patch4_shift5_224.pth": full(
        "as_mlp_base_patch4_shift5_224", published.as_mlp_shapes(128, (2, 2, 18, 2)), 86_727_808
    ),
    "jx_mixer_b16_224_in21k-617b3de2.pth": full("mixer_b16_224", published.mixer_shapes(768, 12, 16, 196), 59_111_472),
}


def backbone_numbers(shapes: Shapes) -> int:
    """How many numbers a file holds without heads and buffers."""
    left_out = ("head.", "head/", "pre_logits/")
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(left_out)}
    return sum(math.prod(shape) for name, shape in kept.items() if not name.endswith(("_index", "attn_mask")))


def content(file: str, shapes: Shapes) -> dict[str, Any]:
    """A file's tensors, as small as its format allows."""
    return {name: np.zeros(shape, bool) for name, shape in shapes.items()} if file.endswith(".npz") else blank(shapes)


def refusal(model: nn.Module, path: Path) -> str:
    """The message with which a file is refused, after checking that it is one line with a remedy."""
    with pytest.raises(WeightsError, match=r"pass (another|that) file") as caught:
        load_weights(model, path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("file", FULL)
def test_a_published_file_fits_the_full_size_model(file: str, tmp_path: Path) -> None:
    facts = FULL[file]
    assert backbone_numbers(facts.shapes) == facts.total
    with torch.device("meta"):
        model = timm.create_model(facts.model, num_classes=OUTPUTS, **facts.arguments)
    load_weights(model, published.save(content(file, facts.shapes), tmp_path / file))
    heads = tuple(f"{path}." for path in classifier_paths(model))
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    assert sum(tensor.numel() for tensor in own.values()) == facts.total


@dataclass(frozen=True)
class Small:
    """A model of a few thousand parameters with the key structure of a published file."""

    make: Callable[..., Any]
    to_file: Callable[[dict[str, Tensor]], dict[str, Any]]
    shapes: Shapes | None = None  # what the file holds, to compare the conversion with
    classes: int = 7  # of the file's own head
    size: int = 32


def small_vit(name: str, size: int = 32) -> Callable[..., Any]:
    arguments = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return lambda classes, **changes: timm.create_model(name, num_classes=classes, **{**arguments, **changes})


def small_mixer(classes: int, **changes: Any) -> MlpMixer:
    return MlpMixer(
        **{"num_classes": classes, "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2} | changes
    )


def small_swin(classes: int, **changes: Any) -> Any:
    arguments = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return timm.create_model("swin_base_patch4_window7_224", num_classes=classes, **{**arguments, **changes})


def small_convnext(classes: int, **changes: Any) -> Any:
    arguments = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
    return timm.create_model("convnext_base", num_classes=classes, **{**arguments, **changes})


def with_pre_logits(state: dict[str, Tensor]) -> dict[str, Any]:
    extra = {"pre_logits/kernel": np.ones((32, 32), np.float32), "pre_logits/bias": np.ones(32, np.float32)}
    return published.to_jax(state, 2) | extra


def to_deit3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in state.items()}


def to_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    swaps = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    out = {"mask_token": torch.ones(1, 32), "rope_embed.periods": torch.ones(4)}
    for name, tensor in state.items():
        out[next((name.replace(ours, theirs) for ours, theirs in swaps.items() if ours in name), name)] = tensor
    return out | {f"blocks.{i}.attn.qkv.{part}": torch.zeros(96) for i in range(2) for part in ("bias", "bias_mask")}


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


SWIN = published.swin_shapes(16, (2, 2), (2, 4), 4, 16, classes=7)
CONVNEXT = published.convnext_shapes((8, 16, 24, 32), (1, 2, 1, 1), classes=7)
SMALL: dict[str, Small] = {
    "ViT-B_16.npz": Small(
        small_vit("vit_base_patch16_224"), with_pre_logits, published.jax_vit_shapes(32, 2, 2, 8, 4), classes=21843
    ),
    "mae_pretrain_vit_base.pth": Small(
        small_vit("vit_base_patch16_224.mae"), without_head, published.vit_shapes(32, 2, 8, 4)
    ),
    "linear-vit-b-300ep.pth.tar": Small(
        small_vit("vit_base_patch16_224"), dict, published.vit_shapes(32, 2, 8, 4, classes=7)
    ),
    "swin_base_patch4_window7_224_22k.pth": Small(
        small_swin, lambda state: published.to_swin(state, SWIN), SWIN, size=64
    ),
    "convnext_base_22k_224.pth": Small(small_convnext, lambda state: published.to_convnext(state, CONVNEXT), CONVNEXT),
    "jx_mixer_b16_224_in21k-617b3de2.pth": Small(small_mixer, dict, published.mixer_shapes(32, 2, 8, 16, classes=7)),
    "deit_base_patch16_224.pth": Small(small_vit("deit_base_patch16_224"), dict),
    "deit_base_distilled_patch16_224.pth": Small(small_vit("deit_base_distilled_patch16_224"), dict),
    "deit_3_base_224_21k.pth": Small(small_vit("deit3_base_patch16_224"), to_deit3),
    "dinov3_vits16_pretrain.pth": Small(small_vit("vit_small_patch16_dinov3"), to_dinov3, classes=0),
}


def features(model: Any, size: int) -> Tensor:
    """What the classifier sees: ConvNeXt's final norm belongs to it, though timm keeps that in `head`."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().forward_head(model.forward_features(x), pre_logits=True)


def prepared(file: str) -> tuple[Any, dict[str, Any]]:
    """A live small model, and its tensors in the layout of a published file."""
    facts = SMALL[file]
    source = live(facts.make(facts.classes), seed=4)
    return source, facts.to_file(source.state_dict())


@pytest.mark.parametrize("file", SMALL)
def test_a_published_layout_gives_the_same_numbers(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = SMALL[file]
    source, state = prepared(file)
    if facts.shapes is not None:
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == facts.shapes
    model, fresh = live(facts.make(OUTPUTS), seed=5), live(facts.make(OUTPUTS), seed=5)
    load_weights(model, published.save(state, tmp_path / file))
    assert torch.equal(features(model, facts.size), features(source, facts.size))
    for path in classifier_paths(model):
        assert torch.equal(model.get_submodule(path).weight, fresh.get_submodule(path).weight), "a head was loaded"
    headless = facts.make(0)
    load_weights(headless, tmp_path / file)
    assert torch.equal(features(headless, facts.size), features(source, facts.size))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", SMALL)
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_each_refused(file: str, tmp_path: Path) -> None:
    facts = SMALL[file]
    _, state = prepared(file)
    norm = "Transformer/encoder_norm/scale" if file.endswith(".npz") else "norm.weight"
    # One number would fill the whole tensor if it were copied in.
    for changes in ({norm: None}, {"extra": state[norm]}, {norm: state[norm][:1]}, {norm: state[norm][:-1]}):
        changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        model = live(facts.make(OUTPUTS), seed=5)
        before = features(model, facts.size)
        message = refusal(model, published.save(changed, tmp_path / file))
        assert ("extra" if "extra" in changes else "norm") in message
        assert torch.equal(features(model, facts.size), before), "nothing was loaded"


def test_a_whole_training_state_is_read_for_its_backbone(tmp_path: Path) -> None:
    source, state = prepared("ViT-B_16.npz")
    wrapped = {f"opt/target/{name}": array for name, array in state.items()} | {"opt/state/step": np.zeros(())}
    model = SMALL["ViT-B_16.npz"].make(OUTPUTS)
    load_weights(model, published.save(wrapped, tmp_path / "state.npz"))
    assert torch.equal(features(model, 32), features(source, 32))
    wrapped["opt/target/extra/kernel"] = np.zeros(3)
    assert "opt/target/extra/kernel is unknown" in refusal(model, published.save(wrapped, tmp_path / "state.npz"))


def test_a_file_of_another_family_is_refused(tmp_path: Path) -> None:
    distilled = published.save(prepared("deit_base_distilled_patch16_224.pth")[1], tmp_path / "distilled.pth")
    assert "dist_token" in refusal(small_vit("deit_base_patch16_224")(OUTPUTS), distilled)
    convnext = published.save(prepared("convnext_base_22k_224.pth")[1], tmp_path / "convnext.pth")
    assert "; it has besides " in refusal(small_convnext(OUTPUTS, depths=(1, 1, 1, 1)), convnext)
    google = published.save(prepared("ViT-B_16.npz")[1], tmp_path / "Mixer-B_16.npz")
    assert "timm has no reader of .npz files for MlpMixer" in refusal(small_mixer(OUTPUTS), google)


RESAMPLED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "pos_embed": (small_vit("vit_base_patch16_224"), {"img_size": 48}),
    "patch_embed": (small_vit("vit_base_patch16_224"), {"img_size": 32, "patch_size": 4}),
    "swin": (small_swin, {"window_size": 8}),
    "swin_v2": (
        lambda classes, **changes: timm.create_model(
            "swinv2_tiny_window8_256", num_classes=classes,
            **{"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, **changes},
        ),
        {"img_size": 64, "window_size": 8},
    ),
    "beit": (small_vit("beit_base_patch16_224"), {"img_size": 48}),
    "eva": (
        lambda classes, **changes: small_vit("eva02_tiny_patch14_224")(classes, ref_feat_shape=(4, 4), **changes),
        {"img_size": 48, "embed_dim": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RESAMPLED)
def test_resampling_is_timms_own(kind: str, tmp_path: Path) -> None:
    make, changes = RESAMPLED[kind]
    state = live(make(OUTPUTS), seed=4).state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    model = make(OUTPUTS, **changes)
    load_weights(model, tmp_path / "w.safetensors")
    overlay = {"state_dict": state, "num_classes": OUTPUTS}
    expected = make(OUTPUTS, pretrained=True, pretrained_cfg_overlay=overlay, **changes).state_dict()
    changed = [name for name, tensor in model.state_dict().items() if tensor.shape != state[name].shape]
    assert changed or kind == "swin_v2", "nothing was resampled"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]) or name.startswith("head"), name


def test_the_position_embeddings_of_an_npz_are_resampled_as_timm_does(tmp_path: Path) -> None:
    make = SMALL["ViT-B_16.npz"].make
    path = published.save(prepared("ViT-B_16.npz")[1], tmp_path / "w.npz")
    model, expected = make(OUTPUTS, img_size=48), make(OUTPUTS, img_size=48)
    load_weights(model, path)
    expected.load_pretrained(str(path))
    assert model.pos_embed.shape == (1, 37, 32) and torch.equal(model.pos_embed, expected.pos_embed)


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


class Settings(dict[str, Any]):
    """A training script's own class, like Swin's CfgNode."""


@pytest.mark.parametrize("new_format", [True, False])
def test_other_objects_in_a_file_are_refused_and_never_made(new_format: bool, tmp_path: Path) -> None:
    state, marker = prepared("mae_pretrain_vit_base.pth")[1], tmp_path / "marker"
    model, path = SMALL["mae_pretrain_vit_base.pth"].make(OUTPUTS), tmp_path / "w.pth"
    hidden = argparse.Namespace(output=Trap(marker))
    for extra, named in ((Trap(marker), "mkdir"), (hidden, "mkdir"), (Settings(lr=1), "Settings")):
        torch.save({"model": state, "config": extra}, path, _use_new_zipfile_serialization=new_format)
        message = refusal(model, path)
        assert "Python objects besides tensors" in message and named in message and "safetensors" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists(), "the trap itself works"


def test_objects_in_an_archive_of_arrays_are_refused_and_never_made(tmp_path: Path) -> None:
    state, marker = prepared("ViT-B_16.npz")[1], tmp_path / "marker"
    state["cls"] = np.array([Trap(marker)], dtype=object)
    np.savez(tmp_path / "w.npz", **state)
    assert "allow_pickle=False" in refusal(SMALL["ViT-B_16.npz"].make(OUTPUTS), tmp_path / "w.npz")
    assert not marker.exists()


PLAIN_VIT = small_vit("vit_base_patch16_224")


def wrapped(state: dict[str, Tensor]) -> dict[str, tuple[Any, str]]:
    """The same tensors as training programs write them, and what is said of the choice."""
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def inside(prefix: str) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in state.items()}

    return {
        "model": ({"model": state, "optimizer": {}, "epoch": 3}, "took model"),
        "model_state_dict": ({"model_state_dict": state, "epoch": 3}, "took model_state_dict"),
        "state_dict": ({"state_dict": state, "arch": "vit"}, "took state_dict"),
        "averaged": ({"state_dict": other, "state_dict_ema": state}, "took state_dict_ema (beside it: state_dict)"),
        "teacher": ({"student": other, "teacher": state}, "took teacher (beside it: student)"),
        "student": ({"student": state}, "took student"),
        "empty": ({"model_ema": {}, "state_dict": state}, "took state_dict"),
        "no tensors": ({"ema": {"decay": 0.99, "updates": 9}, "model": state}, "took model"),
        "averaged module": (
            {"model_ema": {"module": state, "updates": 3}, "model": other},
            "took model_ema (beside it: model), took module",
        ),
        "numbers beside": ({**state, "epoch": 3}, "left out what is no tensor (epoch)"),
        "nested": ({"state_dict": {"model": state}}, "took state_dict, took model"),
        "module": (inside("module."), "took what begins with module."),
        "compiled": ({"model": inside("_orig_mod.")}, "took model, took what begins with _orig_mod."),
        "backbone": (
            {**inside("backbone."), "head.last.weight": torch.zeros(2, 2)},
            "took what begins with backbone. (left out: head.last.weight)",
        ),
        "encoder": (
            {"state_dict": {**inside("module.encoder."), "module.predictor.0.weight": torch.zeros(2)}},
            "took state_dict, took what begins with module., "
            "took what begins with encoder. (left out: predictor.0.weight)",
        ),
        "dino": (
            {
                "teacher": {**inside("module.backbone."), "module.head.mlp.0.weight": torch.zeros(2, 2)},
                "student": other,
            },
            "took teacher (beside it: student), took what begins with module., took what begins with backbone.",
        ),
    }


TENSORS_ALONE = ("module", "backbone")
"""Of `wrapped`, what safetensors can hold."""


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*((kind, "pth") for kind in wrapped({})), *((kind, "safetensors") for kind in TENSORS_ALONE)],
)
def test_what_training_programs_wrap_around_weights_is_opened(
    kind: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "visgraft")
    state = live(PLAIN_VIT(0)).state_dict()
    content_, told = wrapped(state)[kind]
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(content_, path)
    else:
        torch.save(content_, path)
    model = PLAIN_VIT(3)
    load_weights(model, path)
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("visgraft")]
    assert line.startswith(f"{path}: {told}")


def test_a_bare_file_is_taken_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "visgraft")
    torch.save(live(PLAIN_VIT(0)).state_dict(), tmp_path / "w.pth")
    load_weights(PLAIN_VIT(3), tmp_path / "w.pth")
    assert not [record for record in caplog.records if record.name.startswith("visgraft")]


def test_what_does_not_fit_is_named_on_both_sides(tmp_path: Path) -> None:
    state = live(PLAIN_VIT(0)).state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(5)
    torch.save({"model": state}, tmp_path / "w.pth")
    line = refusal(PLAIN_VIT(3), tmp_path / "w.pth")
    assert "it lacks norm.weight; it has besides extra.weight; it has in another shape norm.bias" in line


@pytest.mark.parametrize(
    ("content_", "told"),
    [
        (b"<html>not found</html>", "no file of tensors that torch wrote"),
        (b"hello", "no file of tensors that torch wrote"),
        ({0: torch.zeros(2)}, "holds no tensors by name: it holds 0"),
        ({"a": 1, "b": "x"}, "holds no tensors by name: it holds a, b"),
        ({}, "holds no tensors by name"),
        ([torch.zeros(2)], "it holds a list"),
    ],
)
def test_what_is_no_checkpoint_says_so(content_: Any, told: str, tmp_path: Path) -> None:
    if isinstance(content_, bytes):
        (tmp_path / "w.pth").write_bytes(content_)
    else:
        torch.save(content_, tmp_path / "w.pth")
    line = refusal(PLAIN_VIT(3), tmp_path / "w.pth")
    assert told in line and "weights_only" not in line


def test_weights_of_another_family_are_named_on_both_sides(tmp_path: Path) -> None:
    torch.save(live(PLAIN_VIT(0)).state_dict(), tmp_path / "w.pth")
    line = refusal(timm.create_model("test_convnext"), tmp_path / "w.pth")
    assert "it lacks " in line and "it has besides blocks.0." in line


def test_the_suffix_of_safetensors_may_be_in_upper_case(tmp_path: Path) -> None:
    state, model = live(PLAIN_VIT(0)).state_dict(), PLAIN_VIT(3)
    safetensors.torch.save_file(state, tmp_path / "W.SAFETENSORS")
    load_weights(model, tmp_path / "W.SAFETENSORS")
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())
