"""The format `peft`: stock peft answers as the adapter, on every family, and what cannot be said is named."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_adapters import written
from safetensors.torch import load_file
from support import ALL_FAMILIES, images, size_of
from test_cli import fail, run, succeed
from torch import Tensor, nn

from visgraft import MethodConfig, list_methods, load
from visgraft.errors import VisgraftError
from visgraft.export import peft_lora
from visgraft.export.format import ExportError
from visgraft.export.peft_change import low_rank_factors
from visgraft.export.run import export_adapter, list_formats

CLASSES = ("zweifarbig, gestreift", "*[red]x[/red]", "\u202eevil\n", "", "日本語")


def options(method: str, **values: Any) -> MethodConfig:
    """Options of a method that suit backbones 32 channels wide."""
    return list_methods()[method].Config(**values)


SAID: dict[str, MethodConfig] = {
    "lora": options("lora", rank=2),
    "lora-all": options("lora", rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2"), scale=2.0),
    "alore": options("alore", rank=1, experts=2),
    "alore-all": options("alore", rank=1, experts=2, places=("attn.in", "attn.out", "mlp.in", "mlp.out")),
    "sct-mlp": options("sct", mode="mlp", channels=4),
    "sct-qkv": options("sct", mode="qkv", channels=4),
    "repadapter": options("repadapter"),
    "fact": options("fact", rank=2),
    "adapter": options("adapter", activation="none", init_std=0.05),
    "arc": options("arc", bottleneck=4),
    "bitfit": options("bitfit"),
}
UNSAID: dict[str, tuple[MethodConfig, str, str]] = {
    "linear": (options("linear"), "plain", "changes no linear layer or convolution, and peft opens no LoRA without"),
    "norm": (options("norm"), "plain", "changes no linear layer or convolution, and peft opens no LoRA without"),
    "sct": (options("sct", channels=4), "plain", "changes stream.mid, which no linear layer alone produces or reads"),
    "vpt": (options("vpt_deep"), "plain", "inserts tokens"),
    "adaptformer": (options("adaptformer"), "plain", "is not linear|no linear layer alone"),
    "full": (options("full"), "plain", r"changes (pos_embed|cls_token), which belongs to no layer"),
    "ssf": (options("ssf"), "plain", r"by a matrix of rank 32, which as LoRA is larger .* add --rank 19 or less"),
    "dora": (options("dora", rank=2), "plain", r"changes blocks.0.attn.qkv by a matrix of rank 32, .* --rank 24"),
    "partial": (options("partial"), "plain", r"changes blocks.2.attn.qkv by a matrix of rank 32, .* --rank 24"),
    "beit": (SAID["lora"], "beit", "changes blocks.0.attn.qkv, whose weight the model reads without calling the layer"),
    "swin_v2": (SAID["alore"], "swin_v2", "whose weight the model reads without calling the layer"),
    "beit bias": (options("bitfit"), "beit", "changes blocks.0.attn.v_bias, which belongs to no layer"),
}
REFUSED = (
    "needs the site|lie otherwise|no bias|padded windows|into squares|larger than the layer|without calling|no layer"
)
"""Why a method does not stand in a family, does not fold there, or is no LoRA there."""
OFTEN = ("swin", "convnext_conv")
PAIRS = [
    pair
    if (pair[1] == "plain" and f"{pair[0]}-all" not in SAID) or (pair[0] == "alore-all" and pair[1] in OFTEN)
    else pytest.param(*pair, marks=pytest.mark.long)
    for pair in [(name, kind) for kind in ALL_FAMILIES for name in SAID]
]


def opened(folder: Path, kind: str, weights: Path, outputs: int = 5) -> Any:
    """What a user of peft has: timm's model with its weights, and peft's adapter on it."""
    base = timm.create_model(f"tiny_{kind}", num_classes=outputs)
    head = ("head.", "head_dist.", "fc.")
    base.load_state_dict({k: v for k, v in load_file(weights).items() if not k.startswith(head)}, strict=False)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def answers(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        return model(images(5, seed=7, size=size_of(kind)))


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=lambda value: value)
def test_peft_alone_answers_as_the_adapter_merged_or_not(name: str, kind: str, tmp_path: Path) -> None:
    try:
        adapter, weights = written(SAID[name], tmp_path, kind)
        found = export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))
    except VisgraftError as error:
        assert kind != "plain" and re.search(REFUSED, str(error))
        assert not (tmp_path / "out").exists()
        return
    expected = answers(load(adapter, weights=str(weights)).model, kind)
    model = opened(tmp_path / "out", kind, weights)
    bound = 1e-4 * max(1.0, expected.abs().max().item())
    assert (answers(model, kind) - expected).abs().max() <= bound
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == found["facts"]["layers"] == len(found["facts"]["ranks"])
    assert (answers(model.merge_and_unload(), kind) - expected).abs().max() <= bound
    assert found["facts"]["merged_difference"] <= bound and found["largest_difference"] <= bound
    assert found["verdict"].startswith("no logit differs")


def test_the_rank_is_that_of_the_map_and_layers_that_stay_are_left_out(tmp_path: Path) -> None:
    adapter, weights = written(options("lora", rank=2, last_blocks=1), tmp_path)
    found = export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))
    assert found["facts"]["ranks"] == {"blocks.2.attn.qkv": 4} and found["facts"]["bias"] == "none"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["blocks.2.attn.qkv"] and config["modules_to_save"] == ["head"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^blocks\.2\.attn\.qkv": 4}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if "lora" in name) == found["facts"]["numbers_in_factors"]


def test_biases_stay_in_the_branch_so_that_without_it_the_backbone_is_as_it_was(tmp_path: Path) -> None:
    adapter, weights = written(SAID["sct-mlp"], tmp_path)
    assert export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))["facts"]["bias"] == "lora_bias"
    model = opened(tmp_path / "out", "plain", weights)
    base = timm.create_model("tiny_plain", num_classes=5)
    base.load_state_dict(load_file(weights))
    with model.disable_adapter(), torch.no_grad():
        found = model.base_model.model.forward_features(images(3))
    with torch.no_grad():
        assert torch.equal(found, base.eval().forward_features(images(3)))


def test_peft_holds_several_on_one_backbone(tmp_path: Path) -> None:
    adapters = {"default": SAID["sct-mlp"], "second": SAID["alore-all"]}
    expected = {}
    for name, config in adapters.items():
        adapter, weights = written(config, tmp_path / name)
        export_adapter(adapter, tmp_path / f"{name}-out", "peft", weights=str(weights))
        expected[name] = answers(load(adapter, weights=str(weights)).model, "plain")
    model = opened(tmp_path / "default-out", "plain", weights)
    model.load_adapter(str(tmp_path / "second-out"), "second")
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(answers(model.eval(), "plain"), expected[name], atol=1e-4, rtol=1e-5)


def test_beside_layers_without_bias_the_bases_own_are_replaced(tmp_path: Path) -> None:
    adapter, weights = written(SAID["alore-all"], tmp_path, "no_qkv_bias")
    assert export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))["facts"]["bias"] == "lora_only"


@pytest.mark.parametrize("case", UNSAID)
def test_what_no_lora_says_is_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    config, kind, reason = UNSAID[case]
    adapter, weights = written(config, tmp_path, kind)
    with pytest.raises(ExportError, match=reason) as caught:
        export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))
    assert str(caught.value).startswith(f"{adapter} cannot be exported as peft: {config.method} ")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_list_tells_without_weights(tmp_path: Path) -> None:
    for name, kind, reason in (("lora", "beit", "without calling"), ("lora", "plain", None)):
        adapter, _ = written(SAID[name], tmp_path / kind, kind)
        row = next(row for row in list_formats(adapter) if row["format"] == "peft")
        assert row["possible"] == (reason is None) and row["install"] is None
        assert row["options"] == ["for_", "rank", "least_agreement"]
        assert reason is None or reason in row["why_not"]


def test_norms_that_train_besides_are_copied_whole_and_a_lone_tensor_is_named(tmp_path: Path) -> None:
    adapter, weights = written(SAID["lora"], tmp_path, unfrozen=("norm.", "blocks.1.norm1."))
    found = export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))
    assert found["facts"]["modules_to_save"] == ["head", "blocks.1.norm1", "norm"]
    expected = answers(load(adapter, weights=str(weights)).model, "plain")
    torch.testing.assert_close(answers(opened(tmp_path / "out", "plain", weights), "plain"), expected)
    adapter, weights = written(SAID["lora"], tmp_path / "b", unfrozen=("pos_embed",))
    with pytest.raises(ExportError, match="lora changes pos_embed, which belongs to no layer"):
        export_adapter(adapter, tmp_path / "out-b", "peft", weights=str(weights))


@pytest.mark.parametrize("kind", ["plain", pytest.param("swin", marks=pytest.mark.long)])
def test_inside_transformers_wrapper_it_answers_too(kind: str, tmp_path: Path) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    adapter, weights = written(SAID["lora-all"], tmp_path, kind)
    found = export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights), for_="transformers")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert names and all(name.startswith("base_model.model.timm_model.") for name in names)
    base: Any = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=f"tiny_{kind}", num_labels=5))
    base.timm_model.load_state_dict(load_file(weights))
    model = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    with torch.no_grad():
        logits = model(images(5, seed=7, size=size_of(kind))).logits
    torch.testing.assert_close(logits, answers(load(adapter, weights=str(weights)).model, kind), atol=1e-4, rtol=1e-5)
    assert found["facts"]["for"] == "transformers"


@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_the_card_opens_it(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, weights = written(SAID["lora"], tmp_path, classes=CLASSES)
    export_adapter(adapter, tmp_path / "this-folder", "peft", weights=str(weights), for_=host)
    card = (tmp_path / "this-folder" / "README.md").read_text(encoding="utf-8")
    assert "backbone.safetensors" in card and str(tmp_path) not in card
    (block,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.M | re.S)
    steps = block.split("model = PeftModel")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(steps[0], names)
    own = {k: v for k, v in load_file(weights).items() if not k.startswith("head.")}
    names["model"].load_state_dict(own, strict=False)
    exec("model = PeftModel" + steps[1], names)
    expected = answers(load(adapter, weights=str(weights)).model, "plain")
    found = answers(names["model"], "plain")
    torch.testing.assert_close(getattr(found, "logits", found), expected, atol=1e-4, rtol=1e-5)
    told = json.loads((tmp_path / "this-folder" / "visgraft.json").read_text(encoding="utf-8"))
    assert tuple(told["classes"]) == CLASSES and told["preprocessing"]["interpolation"] == "bicubic"
    assert not (tmp_path / "this-folder" / "adapter_model.bin").exists()


def test_a_smaller_rank_says_what_it_costs_and_is_held_to_agreement(tmp_path: Path) -> None:
    adapter, weights = written(SAID["alore"], tmp_path)
    exact = export_adapter(adapter, tmp_path / "exact", "peft", weights=str(weights))
    cut = export_adapter(adapter, tmp_path / "cut", "peft", weights=str(weights), rank=1, least_agreement=0.1)
    whole = export_adapter(adapter, tmp_path / "whole", "peft", weights=str(weights), rank=50)
    assert (cut["facts"]["rank"], cut["facts"]["cut_from_rank"]) == (1, 4)
    assert 0.1 < cut["facts"]["part_of_change_lost"] < 1 and cut["largest_difference"] > 1e-3
    assert cut["facts"]["merged_difference"] > 1e-3 and cut["bytes"] < exact["bytes"]
    assert cut["tolerance"] is None and cut["least_agreement"] == 0.1 and "demanded" in cut["verdict"]
    assert "cut_from_rank" not in whole["facts"] and whole["largest_difference"] < 1e-4
    stored = json.loads((tmp_path / "cut" / "certificate.json").read_text())
    assert stored["largest_difference"] == cut["largest_difference"]
    with pytest.raises(ExportError, match=r"of the answers are the model's .* --least-agreement"):
        export_adapter(adapter, tmp_path / "bad", "peft", weights=str(weights), rank=1, least_agreement=1.0)
    assert not (tmp_path / "bad").exists()


def test_a_full_rank_is_cut_where_asked(tmp_path: Path) -> None:
    adapter, weights = written(options("dora", rank=2), tmp_path)
    found = export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights), rank=20, least_agreement=0.0)
    assert found["facts"]["rank"] == 20 and found["facts"]["cut_from_rank"] == 32


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "--rank is 0, but must be at least 1"),
        ({"rank": "many"}, "--rank is 'many', but must be a whole number or none"),
        ({"for_": "jax"}, "--for is 'jax', but must be one of timm, transformers"),
        ({"least_agreement": 0.9}, "--least-agreement has no effect without --rank"),
        ({"rank": 2, "least_agreement": 2}, "must be between 0 and 1"),
        ({"opset": 18}, "--opset has no effect on the format peft"),
    ],
)
def test_options_that_make_no_sense_are_refused(values: Mapping[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(VisgraftError, match=said):
        export_adapter(tmp_path / "none", tmp_path / "out", "peft", **values)


def test_a_wrong_factor_is_found_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, weights = written(SAID["alore"], tmp_path)
    right = peft_lora.LayerChange.factors

    def turned(change: Any, rank: int | None = None) -> tuple[Tensor, Tensor]:
        up, down = right(change, rank)
        return up * 1.01, down

    monkeypatch.setattr(peft_lora.LayerChange, "factors", turned)
    with pytest.raises(ExportError, match="merge_and_unload answers otherwise"):
        export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))
    monkeypatch.setattr(peft_lora, "_check_merged", lambda *_: 0.0)
    with pytest.raises(ExportError, match="answers otherwise than"):
        export_adapter(adapter, tmp_path / "out", "peft", weights=str(weights))
    assert not (tmp_path / "out").exists()


def test_the_verb_writes_it_and_says_rank_size_and_error(tmp_path: Path) -> None:
    adapter, weights = written(SAID["lora"], tmp_path, classes=CLASSES)
    given = ("export", adapter, "--weights", weights, "--format", "peft")
    found = succeed(*given, "--out", tmp_path / "out", "--for", "transformers")
    assert found["facts"]["rank"] == 4 and found["options"]["for_"] == "transformers"
    code, out, err = run(*given, "--out", tmp_path / "out", "--rank", 3, "--least-agreement", 0)
    assert (code, err) == (0, "")
    assert "rank 3, cut from rank 4, part of change lost " in out and "largest logit difference" in out
    assert "must be at least 1" in fail(*given, "--out", tmp_path / "out", "--rank", 0)
    assert "is not an earlier result" in fail(*given, "--out", adapter)


@pytest.mark.parametrize("rank", [0, 1, 7, 40, 90])
@pytest.mark.parametrize("shape", [(90, 300), (300, 90)])
def test_factors_have_the_rank_of_the_map_and_give_it_back(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape)
    change, noise = left @ right.T, 1e-10
    error = 1e-14 * torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = low_rank_factors(change + error, noise)
    assert len(s) == rank and u.shape == (shape[0], rank) and v.shape == (rank, shape[1])
    assert ((u * s) @ v - change).norm() < noise
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64))
