"""Exports and canaries of odd models, in odd folders: what is wrong is told in one line, and nothing right is lost."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import enliven, images, vit
from test_cli import run as command_line
from test_export import described
from test_laws import adapted
from torch import Tensor, nn

from visgraft import Adapted, LoRAConfig, attach, export_adapter, export_model, load, save
from visgraft.adapters.directory import CONFIG
from visgraft.errors import AdapterError, VisgraftError, VisgraftWarning
from visgraft.export.format import ExportError, Format, register_format
from visgraft.export.formats import FORMATS
from visgraft.export.proof import torch_answers

FACTS = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
LEFT_OUT = object()


def lora() -> Any:
    return enliven(attach(vit(), LoRAConfig())).eval()


@contextmanager
def answering(change: Callable[[Tensor], Tensor], agreement: float | None = None) -> Iterator[None]:
    """A format `changed` whose file answers the model's logits, changed; it has to agree in that share of answers."""

    @register_format("changed")
    class Changed(Format):
        suffix = ".txt"

        @classmethod
        def write(cls, subject: Any, options: Any, target: Path) -> dict[str, Any]:
            target.write_text("")
            return {}

        @classmethod
        def opened_onto(cls, subject: Any, target: Path, options: Any) -> Any:
            return lambda samples: change(torch_answers(subject.adapted.model, samples))

        @classmethod
        def least_agreement(cls, options: Any) -> float | None:
            return agreement

    try:
        yield
    finally:
        del FORMATS["changed"]


def with_head(change: Callable[[Any], Any]) -> Adapted:
    model = lora()
    with torch.no_grad():
        change(model.head)
    return described(model, "plain")


def smaller(head: Any) -> None:
    head.weight.mul_(1e-6)
    head.bias.mul_(1e-6)


@pytest.mark.parametrize("change", [smaller, lambda head: head.bias[3].fill_(-torch.inf)], ids=["small", "masked"])
def test_small_logits_and_masked_classes_let_no_wrong_answer_pass(change: Any, tmp_path: Path) -> None:
    with answering(lambda logits: -logits), pytest.raises(ExportError, match="nothing was written"):
        export_model(with_head(change), tmp_path / "m.txt", "changed")
    with answering(lambda logits: logits * (1 + 1e-6)):
        certificate = export_model(with_head(change), tmp_path / "m.txt", "changed")
    assert certificate.largest_difference < 1e-5 and certificate.tolerance is not None and certificate.tolerance < 1e-3
    json.loads((tmp_path / "m.txt.certificate.json").read_text(), parse_constant=pytest.fail)


def test_what_is_no_number_agrees_with_nothing(tmp_path: Path) -> None:
    model = with_head(lambda head: head.bias[3].fill_(torch.nan))
    with answering(lambda logits: logits, 0.98), pytest.raises(ExportError, match="the model answers what is not a"):
        export_model(model, tmp_path / "m.txt", "changed")
    with (
        answering(lambda logits: logits * torch.nan, 0.0),
        pytest.raises(ExportError, match="where the model does not"),
    ):
        export_model(described(lora(), "plain"), tmp_path / "m.txt", "changed")
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_is_exported_in_eval_mode_and_left_as_it_was(tmp_path: Path) -> None:
    model = adapted("lora-1", "plain")  # with dropout
    expected = model(images(2))
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    export_model(described(model, "plain"), tmp_path / "f.pt2", "torch")
    assert modes == [module.training for module in model.modules()]
    torch.testing.assert_close(torch.export.load(tmp_path / "f.pt2").module()(images(2)), expected, atol=1e-4, rtol=0)


def test_a_model_in_its_wrapper_is_exported_though_it_does_not_fold(tmp_path: Path) -> None:
    wrapped = nn.DataParallel(adapted("adaptformer-0", "plain"))
    assert export_model(described(wrapped, "plain"), tmp_path / "m.pt2", "torch").agreement == 1.0


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lora, "takes what load or Adapted.of returns, but was given a VisionTransformer"),
        (lambda: replace(described(lora(), "plain"), own_transform=print), "a transform of its own, which no file"),
        (lambda: described(lora().double(), "plain"), r"is in float64, .* call model.float\(\) first"),
        (lambda: described(lora().bfloat16(), "plain"), r"is in bfloat16, .* call model.float\(\) first"),
    ],
)
def test_what_cannot_be_proven_is_refused_by_name(model: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=told):
        export_model(model(), tmp_path / "m.onnx", pixels="any-size")
    with pytest.raises(ExportError, match="unknown format 3"):
        export_model(described(lora(), "plain"), tmp_path / "m.onnx", 3)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one adapter whose classes are not UTF-8."""
    folder = tmp_path_factory.mktemp("shop") / "one"
    export_model(described(lora(), "plain", ["\udcff", "b", "c", "d", "e"]), folder, "onnx-adapter", name="a")
    return folder


def told_of_a(**changes: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        about = json.loads((base / "adapters.json").read_text())
        about["adapters"]["a"] = {k: v for k, v in (about["adapters"]["a"] | changes).items() if v is not LEFT_OUT}
        (base / "adapters.json").write_text(json.dumps(about))

    return change


DAMAGED: list[tuple[Callable[[Path], Any], str]] = [
    (told_of_a(file="../../x"), "adapters.json is damaged: adapter 'a'"),
    (told_of_a(file="adapters.json"), "adapters.json is damaged: adapter 'a'"),
    (told_of_a(file="b.onnx_adapter"), "adapters.json is damaged: adapter 'a'"),
    (told_of_a(file=LEFT_OUT), "adapters.json is damaged: adapter 'a'"),
    (lambda base: (base / "adapters.json").write_text("[" * 100_000), "no export of the format onnx-adapter"),
    (lambda base: (base / "a.onnx_adapter").unlink(), "a.onnx_adapter is missing"),
    (lambda base: (base / "backbone.onnx").write_bytes(b"x"), "onnxruntime does not open"),
]


def test_a_damaged_base_is_refused_and_left_as_it_is(shop: Path, tmp_path: Path) -> None:
    for number, (damage, told) in enumerate(DAMAGED):
        base = shutil.copytree(shop, tmp_path / str(number))
        (base / "b.onnx_adapter").write_bytes(b"precious")
        damage(base)
        before = {path.name: path.read_bytes() for path in base.iterdir()}
        with pytest.raises(ExportError) as caught:
            export_model(described(lora(), "plain"), tmp_path / "out", "onnx-adapter", name="b", base=str(base))
        assert told in str(caught.value) and "\n" not in str(caught.value)
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_a_base_of_links_is_copied_and_names_too_long_are_told(shop: Path, tmp_path: Path) -> None:
    base = shutil.copytree(shop, tmp_path / "base")
    (base / "backbone.onnx").rename(base / "stored")
    (base / "backbone.onnx").symlink_to("stored")
    certificate = export_model(described(lora(), "plain"), tmp_path / "out", "onnx-adapter", name="b", base=str(base))
    assert certificate.facts["adapters"] == ["a", "b"] and not (tmp_path / "out" / "backbone.onnx").is_symlink()
    for name, told in (("n" * 201, "at most 200"), ("ä" * 200, "give a shorter --name")):
        with pytest.raises(ExportError, match=told):
            export_model(described(lora(), "plain"), tmp_path / "x", "onnx-adapter", name=name, base=str(shop))
    assert not (tmp_path / "x").exists()


def test_an_out_that_links_to_an_earlier_result_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(save(lora(), tmp_path / "one", data_config=FACTS))
    (tmp_path / "next").symlink_to("two")
    for name in ("latest", "next"):
        save(enliven(attach(vit(), LoRAConfig()), seed=5), tmp_path / name, data_config=FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "next", "one", "two"]
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "next").is_symlink()
    digests = {(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")}
    assert len(digests) == 1


def test_an_export_does_not_replace_what_it_reads(shop: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shop, tmp_path / "out")
    adapter = save(lora(), out / "adapter", data_config=FACTS)
    with pytest.raises(ExportError, match=r"lies in --out .* choose another --out"):
        export_adapter(adapter, out, "onnx-adapter")
    assert (adapter / CONFIG).is_file()


def test_the_list_takes_no_options_that_would_do_nothing(tmp_path: Path) -> None:
    adapter = save(lora(), tmp_path / "a", data_config=FACTS)
    code, _, told = command_line("export", adapter, "--list", "--out", "m.onnx", "--precision", "int8")
    assert code == 1 and "--out, --precision has no effect on --list" in told


def test_facts_that_are_not_told_are_the_models_own_and_wrong_ones_are_named(tmp_path: Path) -> None:
    for facts in ({"input_size": [3, 16, 16]}, {"mean": [0.5] * 3, "std": 0.2}):
        record = load(save(lora(), tmp_path / "a", data_config=facts), backbone=vit()).record
        assert record.data_config["input_size"] == [3, 16, 16] and {"mean", "std"} <= record.data_config.keys()
    for wrong in ({"mean": []}, {"std": "grey"}, {"mean": None}):
        with pytest.raises(AdapterError, match="data_config"):
            save(lora(), tmp_path / "b", data_config={**FACTS, **wrong})
    adapter = save(lora(), tmp_path / "c", data_config=FACTS)
    stored = json.loads((adapter / CONFIG).read_text())
    for size in (["3", 16, 16], [16, 16], [3, 16, -1], 7):
        (adapter / CONFIG).write_text(json.dumps({**stored, "data_config": {**FACTS, "input_size": size}}))
        with pytest.raises(AdapterError, match="is damaged: data_config"):
            load(adapter, backbone=vit())


def test_a_model_that_runs_in_autocast_only_is_saved_and_the_lack_of_a_canary_told(tmp_path: Path) -> None:
    model = enliven(attach(vit().bfloat16(), LoRAConfig()))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with pytest.warns(VisgraftWarning, match="saved without a canary"):
        adapter = save(model, tmp_path / "a", data_config=FACTS)
    assert load(adapter, backbone=vit().bfloat16()).record.canary is None


def test_a_backbone_that_does_not_run_is_refused_and_left_plain(tmp_path: Path) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("no kernel here")

    adapter, backbone = save(lora(), tmp_path / "a", data_config=FACTS), vit()
    backbone.norm = nn.Sequential(backbone.norm, Fails())
    with pytest.raises(VisgraftError, match=r"no kernel here|another backbone"):
        load(adapter, backbone=backbone)


def test_a_canary_of_infinite_logits_is_damage(tmp_path: Path) -> None:
    adapter = save(lora(), tmp_path / "a", data_config=FACTS)
    stored = json.loads((adapter / CONFIG).read_text())
    for value in (float("inf"), float("nan")):
        stored["canary"]["logits"] = [value] * 5
        (adapter / CONFIG).write_text(json.dumps(stored))
        with pytest.raises(AdapterError, match="is damaged: canary"):
            load(adapter, backbone=vit())
