"""`visgraft import`: a LoRA of peft's becomes one of ours that answers alike, or what cannot be said is named."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft_adapters import known_to_timm, written
from safetensors.torch import load_file, save_file
from support import enliven, images, live, size_of
from test_cli import content, fail, run, succeed
from test_peft_format import CLASSES, SAID, answers
from torch import nn

from visgraft import load
from visgraft.errors import AdapterError
from visgraft.export.peft_import import import_peft
from visgraft.export.peft_read import CONFIG, PICKLE, TENSORS
from visgraft.export.run import export_adapter

LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def trained(folder: Path, kind: str = "plain", base: nn.Module | None = None, **values: Any) -> tuple[Any, Path]:
    """What a user of peft trained on a tiny model, and the file of the backbone's weights."""
    model = live(timm.create_model(known_to_timm(kind), num_classes=5))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "backbone.safetensors")
    values = {"target_modules": LAYERS, "modules_to_save": ["head"], **values}
    peft_model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6, **values}))
    enliven(peft_model, strength=0.2).eval()
    peft_model.save_pretrained(str(folder / "peft"))
    return peft_model, folder / "backbone.safetensors"


SAYABLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, {"rank": 3, "targets": ["q", "k", "v", "proj", "fc1", "fc2"], "last_blocks": None}),
    "some layers": ({"target_modules": ["attn.proj"]}, {"rank": 3, "targets": ["proj"], "last_blocks": None}),
    "some blocks": ({"layers_to_transform": [2], "layers_pattern": "blocks"}, {"rank": 3, "last_blocks": 1}),
    "one in the middle": ({"target_modules": ["blocks.1.mlp.fc1"]}, {"targets": ["fc1"], "last_blocks": 2}),
    "ranks that differ": ({"rank_pattern": {r"^blocks\.1\.attn\.qkv": 5}}, {"rank": 5}),
    "factors that differ": ({"alpha_pattern": {"fc1": 24}}, {"rank": 3}),
    "rslora": ({"use_rslora": True}, {"rank": 3}),
    "dropout": ({"lora_dropout": 0.25}, {"rank": 3}),
    "a pattern": ({"target_modules": r"blocks.*\.(q|fc1|proj)"}, {"targets": ["proj", "fc1"]}),
    "started otherwise": ({"init_lora_weights": "gaussian"}, {"rank": 3}),
    "without its head": ({"modules_to_save": None}, {"outputs": 0}),
}


@pytest.mark.parametrize("case", SAYABLE)
def test_what_lora_can_say_answers_alike(case: str, tmp_path: Path) -> None:
    values, expected = SAYABLE[case]
    model, weights = trained(tmp_path, **values)
    found = import_peft(tmp_path / "peft", tmp_path / "ours", backbone="tiny_plain", weights=str(weights))
    assert {name: found[name] for name in expected} == expected
    adapted = load(tmp_path / "ours", weights=str(weights))
    if found["outputs"]:
        torch.testing.assert_close(answers(adapted.model, "plain"), answers(model, "plain"), atol=1e-4, rtol=1e-5)
    else:
        features = model.base_model.model.forward_features(images(3))[:, 0]
        torch.testing.assert_close(adapted.model(images(3)), features, atol=1e-4, rtol=1e-5)
    assert adapted.record.method.dropout == values.get("lora_dropout", 0.0)
    assert adapted.record.facts["imported"]["from"].startswith("peft ")


@pytest.mark.parametrize("kind", ["swin", "convnext_conv", "eva_unfused"])
def test_so_it_is_on_other_families(kind: str, tmp_path: Path) -> None:
    layers = {"eva_unfused": ["q_proj", "v_proj", "fc2"], "convnext_conv": ["mlp.fc1"]}.get(kind, LAYERS)
    head = "head" if kind == "eva_unfused" else "head.fc"
    model, weights = trained(tmp_path, kind, target_modules=layers, modules_to_save=[head])
    import_peft(tmp_path / "peft", tmp_path / "ours", backbone=f"tiny_{kind}", weights=str(weights))
    found = answers(load(tmp_path / "ours", weights=str(weights)).model, kind)
    torch.testing.assert_close(found, answers(model, kind), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "rank", "host"),
    [
        ("lora", 2, "timm"),
        ("lora-all", 2, "transformers"),
        pytest.param("lora-all", 2, "timm", marks=pytest.mark.long),
        pytest.param("alore", 4, "timm", marks=pytest.mark.long),
        pytest.param("alore", 4, "transformers", marks=pytest.mark.long),
    ],
)
def test_what_we_exported_comes_back_with_names_and_preprocessing(
    name: str, rank: int, host: str, tmp_path: Path
) -> None:
    adapter, weights = written(SAID[name], tmp_path, classes=CLASSES)
    export_adapter(adapter, tmp_path / "peft", "peft", weights=str(weights), for_=host)
    found = import_peft(tmp_path / "peft", tmp_path / "back", weights=str(weights))
    before, after = (load(path, weights=str(weights)) for path in (adapter, tmp_path / "back"))
    assert found["rank"] == rank and after.classes == CLASSES
    assert after.record.data_config == before.record.data_config and after.record.digest == before.record.digest
    torch.testing.assert_close(answers(after.model, "plain"), answers(before.model, "plain"), atol=1e-4, rtol=1e-5)


def test_tasks_of_several_classes_stay_such(tmp_path: Path) -> None:
    adapter, weights = written(SAID["lora"], tmp_path, data={"multi_label": True, "background": "black"})
    export_adapter(adapter, tmp_path / "peft", "peft", weights=str(weights))
    import_peft(tmp_path / "peft", tmp_path / "back", weights=str(weights))
    record = load(tmp_path / "back", weights=str(weights)).record
    assert record.multi_label and record.background == "black"


UNSAYABLE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora is True, which lora cannot say"),
    "biases": ({"bias": "all"}, "bias is 'all', which lora cannot say"),
    "a bias in the branch": ({"lora_bias": True}, "lora_bias is True, which lora cannot say"),
    "another layer": ({"target_modules": ["patch_embed.proj"]}, r"adapts patch_embed.proj, where lora cannot stand"),
    "the head": (
        {"target_modules": ["head", "attn.proj"], "modules_to_save": None},
        "does not hold head.weight, without which",
    ),
    "a norm": ({"modules_to_save": ["head", "blocks.0.norm1"]}, r"trains blocks.0.norm1.\w+ as a whole"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the backbone's own weights"),
    "a tensor": (
        {"target_parameters": ["blocks.0.mlp.fc1.weight"], "target_modules": []},
        "target_parameters is .* which lora cannot say",
    ),
    "an untrained one": ({}, "all its branches are zero"),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_lora_cannot_say_is_named(case: str, tmp_path: Path) -> None:
    values, said = UNSAYABLE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on biases in branches
        _, weights = trained(tmp_path, **values)
    if case == "an untrained one":
        file = tmp_path / "peft" / TENSORS
        save_file({k: t * ("lora_B" not in k) for k, t in load_file(file).items()}, file)
    refuse(tmp_path, weights, said)


def refuse(folder: Path, file: Path, said: str, **values: Any) -> None:
    """Check that an import fails with one line and leaves nothing behind."""
    values = {"backbone": "tiny_plain", "weights": str(file), **values}
    before = content(folder)
    with pytest.raises(AdapterError, match=said) as caught:
        import_peft(folder / "peft", folder / "ours", **values)
    assert "\n" not in str(caught.value)
    assert content(folder) == before


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change the options of an adapter's file."""

    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Change the tensors of an adapter's file."""
    return lambda folder: save_file(change(load_file(folder / TENSORS)), folder / TENSORS)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / PICKLE)
    (folder / TENSORS).unlink()


def other_type(folder: Path) -> None:
    model = timm.create_model(known_to_timm("plain"))
    get_peft_model(model, LoHaConfig(target_modules=["fc1"])).save_pretrained(str(folder))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "is no adapter of peft: adapter_config.json is missing"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json is damaged"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[1]"), "names no peft_type"),
    "ours": (lambda folder: (folder / CONFIG).write_text('{"method": "lora"}'), "an adapter of visgraft already"),
    "another type": (other_type, "is of peft's type 'LOHA'"),
    "a pickle": (pickled, "holds adapter_model.bin, a pickle, which could run code and is never read"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "adapter_model.safetensors is missing"),
    "no safetensors": (lambda folder: (folder / TENSORS).write_bytes(b"\x80"), "adapter_model.safetensors is damaged"),
    "a module to import": (edit(megatron_config={"a": 1}, megatron_core="os"), "megatron_c.* which lora cannot say"),
    "an unknown option": (edit(use_newest=True), "use_newest is True, which lora cannot say"),
    "a task": (edit(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS', which lora cannot say"),
    "dropout": (edit(lora_dropout="much"), "lora_dropout is 'much'"),
    "rank": (edit(r=2), "peft does not open|does not fit"),
    "no rank": (edit(r=0), "peft does not open"),
    "not finite": (tensors(lambda all_: {k: t * torch.nan for k, t in all_.items()}), "not all finite numbers"),
    "another name": (tensors(lambda all_: {**all_, "blocks.0": torch.ones(1)}), "is no name that peft gives"),
    "a head of one number": (
        tensors(lambda all_: {**all_, "base_model.model.head.weight": torch.ones(())}), "does not open|does not fit"
    ),
    "half a head": (tensors(lambda all_: {k: t for k, t in all_.items() if "head.bias" not in k}), "does not open"),
    "a pattern that is none": (edit(target_modules="(("), "peft does not open"),
    "patterns of ranks that are none": (edit(rank_pattern=None), "peft does not open|does not fit"),
    "one too few": (tensors(lambda all_: dict(list(all_.items())[:-1])), "does not open|does not fit"),
    "one too many": (
        tensors(lambda all_: {**all_, "base_model.model.blocks.9.mlp.fc1.lora_A.weight": torch.ones(3, 32)}),
        "does not fit the backbone: .*blocks.9.* is in the file, but not in the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_hostile_folder_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    _, weights = trained(tmp_path)
    damage, said = DAMAGE[case]
    damage(tmp_path / "peft")
    refuse(tmp_path, weights, said)


def test_what_visgraft_wrote_beside_it_is_checked(tmp_path: Path) -> None:
    adapter, weights = written(SAID["lora"], tmp_path)
    export_adapter(adapter, tmp_path / "peft", "peft", weights=str(weights))
    other = tmp_path / "other.safetensors"
    save_file({k: t + 0.1 for k, t in load_file(weights).items()}, other)
    refuse(tmp_path, other, "answers a seeded picture otherwise than the adapter that it was exported", backbone=None)
    refuse(tmp_path, weights, "--backbone is tiny_swin, but .* was exported for tiny_plain", backbone="tiny_swin")
    refuse(tmp_path, weights, "--image-size is 48, but", image_size=48)
    refuse(tmp_path, weights, "pass it again: --weights PATH/backbone.safetensors", weights=None)
    refuse(tmp_path, weights, "2 class names for a head of 5 outputs", classes=["a", "b"])
    file = tmp_path / "peft" / "visgraft.json"
    facts = json.loads(file.read_text())
    for wrong in (
        [],
        {**facts, "classes": [1]},
        {**facts, "preprocessing": {"input_size": "x"}},
        {**facts, "canary": 3},
        {**facts, "preprocessing": {**facts["preprocessing"], "input_size": [3, 10**9, 10**9]}},
    ):
        file.write_text(json.dumps(wrong))
        refuse(tmp_path, weights, "visgraft.json is damaged")
    # What is lacking, the model says; where that is another mean, the seeded picture tells.
    file.write_text(
        json.dumps({**facts, "preprocessing": {k: v for k, v in facts["preprocessing"].items() if k != "mean"}})
    )
    refuse(tmp_path, weights, "answers a seeded picture otherwise")


def test_the_wrong_backbone_is_named(tmp_path: Path) -> None:
    _, weights = trained(tmp_path)
    refuse(tmp_path, weights, "does not say which timm model it is for; add --backbone NAME", backbone=None)
    _, swin = trained(tmp_path / "swin", "swin")
    refuse(tmp_path, swin, "does not open|does not fit", backbone="tiny_swin")


def test_an_adapter_of_peft_is_never_replaced(tmp_path: Path) -> None:
    _, weights = trained(tmp_path)
    before = content(tmp_path)
    for out in ("peft", "backbone.safetensors"):
        with pytest.raises(Exception, match="choose another --out"):
            import_peft(tmp_path / "peft", tmp_path / out, backbone="tiny_plain", weights=str(weights))
    assert content(tmp_path) == before
    with pytest.raises(AdapterError, match="is of Hugging Face's peft; turn it into an adapter with visgraft import"):
        load(tmp_path / "peft")


def test_the_verb(tmp_path: Path) -> None:
    _, weights = trained(tmp_path)
    given = ("import", tmp_path / "peft", "--backbone", "tiny_plain", "--weights", weights)
    found = succeed(*given, "--out", tmp_path / "ours", "--classes", "a, b,c,d,e")
    assert found["classes"] == list("abcde") and found["rank"] == 3
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["one, two", "*[red]", "c", "d", "é"]) + "\n", encoding="utf-8")
    code, out, err = run(*given, "--out", tmp_path / "ours", "--classes", names)
    assert (code, err) == (0, "") and "one, two, *[red]" in out and "lora of rank 3 at q, k, v" in out
    assert "empty name" in fail(*given, "--out", tmp_path / "x", "--classes", "a,,c")
    assert "cannot be read" in fail(*given, "--out", tmp_path / "x", "--classes", tmp_path / "none.txt")
    assert "several classes are called a" in fail(*given, "--out", tmp_path / "x", "--classes", "a,a,c,d,e")
    assert "unknown backbone" in fail(*given[:2], "--backbone", "tiny_plane", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_training_goes_on_from_it(tmp_path: Path) -> None:
    _, weights = trained(tmp_path, rank_pattern={"fc1": 5})
    import_peft(tmp_path / "peft", tmp_path / "ours", backbone="tiny_plain", weights=str(weights))
    model = load(tmp_path / "ours", weights=str(weights)).model
    model(images(4, size=size_of("plain"))).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith((".up", ".down")):
            assert bool((parameter.grad.abs().sum(1 if name.endswith("up") else 0) > 0).any()), name
            if name.endswith("up"):  # no row is dead, those beyond the rank of peft's branch neither
                assert bool((parameter.grad.abs().sum(1) > 0).all()), name


def test_one_head_of_two_and_a_size_that_does_not_fit_are_refused(tmp_path: Path) -> None:
    _, weights = trained(tmp_path, "deit_distilled")
    said = "does not hold head_dist.weight, without which the head is not the one that was trained"
    refuse(tmp_path, weights, said, backbone="tiny_deit_distilled")
    adapter, weights = written(SAID["lora"], tmp_path / "b")
    export_adapter(adapter, tmp_path / "b" / "peft", "peft", weights=str(weights))
    file = tmp_path / "b" / "peft" / "visgraft.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "preprocessing": {**facts["preprocessing"], "input_size": [3, 20, 20]}}))
    refuse(tmp_path / "b", weights, "images prepared as .*visgraft.json says have 20 × 20 pixels, but", backbone=None)
