"""Backbones: weights from every source, refused when they do not fit, and preprocessing as timm has it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from published import to_jax
from support import CLASSES, CONFIGS, TINY, enliven, images, live, logits, vit
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from visgraft import Backbone, attach, create_backbone, load, merge, model_data_config, save
from visgraft.backbones.creation import fit_image_size, image_transform, origin_of
from visgraft.backbones.weights import load_weights
from visgraft.errors import VisgraftError, WeightsError
from visgraft.export.plain import save_plain

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
WRAPPED: dict[str, Callable[[Any], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "distributed": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_every_kind_of_file_gives_the_same_tensors(wrap: str, tmp_path: Path) -> None:
    source = vit(seed=4)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(WRAPPED[wrap](source.state_dict()), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        model = vit(seed=5)
        load_weights(model, tmp_path / name)
        assert torch.equal(model.forward_features(images()), source.forward_features(images()))


def small(weights: str | Path, image_size: int = 16, num_classes: int = 0, seed: int = 0, **arguments: Any) -> Any:
    return create_backbone(Backbone("test_vit", str(weights), image_size, seed, {**SMALL, **arguments}), num_classes)


def refusal(call: Callable[[], object], kind: type[VisgraftError] = WeightsError) -> str:
    """The message with which something is refused, after checking that it is one line with a remedy."""
    with pytest.raises(kind, match=r"pass |use \d+|check the |leave that option out|lists all") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_picture(width: int = 47, height: int = 31) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists(), "the trap itself works"
    file, marker = tmp_path / "w.pth", tmp_path / "marker"
    for content in ({**vit().state_dict(), "norm.bias": Trap(marker)}, Trap(marker)):
        torch.save(content, file)
        assert str(file) in refusal(lambda: load_weights(vit(), file))
        file.write_bytes(pickle.dumps(content, protocol=2))
        assert str(file) in refusal(lambda: load_weights(vit(), file))
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("archive", [True, False])
def test_every_protocol_of_pickle_is_read_or_refused_in_one_line_and_never_run(
    protocol: int, archive: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    whole, trap, marker = tmp_path / "whole.pth", tmp_path / "trap.pth", tmp_path / "marker"
    state = vit(seed=1).state_dict()
    for file, content in ((whole, state), (trap, {**state, "norm.bias": Trap(marker)})):
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=archive)
    told = refusal(lambda: load_weights(vit(), trap))
    newer = "saved with pickle_protocol=4 or above (torch.save it anew without)"
    if protocol < 4:
        assert str(trap) in told and "could run code and are never unpickled; if you trust the file, resave" in told
        model = vit(seed=2)
        load_weights(model, whole)
        own = model.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in state.items() if not name.startswith("head."))
    else:
        assert f"{trap} cannot be read as weights" in told and newer in told
        assert newer in refusal(lambda: load_weights(vit(), whole))
    assert not marker.exists() and not [str(one.message) for one in recwarn if "pickle" in str(one.message)]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1],
    "cut in the header": lambda data: data[:50],
    "empty": lambda data: b"",
    "garbage": lambda data: bytes(reversed(data)),
}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.npz"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    file, state = tmp_path / name, vit().state_dict()
    if name.endswith(".pth"):
        torch.save(state, file)
    elif name.endswith(".npz"):
        np.savez(file, **jax_layout(state))
    else:
        safetensors.torch.save_file(state, file)
    file.write_bytes(DAMAGED[damage](file.read_bytes()))
    assert f"{file} cannot be read as weights of VisionTransformer" in refusal(lambda: load_weights(vit(), file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors", "w.npz"):
        assert f"{tmp_path / name} does not exist" in refusal(lambda name=name: small(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"embed_dim": 16}, "cls_token"), ({"depth": 4}, "blocks.3.attn.proj.bias"), ({"depth": 2}, "blocks.2."),
     ({"qkv_bias": False}, "blocks.0.attn.qkv.bias"), ({"init_values": 1.0}, "blocks.0.ls1.gamma")],
)  # fmt: skip
def test_weights_of_another_architecture_are_refused_by_tensor(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    file, model = tmp_path / "w.safetensors", vit(seed=1)
    safetensors.torch.save_file(vit(**changes).state_dict(), file)
    message = refusal(lambda: load_weights(model, file))
    assert named in message and message.startswith(f"{file} does not fit VisionTransformer")
    assert torch.equal(logits(model), logits(vit(seed=1))), "nothing was loaded"


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    for content in ([1, 2], torch.zeros(3), {"epoch": 3}, {**vit().state_dict(), "norm.bias": 1.0}):
        torch.save(content, file)
        assert str(file) in refusal(lambda: load_weights(vit(), file))


@pytest.mark.parametrize("classes", [0, 1, CLASSES, 1000])
def test_a_head_in_the_file_is_left_out(classes: int, tmp_path: Path) -> None:
    source, model, fresh = vit(seed=4, num_classes=classes), vit(seed=5), vit(seed=5)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **jax_layout(source.state_dict()))
    for name in ("w.safetensors", "w.npz"):
        load_weights(model, tmp_path / name)
        assert torch.equal(model.forward_features(images()), source.forward_features(images()))
        assert torch.equal(model.head.weight, fresh.head.weight)


def jax_layout(state: dict[str, Tensor]) -> dict[str, Any]:
    return to_jax(state, TINY["num_heads"])


def test_a_file_in_googles_layout_gives_the_same_features(tmp_path: Path) -> None:
    source = vit(seed=4)
    np.savez(tmp_path / "w.npz", **jax_layout(source.state_dict()))
    model = small(tmp_path / "w.npz", num_classes=3, depth=3, mlp_ratio=4)
    assert torch.equal(model.forward_features(images()), source.forward_features(images()))


@pytest.mark.parametrize("changes", [{"embed_dim": 16}, {"depth": 4}, {"depth": 2}, {"mlp_ratio": 3}])
def test_a_file_in_googles_layout_of_another_architecture_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **jax_layout(vit(**changes).state_dict()))
    model = vit(seed=1)
    assert str(tmp_path / "w.npz") in refusal(lambda: load_weights(model, tmp_path / "w.npz"))
    assert torch.equal(logits(model), logits(vit(seed=1))), "nothing was loaded"
    np.savez(tmp_path / "w.npz", **jax_layout(vit().state_dict()))
    assert "blocks.0.ls1.gamma" in refusal(lambda: load_weights(vit("layer_scale"), tmp_path / "w.npz"))


def test_unknown_names_are_answered_with_the_nearest() -> None:
    for name in ("test_vitt", "timm/test_vitt.tag"):
        for weights in ("none", "hub", "w.pth"):
            message = refusal(lambda n=name, w=weights: create_backbone(Backbone(n, w)), VisgraftError)
            assert f"unknown backbone {name!r}; did you mean test_vit" in message


def test_options_that_a_model_lacks_are_refused() -> None:
    for backbone in (
        Backbone("test_vit", "none", arguments={"hue": 1}),
        Backbone("test_vit", "none", image_size=32, arguments={"hue": 1}),
        Backbone("test_resnet", "none", arguments={"img_size": 64}),
    ):
        message = refusal(lambda b=backbone: create_backbone(b), VisgraftError)
        assert message.startswith(f"{backbone.name} cannot be created with ")


def test_an_unknown_tag_is_refused() -> None:
    for weights in ("none", "hub"):
        message = refusal(lambda w=weights: create_backbone(Backbone("test_vit.nope", w)), VisgraftError)
        assert "Invalid pretrained tag (nope)" in message


@pytest.mark.parametrize(
    ("size", "remedy"), [(30, "use 16 or 32"), (33, "use 32 or 48"), (5, "use 16 or 32"), (0, "use 16")]
)
def test_an_image_size_that_the_patches_do_not_divide_is_refused(size: int, remedy: str) -> None:
    for name in ("test_vit", "timm/test_vit.r160_in1k"):
        message = refusal(lambda n=name: create_backbone(Backbone(n, "none", image_size=size)), VisgraftError)
        assert f"image size {size} is not a multiple of the patch size 16 of {name}" in message and remedy in message


def test_another_image_size_resamples_the_position_embeddings(tmp_path: Path) -> None:
    source = live(small("none"), seed=4)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = small(tmp_path / "w.safetensors", image_size=32)
    assert model.pos_embed.shape == (1, 1 + 8 * 8, 32)
    assert model.pos_embed.std() > 0.1
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert model_data_config(model)["input_size"] == [3, 32, 32]
    save(attach(model, CONFIGS["full-0"]), tmp_path / "a")
    loaded = load(tmp_path / "a", weights=str(tmp_path / "w.safetensors"))
    assert loaded.record.backbone.image_size == 32
    assert loaded.transform(random_picture()).shape == (3, 32, 32)


def test_random_weights_follow_the_seed_and_leave_the_global_state() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (small("none", num_classes=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    x = images()
    assert torch.equal(first.forward_features(x), again.forward_features(x))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.forward_features(x), other.forward_features(x))


def test_a_merged_model_opens_as_timms_own(tmp_path: Path) -> None:
    model = enliven(attach(live(small("none", num_classes=CLASSES)), CONFIGS["lora-0"])).eval()
    plain, certificate = merge(model, images())
    names = [f"class {i}" for i in range(CLASSES)]
    folder = save_plain(plain, tmp_path / "v1.5", names, model_data_config(model), certificate)
    name = f"local-dir:{folder}"
    by_timm = timm.create_model(name, pretrained=True, **SMALL).eval()
    by_us = create_backbone(Backbone(name, "hub", arguments=SMALL), CLASSES).eval()
    assert torch.equal(logits(by_timm), logits(plain))
    assert torch.equal(logits(by_us), logits(plain))
    assert by_timm.pretrained_cfg["label_names"] == names
    assert model_data_config(by_us) == model_data_config(model)
    larger = create_backbone(Backbone(name, "hub", image_size=32, arguments=SMALL), 3)
    assert larger.pos_embed.shape == (1, 65, 32) and larger.num_classes == 3
    missing = Backbone(f"local-dir:{tmp_path / 'v1.6'}", "none", image_size=32)
    assert "Config file not found" in refusal(lambda: create_backbone(missing), VisgraftError)


def test_how_a_size_fits_is_found_once_whatever_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Backbone("test_vit", "none", 48, arguments=SMALL)
    fit_image_size(asked)[0]["img_size"] = 0  # what was given away is the caller's
    lists = {"depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 1, 2, 2], "window_size": 2}
    swin = Backbone("swin_tiny_patch4_window7_224", "none", 64, arguments=lists)
    assert fit_image_size(swin) == ({"img_size": 64}, [])
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("made again"))
    assert fit_image_size(asked) == ({"img_size": 48}, [])


@pytest.mark.parametrize("reason", ["offline\nand more\nlines", "", "x" * 999])
def test_an_unreachable_hub_is_one_line(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> nn.Module:
        raise OSError(reason)

    monkeypatch.setattr(timm, "create_model", fail)
    message = refusal(lambda: create_backbone(Backbone("test_vit", "hub")))
    assert (reason[:7] or "OSError") in message and len(message) < 320


def test_preprocessing_is_timms_own() -> None:
    picture = random_picture(301, 217)
    for name in ("test_vit", "test_vit2", "test_resnet"):
        model = create_backbone(Backbone(name, "none"))
        expected = create_transform(**resolve_model_data_config(model), is_training=False)(picture)
        assert torch.equal(image_transform(model_data_config(model))(picture), expected)
    model = create_backbone(Backbone("test_vit", "none", image_size=32))
    expected = create_transform(**{**resolve_model_data_config(model), "input_size": (3, 32, 32)})(picture)
    assert torch.equal(image_transform(model_data_config(model))(picture), expected)


def test_an_adapter_of_a_model_by_timm_alone_reloads_with_backbone(tmp_path: Path) -> None:
    def own() -> Any:
        return live(timm.create_model("test_vit", img_size=16, num_classes=CLASSES, **SMALL)).eval()

    model = enliven(attach(own(), CONFIGS["lora-0"])).eval()
    assert origin_of(model) is None
    save(model, tmp_path / "a")
    assert torch.equal(logits(load(tmp_path / "a", backbone=own()).model), logits(model))
