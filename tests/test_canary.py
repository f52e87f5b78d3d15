"""Every adapter answers one seeded picture as it did when it was saved, or is not loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import enliven, vit
from test_laws import adapted

from visgraft import LoRAConfig, attach, load, save
from visgraft.adapters.canary import canary_pixels, measure_canary
from visgraft.adapters.directory import CONFIG, TENSORS, read_record
from visgraft.core.attached import find_attached
from visgraft.errors import AdapterError

FACTS = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def saved(path: Path, model: Any = None) -> Path:
    model = enliven(attach(vit(), LoRAConfig())) if model is None else model
    return save(model, path, data_config=FACTS)


def edit(adapter: Path, change: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    change(config)
    (adapter / CONFIG).write_text(json.dumps(config))


def test_the_picture_is_the_same_everywhere() -> None:
    pixels = canary_pixels((3, 32, 48))
    assert pixels.shape == (3, 32, 48) and pixels.dtype == torch.uint8
    assert pixels[0, 0, 0] == 253 and int(pixels.sum()) == 592590  # drawn from a hash: no library's random numbers
    assert torch.equal(pixels[:, ::2, ::3], canary_pixels((3, 16, 16)))


def test_it_takes_a_few_hundred_bytes_and_lets_the_right_adapter_pass(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a")
    stored = json.loads((adapter / CONFIG).read_text())["canary"]
    assert len(json.dumps(stored)) < 700 and len(stored["logits"]) == 5 and stored["precision"] == "float32"
    load(adapter, backbone=vit())
    assert len(measure_canary(vit(num_classes=1000), FACTS).logits) == 16  # type: ignore[union-attr]


def test_other_tensors_are_refused_and_the_backbone_is_left_plain(tmp_path: Path) -> None:
    adapter, other = saved(tmp_path / "a"), saved(tmp_path / "b", enliven(attach(vit(), LoRAConfig()), seed=7))
    (adapter / TENSORS).write_bytes((other / TENSORS).read_bytes())
    backbone = vit()
    with pytest.raises(AdapterError, match="answers a seeded picture otherwise than when it was saved"):
        load(adapter, backbone=backbone)
    assert find_attached(backbone) is None and backbone.state_dict().keys() == vit().state_dict().keys()


def test_a_wrong_kernel_is_found(tmp_path: Path) -> None:
    adapter, backbone = saved(tmp_path / "a"), vit()
    backbone.blocks[1].mlp.act = torch.nn.ReLU()  # the digest is of tensors, and this has none
    with pytest.raises(AdapterError, match="a seeded picture"):
        load(adapter, backbone=backbone)


def test_one_damaged_value_of_weight_is_found(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a")
    tensors = safetensors.torch.load_file(adapter / TENSORS)
    tensors["head.weight"][2] *= 1.5
    safetensors.torch.save_file(tensors, adapter / TENSORS)
    with pytest.raises(AdapterError, match="a seeded picture"):
        load(adapter, backbone=vit())


def test_adapters_of_earlier_versions_load(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a")
    edit(adapter, lambda config: config.pop("canary"))
    assert read_record(adapter).canary is None
    load(adapter, backbone=vit())


@pytest.mark.parametrize(
    "change",
    [
        lambda canary: canary.update(logits=[1.0]), lambda canary: canary.update(outputs=[-1] * 5),
        lambda canary: canary.update(precision="int3"), lambda canary: canary.pop("picture"),
        lambda canary: canary.update(logits=["x"] * 5),
    ],
)  # fmt: skip
def test_a_damaged_canary_is_named(change: Any, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a")
    edit(adapter, lambda config: change(config["canary"]))
    with pytest.raises(AdapterError, match=r"is damaged: canary"):
        load(adapter, backbone=vit())


def test_a_canary_of_another_picture_or_of_more_outputs_is_named(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "a")
    edit(adapter, lambda config: config["canary"].update(picture="0" * 64))
    with pytest.raises(AdapterError, match="its canary is about another picture"):
        load(adapter, backbone=vit())
    adapter = saved(tmp_path / "b")
    edit(adapter, lambda config: config["canary"].update(outputs=[0, 1, 2, 3, 9]))
    with pytest.raises(AdapterError, match="differs by inf"):
        load(adapter, backbone=vit())


def test_half_precision_masked_classes_and_models_without_data(tmp_path: Path) -> None:
    load(saved(tmp_path / "half", enliven(attach(vit().bfloat16(), LoRAConfig()))), backbone=vit().bfloat16())
    masked = enliven(attach(vit(), LoRAConfig()))
    with torch.no_grad():
        masked.head.bias[3] = -torch.inf
    found = measure_canary(masked, FACTS)
    assert found is not None and found.outputs == (0, 1, 2, 4)
    assert measure_canary(vit().to("meta"), FACTS) is None
    assert measure_canary(adapted("vpt_deep-0", "plain").train(), FACTS) == measure_canary(
        adapted("vpt_deep-0", "plain"), FACTS
    )
