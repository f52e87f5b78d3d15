"""One ONNX backbone, adapters of several tasks as files that onnxruntime swaps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from support import CONFIGS, SHALLOW, batches, enliven, family, size_of
from test_export import described, export, trained
from test_laws import pictures

from visgraft import Adapted, attach, export_model
from visgraft.export.format import ExportError

__all__ = ["trained"]  # a fixture

SWAPPED = [
    ("sct-0", "plain"),
    ("alore-0", "convnext"),
    ("vpt_deep-0", "plain"),
]
RARELY = [
    ("alore-0", "plain"), ("bitfit-0", "plain"),
    ("lora-0", "swin"), ("lora-0", "mixer"), ("adaptformer-0", "plain"), ("alore-0", "deit_distilled"),
    ("ssf-0", "plain"), ("alore-0", "swin_v2"), ("fact-0", "plain"), ("arc-0", "plain"), ("dora-0", "plain"),
    ("convpass-0", "plain"),
]  # fmt: skip


def task(name: str, kind: str, classes: int, seed: int) -> Adapted:
    """A tiny adapted model of another task: as many classes, tensors of its own."""
    torch.manual_seed(seed)
    model = family(kind, **SHALLOW.get(kind, {}))
    model.reset_classifier(classes)
    attach(model, CONFIGS[name], batches(size=size_of(kind)))
    return described(enliven(model, seed=seed).eval(), kind, [f"{seed}-{i}" for i in range(classes)])


def answers(folder: Path, name: str, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(folder / "backbone.onnx", providers=["CPUExecutionProvider"])
    adapter, run = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(folder / f"{name}.onnx_adapter"))
    run.add_active_adapter(adapter)
    return torch.from_numpy(session.run(None, {"pixels": x.numpy()}, run)[0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [*SWAPPED, *(pytest.param(*pair, marks=pytest.mark.long) for pair in RARELY)],
    ids=lambda value: value,
)
def test_adapters_of_one_backbone_are_swapped_whatever_their_classes(name: str, kind: str, tmp_path: Path) -> None:
    first, second, x = task(name, kind, 5, 0), task(name, kind, 9, 1), pictures(kind, 3)
    if second.record.digest != first.record.digest:  # a method that trains the backbone's own tensors leaves them out
        second = replace(second, record=replace(second.record, digest=first.record.digest))
    export_model(first, tmp_path / "one", "onnx-adapter", name="first")
    certificate = export_model(second, tmp_path / "both", "onnx-adapter", name="second", base=str(tmp_path / "one"))
    assert certificate.facts["adapters"] == ["first", "second"] and certificate.facts["swap_seconds"] < 0.1
    with torch.no_grad():
        for adapted, file in ((first, "first"), (second, "second")):
            torch.testing.assert_close(answers(tmp_path / "both", file, x), adapted.model(x), atol=1e-4, rtol=1e-4)
    about = json.loads((tmp_path / "both" / "adapters.json").read_text())
    assert [len(one["classes"]) for one in about["adapters"].values()] == [5, 9]


def test_the_backbone_in_int8_leaves_adapters_whole(trained: tuple[Path, Path], tmp_path: Path) -> None:
    told = export(trained, tmp_path / "q", "onnx-adapter", precision="int8", least_agreement=0.5, pixels="uint8")
    whole = export(trained, tmp_path / "w", "onnx-adapter", pixels="uint8")
    assert told["bytes"] < 0.5 * whole["bytes"] and told["facts"]["adapter_bytes"] == whole["facts"]["adapter_bytes"]
    assert told["accuracy"] is not None and told["agreement"] >= 0.5


BAD: list[tuple[dict[str, Any], str]] = [
    ({"base": "nowhere"}, "which is no export of the format onnx-adapter"),
    ({"base": "one"}, "has an adapter 'adapter' already; give this one another --name"),
    ({"base": "one", "name": "b", "pixels": "uint8"}, "its pixels is another"),
    ({"name": "../evil"}, "must be letters, digits"),
    ({"name": ".."}, "must be letters, digits"),
    ({"precision": "int8", "data": False}, "add --data DIR"),
]


def test_bad_input_is_one_line(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(trained, Path("one"), "onnx-adapter", data=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for given, told in BAD:
        with pytest.raises(ExportError) as caught:
            export(trained, Path("one"), "onnx-adapter", **{"data": False, **given})
        assert told in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
