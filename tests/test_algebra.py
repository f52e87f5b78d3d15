"""How far apart adapters are, against closed forms and folded weights; and truncation by singular values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algebra import CLASSES, SPEC, adapter, draw
from PIL import Image
from support import CONFIGS, enliven
from test_cli import fail, run, succeed

import visgraft
from visgraft import Backbone, VisgraftError, diff_adapters, truncate_adapter
from visgraft.adapters.directory import read_record
from visgraft.algebra.agreement import load_pictures
from visgraft.algebra.changes import position_map, tensor_changes
from visgraft.algebra.features import pooled_features
from visgraft.core.attached import get_attached
from visgraft.core.method import HoldsLowRank

LINEAR = [name for name, config in CONFIGS.items() if config.affine and name.endswith("-0")]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo ü [x]")


@pytest.fixture(scope="module")
def lora(zoo: Path) -> Path:
    return adapter(zoo, visgraft.LoRAConfig(rank=4))


@pytest.fixture(scope="module")
def pictures(zoo: Path) -> Path:
    return draw(zoo / "pictures", 0, 30, 10)


@pytest.fixture(scope="module")
def alore(zoo: Path) -> Path:
    return adapter(zoo, visgraft.ALoREConfig())


@pytest.mark.parametrize("name", ["sct-0", "alore-0"])
def test_an_adapter_is_equal_to_itself_whether_its_maps_fold_or_not(name: str, tmp_path: Path) -> None:
    same = diff_adapters(*[adapter(tmp_path, CONFIGS[name])] * 2).total
    assert same is not None and same.distance is not None and same.first == same.second > 0
    assert same.distance < 1e-9 and same.cosine == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_method_has_maps_to_compare(name: str, tmp_path: Path) -> None:
    other = diff_adapters(*(adapter(tmp_path, CONFIGS[name], seed) for seed in (1, 2))).total
    assert other is not None and other.distance is not None and other.cosine is not None
    assert 0.5 < other.distance < 2**0.5 and abs(other.cosine) < 0.8


@pytest.mark.parametrize("factor", [3.0, -1.0, 0.5])
def test_the_distance_to_a_scaled_adapter_is_known(lora: Path, tmp_path: Path, factor: float) -> None:
    def scaled(model: Any) -> None:
        with torch.no_grad():
            for module in get_attached(model).positions.values():
                module.up.mul_(factor)

    found = diff_adapters(lora, adapter(tmp_path, visgraft.LoRAConfig(rank=4), change=scaled))
    for apart in (found.total, *found.tensors.values()):
        assert apart is not None and apart.second == pytest.approx(abs(factor) * apart.first, rel=1e-5)
        assert apart.distance == pytest.approx(abs(1 - factor) / (1 + factor**2) ** 0.5, abs=1e-6)
        assert apart.cosine == pytest.approx(np.sign(factor), abs=1e-6)
        assert apart.reads == pytest.approx(1, abs=1e-6) and apart.writes == pytest.approx(1, abs=1e-6)


def test_factors_say_what_matrices_would(alore: Path, lora: Path) -> None:
    """Between methods at other places, from what is folded into the weights."""
    states = []
    for path in (alore, lora):
        adapted = visgraft.load(path)
        plain, _ = visgraft.merge(adapted.model.double())
        states.append(plain.state_dict())
    start = visgraft.create_backbone(SPEC, len(CLASSES)).double().state_dict()
    names = [name for name in start if any(not torch.equal(start[name], state[name]) for state in states)]
    names = [name for name in names if not name.startswith("head.")]
    a, b = (torch.cat([(state[name] - start[name]).flatten() for name in names]) for state in states)
    found = diff_adapters(alore, lora)
    assert found.total is not None and set(found.tensors) == set(names)
    distance = ((a - b).norm() / (a.norm() ** 2 + b.norm() ** 2) ** 0.5).item()
    assert found.total.distance == pytest.approx(distance, rel=1e-6)
    assert found.total.cosine == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-6)
    whole = torch.cat([start[name].flatten() for name in names]).norm().item()
    assert found.total.first == pytest.approx(a.norm().item() / whole, rel=1e-6)


def of_rank_two(model: Any) -> None:
    """Leave two of the factors of every module."""
    with torch.no_grad():
        for module in get_attached(model).positions.values():
            module.up.flatten(0, -2)[2:] = 0


@pytest.mark.parametrize(
    "config", [visgraft.LoRAConfig(rank=4), visgraft.RepAdapterConfig(bottleneck=4, groups=1, bias=True)]
)
def test_cut_to_its_own_rank_an_adapter_answers_as_before(config: Any, tmp_path: Path) -> None:
    path = adapter(tmp_path, config, change=of_rank_two)
    made = truncate_adapter(path, 2, tmp_path / "two")
    assert (made.rank, made.rank_before, made.energy) == (2, 2, pytest.approx(1)) and made.agreement is None
    assert made.parameters < made.parameters_before
    before, after = visgraft.load(path), visgraft.load(tmp_path / "two")
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = before.model(x), after.model(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max() and after.classes == CLASSES
    total = diff_adapters(path, tmp_path / "two").total
    assert total is not None and total.distance is not None and total.distance < 1e-6


CUT = ("lora", "dora", "alore", "repadapter", "arc", "fact")


@pytest.mark.parametrize("config", [*(CONFIGS[f"{name}-0"] for name in CUT), visgraft.SCTConfig(mode="mlp")])
def test_the_error_of_the_best_smaller_map_is_the_tail_of_the_singular_values(config: Any, tmp_path: Path) -> None:
    path = adapter(tmp_path, config)
    made = truncate_adapter(path, 2, tmp_path / "cut")
    old, new = (visgraft.load(one) for one in (path, tmp_path / "cut"))
    ours, theirs = get_attached(old.model), get_attached(new.model)
    assert issubclass(theirs.method, HoldsLowRank) and made.method == theirs.config.method
    kept = whole = 0.0
    for key, position in theirs.where.items():
        source = key.replace("attn_q", "attn_qkv").replace("attn_k", "attn_qkv").replace("attn_v", "attn_qkv")
        wanted = position_map(ours, key if key in ours.where else source.replace("qkvkv", "qkv"))
        part = "qkv".find(position.place.adds_to[-1]) if key not in ours.where else 0
        rows = slice(part * position.adds_width, (part + 1) * position.adds_width)
        matrix, found = wanted.matrix[rows], position_map(theirs, key)
        values = torch.linalg.svdvals(matrix)
        assert (found.matrix - matrix).norm() == pytest.approx(values[2:].norm().item(), rel=1e-4, abs=1e-6)
        assert torch.allclose(found.shift, wanted.shift[rows], atol=1e-6)
        kept, whole = kept + values[:2].square().sum().item(), whole + values.square().sum().item()
    assert made.energy == pytest.approx(kept / whole, rel=1e-6) and 0 < made.energy < 1
    for name, tensor in old.model.state_dict().items():
        if not name.startswith("visgraft."):
            assert torch.equal(tensor, new.model.state_dict()[name]), name


def test_what_cannot_be_cut_is_refused_in_one_line(lora: Path, zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "of rank 4 at most" in fail("rank", lora, "--to", 4, "--out", out)
    assert "at least 1" in fail("rank", lora, "--to", 0, "--out", out)
    assert "exists already" in fail("rank", lora, "--to", 2, "--out", zoo)
    for config, told in (
        (visgraft.AdapterConfig(), "is not linear"),
        (visgraft.VPTShallowConfig(), "inserts tokens"),
        (visgraft.BitFitConfig(), "adds no maps"),
        (visgraft.SSFConfig(), "no method holds maps"),
    ):
        assert told in fail("rank", adapter(tmp_path, config), "--to", 1, "--out", out)
    assert not out.exists()


def test_rank_and_diff_tell_what_they_did(lora: Path, alore: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "two ü [b]"
    told = succeed("rank", lora, "--to", 2, "--out", out, "--images", pictures)
    assert told["parameters"] * 2 == told["parameters_before"] and told["agreement"]["images"] == 30
    assert set(told["energy_by_block"]) == set("45") and 0 < told["energy"] < 1
    told = succeed("diff", lora, out, "--images", pictures, "--out", tmp_path / "far.png")
    cosine = told["total"]["cosine"]  # what is cut off is orthogonal to what is kept, and is missing in it
    assert told["total"]["distance"] == pytest.approx(((1 - cosine**2) / (1 + cosine**2)) ** 0.5, rel=1e-5)
    assert len(told["parts"]) == 6 and told["images"] == 30 and told["agreement"]["share"] <= 1
    with Image.open(tmp_path / "far.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
    code, text, _ = run("diff", lora, alore)
    assert code == 0 and "nothing in common" in text and "block 5" in text
    code, text, _ = run("rank", alore, "--to", 8, "--out", tmp_path / "more")
    assert code == 0 and "repadapter" in text


def test_adapters_that_are_not_linear_are_compared_by_what_they_do(lora: Path, pictures: Path, tmp_path: Path) -> None:
    configs = visgraft.VPTDeepConfig(), visgraft.ConvpassConfig()
    prompts, other = (adapter(tmp_path, config) for config in configs)
    assert "inserts tokens" in fail("diff", prompts, lora) and "--images" in fail("diff", lora, other)
    images = sorted(pictures.rglob("*.png"))[:8]
    found = diff_adapters(prompts, other, images=images)
    assert found.total is None and found.no_maps is not None and not found.tensors
    assert len(found.parts) > 4
    assert all(part.maps is None and part.features is not None and part.features.distance for part in found.parts[4:])
    assert found.parts[0].features is not None and found.parts[0].features.distance is None, "it is not adapted"
    same = diff_adapters(prompts, prompts, images=images)
    assert same.pooled is not None and same.pooled.distance == 0 and same.agreement is not None
    assert (same.agreement.share, same.agreement.largest_difference) == (1.0, 0.0)


def test_adapters_that_answer_tasks_in_passes_of_their_own_are_compared_pass_by_pass(
    lora: Path, zoo: Path, pictures: Path, tmp_path: Path
) -> None:
    images, paths = sorted(pictures.rglob("*.png"))[:8], dict[tuple[int, ...], Path]()
    for tasks in ((2, 1), (2, 2), (1, 1, 2)):
        model = visgraft.create_backbone(SPEC, sum(tasks))
        visgraft.attach(model, visgraft.ALoREConfig(share="experts", tasks=tasks, last_blocks=2))
        paths[tasks] = visgraft.save(enliven(model, len(paths)), tmp_path / "-".join(map(str, tasks)))
    same = diff_adapters(paths[2, 1], paths[2, 1], images=images)
    assert same.pooled is not None and same.pooled.distance == 0 and same.pooled.first > 0
    for one, other in ((lora, paths[2, 1]), (paths[2, 1], lora), (paths[2, 1], paths[2, 2])):
        found = diff_adapters(one, other, images=images)
        assert found.pooled is not None and found.pooled.distance is not None and 0.2 < found.pooled.distance < 1.5
    assert "in 2 passes and the other in 3" in fail("diff", paths[2, 1], paths[1, 1, 2], "--images", pictures)
    bank, loaded = visgraft.load_bank([paths[1, 1, 2]]), load_pictures(images, read_record(lora))
    features, logits = pooled_features(bank, str(paths[1, 1, 2]), loaded, "fp32")
    plain, _ = pooled_features(bank, None, loaded, "fp32")
    assert features.shape == (8, 3 * plain.shape[1]) and logits.shape == (8, 4)
    head = visgraft.load(paths[1, 1, 2]).model.head.double()
    each = features.double().unflatten(1, (3, -1)) @ head.weight.T + head.bias
    expected = torch.cat([each[:, 0, :1], each[:, 1, 1:2], each[:, 2, 2:]], 1)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)  # each image's own passes


def test_what_has_no_distance_is_refused_in_one_line(lora: Path, tmp_path: Path) -> None:
    apart = adapter(tmp_path, visgraft.LoRAConfig(targets=("fc1",)))
    assert "no tensor of the backbone in common" in fail("diff", lora, apart)
    backbone = visgraft.create_backbone(Backbone("test_vit", "none", 32, seed=1), 3)
    elsewhere = visgraft.attach(backbone, visgraft.LoRAConfig())
    assert "not of one backbone" in fail("diff", lora, visgraft.save(elsewhere, tmp_path / "elsewhere"))
    assert "no picture's name" in fail("diff", lora, lora, "--out", tmp_path / "far.txt")
    assert "does not exist" in fail("diff", lora, lora, "--out", tmp_path / "nowhere" / "far.png")


def test_a_bank_lends_what_load_gives(lora: Path) -> None:
    bank = visgraft.load_bank({"one": lora})
    x = torch.randn(2, 3, 32, 32)
    with bank.lent("one") as model, bank.lent(None) as plain, torch.no_grad():
        assert torch.equal(model(x), visgraft.load(lora).model.requires_grad_(False)(x))
        fresh = visgraft.attach(visgraft.create_backbone(SPEC, 3), visgraft.LoRAConfig())
        assert not list(tensor_changes(plain, fresh)), "a branch of zeros changes nothing"
    with pytest.raises(VisgraftError, match="no adapter 'two'"), bank.lent("two"):
        pass
