"""One ONNX graph whose images have adapters of their own: each is answered as by its adapter alone, in torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from test_laws import pictures
from test_onnx_adapter import task
from torch import Tensor

from visgraft import Adapted, export_model
from visgraft.export.format import ExportError
from visgraft.export.onnx_mixed import Mixing

METHODS = (
    "alore", "lora", "fact", "arc", "repadapter", "sct", "ssf", "adapter", "adaptformer", "bitfit", "norm", "dora",
    "linear",
)  # fmt: skip
ALWAYS = [("alore-0", "plain"), ("sct-0", "swin")]
FURTHER = [
    *((f"{method}-0", kind) for method in METHODS for kind in ("plain", "swin", "convnext")),
    ("sct-4", "plain"), ("alore-1", "plain"), ("adapter-1", "plain"), ("adaptformer-2", "plain"), ("fact-1", "plain"),
    ("fact-2", "plain"), ("repadapter-1", "plain"), ("lora-1", "no_qkv_bias"), ("lora-0", "beit"),
    ("lora-0", "eva_unfused"), ("lora-0", "deit_distilled"), ("norm-0", "convnext_conv"),
]  # fmt: skip


def two(name: str, kind: str) -> tuple[Adapted, Adapted]:
    """Adapters of one backbone, with 5 and 9 classes."""
    first, second = task(name, kind, 5, 0), task(name, kind, 9, 1)
    # A method that trains the backbone's own tensors leaves them out of the digest.
    return first, replace(second, record=replace(second.record, digest=first.record.digest))


def mixed(folder: Path, x: Tensor, names: list[str]) -> Tensor:
    """The logits [B, most], each image with the adapter that is named for it."""
    about = json.loads((folder / "adapters.json").read_text())["adapters"]
    rows = np.stack([load_file(folder / about[name]["file"])["row"] for name in names])
    session = onnxruntime.InferenceSession(folder / "backbone.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixels": x.numpy(), "adapters": rows})[0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [*ALWAYS, *(pytest.param(*pair, marks=pytest.mark.long) for pair in FURTHER if pair not in ALWAYS)],
    ids=lambda value: value,
)
def test_every_image_of_a_batch_is_answered_by_its_own_adapter(name: str, kind: str, tmp_path: Path) -> None:
    adapted = dict(zip(("first", "second"), two(name, kind), strict=True))
    export_model(adapted["first"], tmp_path / "one", "onnx-adapter", name="first", mixed=True)
    told = export_model(
        adapted["second"], tmp_path / "both", "onnx-adapter", name="second", mixed=True, base=str(tmp_path / "one")
    )
    assert told.facts["adapters"] == ["first", "second"] and told.facts["most_classes"] == 16
    for names in (["second"], ["first", "second", "second", "first", "second"]):
        x = pictures(kind, len(names))
        found = mixed(tmp_path / "both", x, names)
        with torch.no_grad():
            alone = {key: one.model(x) for key, one in adapted.items()}
        for row, (logits, key) in enumerate(zip(found, names, strict=True)):
            outputs = alone[key].shape[1]
            torch.testing.assert_close(logits[:outputs], alone[key][row], atol=1e-4, rtol=1e-4)
            assert (logits[outputs:] == -torch.inf).all() and len(logits) == 16
    graph = onnx.load(tmp_path / "both" / "backbone.onnx")
    assert {node.domain for node in graph.graph.node} == {""}  # operators of the standard alone


def test_an_export_in_which_adapters_meet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separate = Mixing.tensors
    monkeypatch.setattr(Mixing, "tensors", lambda self, rows: separate(self, rows[:1].expand(rows.shape[0], -1)))
    with pytest.raises(ExportError, match="another adapter in the batch answers otherwise than alone") as caught:
        export_model(task("linear-0", "plain", 5, 0), tmp_path / "out", "onnx-adapter", mixed=True)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("pixels", ["uint8", "any-size"])
def test_pictures_may_come_as_they_are(pixels: str, tmp_path: Path) -> None:
    told = export_model(task("alore-0", "plain", 5, 0), tmp_path / "out", "onnx-adapter", mixed=True, pixels=pixels)
    assert told.largest_difference <= 1e-4 and told.agreement == 1.0


REFUSED = [
    ("vpt_deep-0", "plain", "inserts tokens"),
    ("full-0", "plain", "replaces whole weights of the backbone"),
    ("bitfit-0", "swin_v2", "not applied to each image by itself"),
    pytest.param("convpass-0", "plain", "which torch cannot write", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "kind", "reason"), REFUSED, ids=lambda value: value)
def test_a_method_without_a_form_for_many_adapters_is_refused_in_a_line(
    name: str, kind: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        export_model(task(name, kind, 5, 0), tmp_path / "out", "onnx-adapter", mixed=True)
    assert reason in str(caught.value) and "leave out --mixed" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"precision": "int8"}, "no form with --mixed"),
    ({"mixed": False, "most_classes": 9}, "no effect without --mixed"),
    ({"most_classes": 0}, "must be at least 1"),
    ({"most_classes": 4}, "but the model has 5 classes"),
    ({"mixed": False, "base": "small"}, "add --mixed"),
    ({"base": "small"}, "has room for 2 classes, but the model has 5"),
    ({"base": "small", "most_classes": 20}, "its most_classes is another"),
    ({"base": "nowhere"}, "which is no export of the format onnx-adapter"),
]


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_model(task("linear-0", "plain", 2, 0), Path("small"), "onnx-adapter", name="a", mixed=True, most_classes=2)
    adapted = task("linear-0", "plain", 5, 1)
    for given, told in BAD:
        with pytest.raises(ExportError) as caught:
            export_model(adapted, Path("out"), "onnx-adapter", **{"mixed": True, **given})
        assert told in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
