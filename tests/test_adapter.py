"""Adapter directories: what is saved comes back bit for bit, and nothing damaged or foreign gets in."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from support import CLASSES, CONFIGS, enliven, fitted, images, live, logits, vit
from torch import Tensor, nn

from visgraft import Backbone, MethodConfig, attach, count_parameters, create_backbone, list_methods, load, merge, save
from visgraft.adapters.directory import CARD, CONFIG, TENSORS, read_record
from visgraft.backbones.heads import head_paths
from visgraft.core.attached import get_attached
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError, VisgraftError
from visgraft.export.merge import mergeable
from visgraft.files import check_target
from visgraft.methods.salience import SCORES

REMEDY = r"restore it|train again|pass |update visgraft|create the backbone|choose another"
TRIES = settings(max_examples=15, deadline=None, derandomize=True)
SCALES = st.floats(0.1, 3.0)
SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def subsets(names: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names.split()), min_size=1, unique=True)


OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "sct": {
        "channels": st.none() | st.integers(1, 32), "mode": st.sampled_from([None, "attn", "mlp"]),
        "form": st.sampled_from("AB"), "scale": SCALES, "score": st.sampled_from(SCORES),
    },
    "alore": {
        "rank": st.integers(1, 9), "experts": st.sampled_from([1, 2, 4, 8, 16]), "scale": SCALES,
        "places": st.none() | subsets("attn.in attn.out mlp.in mlp.out"),
        "bank": st.sampled_from(["one", "per_place"]), "init": st.sampled_from(["xavier", "normal"]),
    },
    "lora": {
        "rank": st.integers(1, 9), "targets": subsets("q k v proj fc1 fc2"), "scale": SCALES,
        "dropout": st.floats(0, 0.9),
    },
}  # fmt: skip


def saved(folder: Path, config: MethodConfig | None = None, **facts: Any) -> Any:
    """Save an adapter of the tiny ViT there and return the model that it came from."""
    model = fitted(config or CONFIGS["sct-0"])
    save(model, folder, **facts)
    return model


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def is_plain(model: nn.Module, seed: int = 0) -> bool:
    """Whether a tiny ViT is as it was created: no child, no hook, all to be trained, same logits."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    trains = all(parameter.requires_grad for parameter in model.parameters())
    return not hasattr(model, CHILD) and not hooked and trains and torch.equal(logits(model), logits(vit(seed=seed)))


@pytest.mark.parametrize("name", OPTIONS)
@TRIES
@given(data=st.data())
def test_any_valid_options_come_back_bit_for_bit_and_merge(name: str, data: st.DataObject) -> None:
    config = list_methods()[name].Config.from_dict(data.draw(st.fixed_dictionaries({}, optional=OPTIONS[name])))
    with tempfile.TemporaryDirectory() as folder:
        model = saved(Path(folder), config)
        loaded = load(folder, backbone=vit()).model
        assert read_record(folder).method == config
    assert torch.equal(logits(loaded), logits(model))
    if mergeable(vit(), config):
        x = images(4, seed=7, dtype=torch.float64)
        plain, certificate = merge(loaded.double(), x)
        difference = (logits(plain, x) - logits(loaded, x)).abs().max().item()
        assert difference == certificate.max_abs_difference <= certificate.fold_tolerance
        assert not hasattr(plain, CHILD)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_holds_little_more_than_what_trains(name: str, tmp_path: Path) -> None:
    numbers = count_parameters(saved(tmp_path / "a", CONFIGS[name]))
    size = (tmp_path / "a" / TENSORS).stat().st_size
    assert 4 * (numbers.adapter + numbers.head) <= size <= 1.05 * 4 * (numbers.adapter + numbers.head) + 16 * 1024


def test_the_chosen_channels_survive(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    loaded = load(tmp_path / "a", backbone=vit()).model.state_dict()
    chosen = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".index")}
    assert len(chosen) == 3
    assert any(not torch.equal(index, torch.arange(len(index))) for index in chosen.values())
    assert all(torch.equal(loaded[name], index) for name, index in chosen.items())


def test_classes_record_and_preprocessing_come_back_with_a_card(tmp_path: Path) -> None:
    saved(tmp_path / "a", classes=["Ä", "b c", "猫", "d", "e"], record={"metrics": {"top-1": 0.75}})
    loaded = load(tmp_path / "a", backbone=vit())
    assert loaded.classes == ("Ä", "b c", "猫", "d", "e")
    assert not loaded.model.training
    assert read_record(tmp_path / "a").facts == {"metrics": {"top-1": 0.75}}
    card = (tmp_path / "a" / CARD).read_text(encoding="utf-8")
    assert all(fact in card for fact in ("method: `sct`", "top-1: 0.75", "猫", "visgraft.load"))


def test_an_adapter_of_a_named_backbone_loads_alone(tmp_path: Path) -> None:
    origin = Backbone("test_vit", "none", image_size=16, seed=3, arguments=SMALL)
    model = enliven(attach(create_backbone(origin, CLASSES), CONFIGS["lora-0"])).eval()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a").model
    assert torch.equal(logits(loaded), logits(model))
    assert read_record(tmp_path / "a").backbone == origin


def test_a_weights_file_is_named_but_not_where_it_lies(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(live(create_backbone(Backbone("test_vit", "none", 16, 0, SMALL))).state_dict(), weights)
    origin = Backbone("test_vit", str(weights), image_size=16, arguments=SMALL)
    model = enliven(attach(create_backbone(origin, CLASSES), CONFIGS["lora-0"])).eval()
    save(model, tmp_path / "a")
    assert not any(str(tmp_path).encode() in data for data in content(tmp_path / "a").values())
    with pytest.raises(
        AdapterError, match=r"weights file w\.safetensors; pass it again: --weights PATH/w\.safetensors"
    ):
        load(tmp_path / "a")
    assert torch.equal(logits(load(tmp_path / "a", weights=str(weights)).model), logits(model))


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change entries of the config; a value of None takes the entry out, a dictionary changes what is inside."""

    def mutate(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        for key, value in changes.items():
            if value is None:
                del config[key]
            else:
                config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")

    return mutate


def swap(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors in place."""

    def mutate(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / TENSORS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / TENSORS)

    return mutate


def raw(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


WEIGHT = f"{CHILD}.positions.0_stream_mid.linear.weight"
MUTATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "config missing": (lambda folder: (folder / CONFIG).unlink(), "is missing"),
    "config not JSON": (raw(CONFIG, lambda data: data[:-20]), "damaged"),
    "config not UTF-8": (raw(CONFIG, lambda data: b"\xff" + data), "damaged"),
    "config a list": (raw(CONFIG, lambda _: b"[1, 2]"), "format version None"),
    "newer format": (edit(format_version=3), "format version 3"),
    "no format": (edit(format_version=None), "format version None"),
    "no method": (edit(method=None), "'method' is missing"),
    "unknown method": (edit(method="mine"), "import the module that registers it first"),
    "mistyped method": (edit(method="sctt"), "unknown method 'sctt'; did you mean sct"),
    "other method": (edit(method="linear", method_config=[]), "'method_config' is missing or no dict"),
    "unknown option": (edit(method_config={"chanels": 4}), "no option 'chanels'; did you mean channels"),
    "option of wrong type": (edit(method_config={"channels": "4"}), "SCTConfig.channels is '4', but must be a whole"),
    "option out of range": (edit(method_config={"channels": 0}), "must be above 0"),
    "other option": (edit(method_config={"channels": 5}), "does not fit its config"),
    "wrong preprocessing": (edit(data_config={"colour": "blue"}), "colour"),
    "classes a text": (edit(classes="abcde"), "'classes' is missing or no list"),
    "too few classes": (edit(classes=["a"]), "1 class names for a head of 5"),
    "wrong num_classes": (edit(backbone={"num_classes": 4}), "needs a head of 4 outputs"),
    "num_classes a text": (edit(backbone={"num_classes": "5"}), "head of 5 outputs"),
    "other digest": (edit(backbone={"digest": "0" * 64}), "another backbone"),
    "digest a number": (edit(backbone={"digest": 17}), "is damaged: backbone: the digest is 17"),
    "tensors missing": (lambda folder: (folder / TENSORS).unlink(), "missing or damaged"),
    "tensors empty": (raw(TENSORS, lambda _: b""), "missing or damaged"),
    "tensors truncated": (raw(TENSORS, lambda data: data[:-1]), "missing or damaged"),
    "tensors cut in the header": (raw(TENSORS, lambda data: data[:50]), "missing or damaged"),
    "tensors garbage": (raw(TENSORS, lambda data: bytes(reversed(data))), "missing or damaged"),
    "tensor dropped": (swap(lambda t: t.pop(WEIGHT)), WEIGHT),
    "tensor extra": (swap(lambda t: t.update({"blocks.0.norm1.bias": torch.zeros(32)})), "blocks.0.norm1.bias"),
    "wrong shape": (swap(lambda t: t.update({WEIGHT: t[WEIGHT][:1].clone()})), WEIGHT),
    "integer tensor": (swap(lambda t: t.update({WEIGHT: t[WEIGHT].long()})), WEIGHT),
    "float index": (swap(lambda t: t.update({k: v.float() for k, v in t.items() if "index" in k})), "index"),
    "NaN": (swap(lambda t: t[WEIGHT].view(-1)[3].fill_(torch.nan)), "is not finite"),
}


def refusal(folder: Path, **how: Any) -> str:
    """The message with which loading is refused, after checking that it is one line with a place and a remedy."""
    with pytest.raises(AdapterError, match=REMEDY) as caught:
        load(folder, **how)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_adapter_is_refused_and_the_backbone_stays_plain(name: str, tmp_path: Path) -> None:
    mutate, expected = MUTATIONS[name]
    saved(tmp_path / "a")
    mutate(tmp_path / "a")
    backbone = vit().train()
    assert expected in refusal(tmp_path / "a", backbone=backbone)
    assert all(module.training for module in backbone.modules())
    assert is_plain(backbone.eval())


@pytest.mark.parametrize("change", [{"colour": 1}, {"image_size": "16"}, {"name": 5}, {"seed": "x"}, {"arguments": []}])
def test_a_damaged_backbone_entry_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    origin = Backbone("test_vit", "none", image_size=16, arguments=SMALL)
    save(attach(create_backbone(origin, CLASSES), CONFIGS["lora-0"]), tmp_path / "a")
    edit(backbone=change)(tmp_path / "a")
    assert next(iter(change)) in refusal(tmp_path / "a")


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    other = vit(seed=9)
    assert "another backbone" in refusal(tmp_path / "a", backbone=other)
    assert is_plain(other, seed=9)


@pytest.mark.parametrize("count", [1, CLASSES - 1, CLASSES + 1])
def test_the_class_names_must_fit_the_head(count: int, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^{count} class names for a head of {CLASSES} outputs; pass one for each$"):
        saved(tmp_path / "a", classes=[str(i) for i in range(count)])
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    before = content(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(VisgraftError, match=f"{name} exists and is not an earlier result .*; choose another --out"):
            saved(tmp_path / name)
    assert content(tmp_path) == before


def test_saving_takes_a_free_place_or_replaces_an_earlier_adapter_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    check_target(tmp_path / "absent", CONFIG)
    check_target(tmp_path / "a", CONFIG)
    saved(tmp_path / "a")
    check_target(tmp_path / "a", CONFIG)
    with pytest.raises(VisgraftError, match=r"other\.json is missing"):
        check_target(tmp_path / "a", "other.json")
    (tmp_path / "a" / "notes.txt").write_text("of the earlier one", encoding="utf-8")
    model = saved(tmp_path / "a", CONFIGS["lora-0"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert sorted(content(tmp_path / "a")) == sorted([CONFIG, TENSORS, CARD])
    assert torch.equal(logits(load(tmp_path / "a", backbone=vit()).model), logits(model))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("step", ["tensors", "config", "rename"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_save_that_fails_changes_nothing(
    error: Exception, step: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        saved(tmp_path / "a", CONFIGS["lora-0"])
    before, model, rename = content(tmp_path), fitted(CONFIGS["sct-0"]), os.rename

    def fail(*arguments: Any) -> None:
        next(path for path in arguments if isinstance(path, Path)).write_bytes(b"half of it")
        raise error

    def fail_at_the_target(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "a" and Path(source).name != "old":
            raise error
        rename(source, target)

    targets = {
        "tensors": "safetensors.torch.save_file",
        "config": "visgraft.adapters.directory.write_json",
        "rename": "os.rename",
    }
    with monkeypatch.context() as patch:
        patch.setattr(targets[step], fail_at_the_target if step == "rename" else fail)
        patch.setattr("visgraft.files._swap", lambda *folders: False)  # as where the system cannot exchange folders
        with pytest.raises(VisgraftError, match=r"a cannot be written .*No space left.*; nothing was changed there$"):
            save(model, tmp_path / "a")
    assert content(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["a"] if earlier else [])


@pytest.mark.parametrize(("name", "kind"), [("lora-0", "plain"), ("bitfit-0", "plain"), ("alore-0", "convnext")])
def test_what_is_stored_is_all_of_the_method_and_the_head_in_their_order(name: str, kind: str) -> None:
    model = fitted(CONFIGS[name], kind)
    for replaced in (None, nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3)), nn.Linear(32, 2)):
        if replaced is not None and kind == "plain":
            model.head = replaced
        attached = get_attached(model)
        inside = tuple(f"{path}." for path in (*head_paths(model), "visgraft"))
        names = [n for n in model.state_dict() if n.startswith(inside) or n in attached.originals]
        assert attached.head == head_paths(model) and list(attached.stored()) == names
