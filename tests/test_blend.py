"""Blends: what several adapters add is added with weights, for every method; how weights are chosen; and ensembles."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import CONFIGS, enliven, fitted, images, logits
from typer.testing import CliRunner

import visgraft
from visgraft import Backbone, VisgraftError, blend, detach, load, merge, save
from visgraft.adapters.directory import CONFIG, TENSORS, read_record
from visgraft.cli.app import build
from visgraft.core.attached import get_attached
from visgraft.core.method import Grid, Method
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError
from visgraft.search.blending import search_blend

GRID = Grid(4, 4, 1)
TINY_VIT = Backbone("vit_tiny_patch16_224", "none", 32)
BLENDED = [name for name in CONFIGS if not name.startswith("vpt")]


def saved(name: str, folder: Path, seeds: Sequence[int] = (1, 2), variant: str = "plain", **more: Any) -> list[Path]:
    """Adapters of one backbone whose trained tensors, the head's among them, differ."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = enliven(fitted(CONFIGS[name], variant), seed)
        found.append(save(model, folder / f"{name}-{seed}", **more))
    return found


def plain(name: str, variant: str = "plain") -> Any:
    return detach(fitted(CONFIGS[name], variant))


def modules(model: Any) -> dict[str, Any]:
    return dict(get_attached(model).positions.items())


@pytest.mark.parametrize("name", BLENDED)
def test_a_blend_adds_what_its_adapters_add(name: str, tmp_path: Path) -> None:
    paths = saved(name, tmp_path)
    first, second = (load(path, backbone=plain(name)).model for path in paths)
    made = blend(paths, [0.3, 0.7], scale=0.8, backbone=plain(name))
    for key, position in get_attached(made.model).where.items():
        x = torch.randn(2, 17, position.reads_width, generator=torch.Generator().manual_seed(0))
        added = [modules(model)[key].delta(x, GRID) for model in (first, second)]
        wanted = 0.8 * (0.3 * added[0] + 0.7 * added[1])
        module: Method = modules(made.model)[key]
        low_rank = module.low_rank()
        for found in (module.delta(x, GRID), *([] if low_rank is None else [low_rank.delta(x)])):
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-7
    own, state = get_attached(made.model).originals, made.model.state_dict()
    for name_, start in own.items():
        tensors = [model.state_dict()[name_] for model in (first, second)]
        mean = 0.3 * tensors[0] + 0.7 * tensors[1]
        wanted = mean if name_.startswith("head.") else start + 0.8 * (mean - start)
        assert torch.allclose(state[name_], wanted, atol=1e-6)


@pytest.mark.parametrize(("name", "variant"), [("alore-0", "plain"), ("sct-0", "plain"), ("lora-0", "swin")])
def test_a_blend_is_an_adapter_like_any_other(name: str, variant: str, tmp_path: Path) -> None:
    paths = saved(name, tmp_path, variant=variant, classes=list("abcde"))
    made = blend(paths, backbone=plain(name, variant))
    out = save(made.model, tmp_path / "blend", classes=made.classes, record=made.record.facts)
    again = load(out, backbone=plain(name, variant))
    x = images(4, size=get_attached(made.model).sites.blocks and made.record.data_config["input_size"][1])
    assert torch.equal(logits(again.model, x), logits(made.model, x)) and again.classes == tuple("abcde")
    assert read_record(out).facts["blend"] == {"adapters": [p.name for p in paths], "weights": [0.5, 0.5], "scale": 1.0}
    # A blend of a blend is one of all its parts.
    nested = blend([out, paths[0]], [0.5, 0.5], scale=0.6, backbone=plain(name, variant))
    whole = blend(paths, [0.75, 0.25], scale=0.6, backbone=plain(name, variant))
    assert torch.allclose(logits(nested.model, x), logits(whole.model, x), atol=1e-4)


def test_tensors_are_averaged_where_that_averages_the_maps(tmp_path: Path) -> None:
    assert blend(saved("ssf-0", tmp_path), backbone=plain("ssf-0")).record.method.blend is None
    made = blend(saved("sct-0", tmp_path), backbone=plain("sct-0"))
    same = all(torch.equal(a.index, b.index) for a, b in zip(*_scts(tmp_path), strict=True))
    assert (made.record.method.blend is None) == same
    assert blend(saved("lora-0", tmp_path), [0.25, 0.75], backbone=plain("lora-0")).record.method.blend == (0.25, 0.75)


def test_an_adapter_without_weight_takes_no_room(tmp_path: Path) -> None:
    paths = saved("alore-0", tmp_path)
    made = blend(paths, [0.0, 1.0], scale=0.5, backbone=plain("alore-0"))
    assert made.record.method.blend == (0.5,)
    alone = blend(paths[1:], scale=0.5, backbone=plain("alore-0"))
    assert torch.equal(logits(made.model), logits(alone.model))


def _scts(folder: Path) -> list[list[Any]]:
    return [list(modules(load(folder / f"sct-0-{seed}", backbone=plain("sct-0")).model).values()) for seed in (1, 2)]


def test_a_blend_of_channels_that_differ_keeps_both(tmp_path: Path) -> None:
    paths = saved("sct-0", tmp_path)
    model = load(paths[1], backbone=plain("sct-0")).model
    for module in modules(model).values():
        module.index.copy_((module.index + 1) % 32)
    save(model, paths[1])
    made = blend(paths, backbone=plain("sct-0"))
    assert made.record.method.blend == (0.5, 0.5)
    x = images(3)
    key, module = next(iter(modules(made.model).items()))
    parts = [modules(load(path, backbone=plain("sct-0")).model)[key] for path in paths]
    seen = torch.randn(2, 17, 32)
    assert torch.allclose(module.delta(seen, GRID), sum(0.5 * part.delta(seen, GRID) for part in parts), atol=1e-6)
    assert logits(made.model, x).isfinite().all()


@pytest.mark.parametrize("name", ["alore-0", "fact-0", "dora-0", "arc-0"])
def test_a_blend_of_linear_adapters_merges(name: str, tmp_path: Path) -> None:
    made = blend(saved(name, tmp_path), backbone=plain(name))
    merged, certificate = merge(made.model)
    assert certificate.max_abs_difference < 1e-3
    assert torch.allclose(logits(merged), logits(made.model), atol=1e-3)


def test_a_blend_trains_on(tmp_path: Path) -> None:
    made = blend(saved("alore-0", tmp_path), backbone=plain("alore-0"))
    made.model.train()
    made.model(images(2)).sum().backward()
    grown = [name for name, p in made.model.named_parameters() if name.startswith(CHILD) and p.grad is not None]
    assert any(".parts.0." in name for name in grown) and any(".parts.1." in name for name in grown)


@pytest.mark.parametrize(
    ("weights", "scale", "told"),
    [
        ([0.6, 0.6], 1.0, "the weights add up to 1.2, but must to 1"),
        ([1.0], 1.0, "2 adapters, but 1 weights; give one for each"),
        ([float("nan"), 1.0], 1.0, "the weights add up to nan"),
        ([1e9, 1 - 1e9], 1.0, r"a weight is 1e\+09, but must be between -10 and 10"),
        (None, 0.0, "scale is 0, but must be above 0"),
        (None, float("nan"), "scale is nan, but must be above 0"),
    ],
)
def test_weights_that_do_not_go_are_refused(weights: Any, scale: float, told: str, tmp_path: Path) -> None:
    with pytest.raises(VisgraftError, match=told):
        blend(saved("alore-0", tmp_path), weights, scale=scale, backbone=plain("alore-0"))


def test_adapters_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    [first] = saved("alore-0", tmp_path, [1], classes=list("abcde"))
    [other] = saved("lora-0", tmp_path, [1])
    with pytest.raises(VisgraftError, match=r"do not blend, because their method differ"):
        blend([first, other], backbone=plain("alore-0"))
    [named] = saved("alore-0", tmp_path / "more", [2], classes=list("edcba"))
    with pytest.raises(VisgraftError, match=r"because their classes differ.*predict --ensemble"):
        blend([first, named], backbone=plain("alore-0"))
    with pytest.raises(VisgraftError, match="no adapter is given"):
        blend([])
    prompts = saved("vpt_deep-0", tmp_path)
    with pytest.raises(VisgraftError, match="inserts tokens, which cannot be added up"):
        blend(prompts, backbone=plain("vpt_deep-0"))
    config = dataclasses.replace(CONFIGS["alore-0"], blend=(0.5, 0.5))
    with pytest.raises(VisgraftError, match=r"blend is what visgraft\.blend writes"):
        visgraft.attach(plain("alore-0"), config)
    backbone = plain("alore-0")
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    next(backbone.blocks.parameters()).data.add_(1)
    with pytest.raises(VisgraftError, match="was trained on another backbone"):
        blend(saved("alore-0", tmp_path), backbone=backbone)
    assert backbone.state_dict().keys() == before.keys()  # plain again


def first_of(tensors: dict[str, Any]) -> str:
    return next(name for name in tensors if name.startswith(CHILD))


DAMAGES: dict[str, Any] = {
    "is not finite": lambda t: {**t, first_of(t): t[first_of(t)] * float("nan")},
    "does not fit its config: head.bias": lambda t: {name: x for name, x in t.items() if name != "head.bias"},
    "does not fit its config: visgraft.more": lambda t: {**t, "visgraft.more": torch.ones(1)},
    "does not fit its config: visgraft": lambda t: {**t, first_of(t): torch.ones(3, 3)},
    "does not fit its config: visgraft.pos": lambda t: {**t, first_of(t): t[first_of(t)].long()},
    "answers a seeded picture otherwise": lambda t: {**t, first_of(t): t[first_of(t)] + 9},
}


@pytest.mark.parametrize("told", DAMAGES)
@pytest.mark.parametrize("place", [0, 1])
def test_damaged_tensors_are_refused_as_load_refuses_them(told: str, place: int, tmp_path: Path) -> None:
    paths = saved("alore-0", tmp_path)
    file = paths[place] / TENSORS
    save_file(DAMAGES[told](load_file(file)), file)
    backbone = plain("alore-0")
    with pytest.raises(AdapterError, match=f"{paths[place].name}.*{told}"):
        blend(paths, backbone=backbone)
    assert CHILD not in dict(backbone.named_children())


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([], "must be finite weights, at least one"),
        ([float("nan"), 0.5], "must be finite weights"),
        ([0.5], "does not fit its config"),  # one part would be left out
        ([0.5, 0.25, 0.25], "does not fit its config"),
        ("x", "must be a tuple of numbers"),
    ],
)
@pytest.mark.parametrize("of_blend", [True, False])
def test_a_config_with_other_weights_is_refused(weights: Any, told: str, of_blend: bool, tmp_path: Path) -> None:
    paths = saved("alore-0", tmp_path)
    if of_blend:
        save(blend(paths, backbone=plain("alore-0")).model, paths[0])
    config = json.loads((paths[0] / CONFIG).read_text())
    config["method_config"]["blend"] = weights
    (paths[0] / CONFIG).write_text(json.dumps(config))
    for read in (load, lambda path, backbone: blend([path, path], backbone=backbone)):
        with pytest.raises(AdapterError, match=told):
            read(paths[0], backbone=plain("alore-0"))


def test_a_blend_whose_means_overflow_is_refused(tmp_path: Path) -> None:
    paths = saved("ssf-0", tmp_path)
    for path in paths:
        model = load(path, backbone=plain("ssf-0")).model
        model.head.bias.data.fill_(3e38)
        save(model, path)
    assert blend(paths, backbone=plain("ssf-0")).model.head.bias.isfinite().all()
    model.head.bias.data.fill_(-3e38)
    save(model, paths[1])
    with pytest.raises(AdapterError, match=r"head\.bias of the blend is not finite"):
        blend(paths, [2.0, -1.0], backbone=plain("ssf-0"))


def test_images_divided_otherwise_cannot_be_divided_again(tmp_path: Path) -> None:
    """What one adapter has as test images, the other has learned."""
    data = {"fingerprint": "f", "val_fraction": 0.15, "test_fraction": 0.2, "layout": "flat", "background": "white"}
    for seeds, kept in (((0, 0), {**data, "seed": 0}), ((0, 1), {"layout": "flat", "background": "white"})):
        paths = [
            save(fitted(CONFIGS["ssf-0"]), tmp_path / str(number), record={"data": {**data, "seed": seed}})
            for number, seed in enumerate(seeds)
        ]
        record = blend(paths, backbone=plain("ssf-0")).record
        assert record.facts["data"] == kept
        out = save(blend(paths, backbone=plain("ssf-0")).model, tmp_path / "out", record=record.facts)
        assert (read_record(out).split is None) == (seeds == (0, 1))


def test_the_card_says_what_was_blended(tmp_path: Path) -> None:
    made = blend(saved("ssf-0", tmp_path), backbone=plain("ssf-0"))
    card = (save(made.model, tmp_path / "out", record=made.record.facts) / "README.md").read_text()
    assert "It was blended of ssf-0-1, ssf-0-2" in card and "one training with one seed" not in card


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A data set and three adapters of it that differ in their seed."""
    root = tmp_path_factory.mktemp("blends")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("val", 6), ("test", 4)):
        for kind, level in (("dark", 60), ("light", 190)):
            folder = root / "data" / part / kind
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 60, (16, 16, 3), dtype=torch.uint8, generator=generator) + level
                Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    paths = []
    for seed in range(3):
        visgraft.train_folder(
            root / "data", root / f"seed{seed}", backbone=TINY_VIT, method_config=CONFIGS["alore-0"],
            train_config=visgraft.TrainConfig(epochs=2, batch_size=8, seed=seed, precision="fp32"),
        )  # fmt: skip
        paths.append(root / f"seed{seed}")
    return root / "data", paths


def test_a_search_starts_from_the_best_and_only_goes_up(trained: tuple[Path, list[Path]]) -> None:
    data, paths = trained
    seen: list[Any] = []
    found = search_blend(paths, data, on_tried=seen.append)
    assert found.tried == tuple(seen) and found.images == 12
    assert [one.weights for one in found.tried[:3]] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    assert all(sum(one.weights) == pytest.approx(1) for one in found.tried)
    assert found.best.figure == max(one.figure for one in found.tried)
    for one in (found.tried[0], found.tried[4], found.tried[-1]):
        assert one.figure == visgraft.evaluate(
            blend(paths, one.weights, scale=one.scale).model,
            visgraft.load_images(visgraft.read_folder(data).val, load(paths[0]).record.data_config),
            "fp32",
        ).figure  # fmt: skip


def run(*words: Any) -> Any:
    return CliRunner().invoke(build([*map(str, words)]), [*map(str, words)])


def test_the_verb_writes_an_adapter_and_says_what_it_did(trained: tuple[Path, list[Path]], tmp_path: Path) -> None:
    data, paths = trained
    done = run("blend", *paths, "--out", tmp_path / "blend", "--search", data, "--json")
    told = json.loads(done.stdout)
    assert told["chosen_on"] == "12 validation images" and len(told["tried"]) == 3 + 2 * 3 + 5
    record = read_record(tmp_path / "blend")
    assert record.facts["blend"]["weights"] == told["weights"] and record.canary is not None
    done = run("blend", paths[0], "--out", tmp_path / "mild", "--scale", "0.5", "--json")
    assert json.loads(done.stdout)["scale"] == 0.5
    done = run("eval", tmp_path / "mild", data, "--json")
    assert json.loads(done.stdout)["images"] == 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--weights", "a,b"), "--weights is 'a,b', but must be numbers separated by commas"),
        (("--search", "DATA", "--scale", "0.5"), "leave out --weights and --scale"),
        (("--csv", "x.csv"), "add --search, or leave --csv out"),
        (("--out", "FIRST"), "is one of the adapters that are blended"),
        (("--out", "INSIDE"), "is one of the adapters that are blended, or in one"),
    ],
)
def test_mistakes_get_one_line(
    words: tuple[str, ...], told: str, trained: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    data, paths = trained
    given = [{"DATA": data, "FIRST": paths[0], "INSIDE": paths[0] / "more"}.get(word, word) for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    done = run("blend", *paths, *given, *out)
    assert isinstance(done.exception, VisgraftError) and told in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_one_adapter_alone_is_no_blend(trained: tuple[Path, list[Path]], tmp_path: Path) -> None:
    done = run("blend", trained[1][0], "--out", tmp_path / "out")
    assert "name a second one, or give --scale" in str(done.exception)


def test_an_ensemble_answers_with_the_mean_of_the_probabilities(trained: tuple[Path, list[Path]]) -> None:
    data, paths = trained
    pictures = sorted((data / "test").rglob("*.png"))
    each = list(visgraft.predict_stream(paths, pictures, top=2))
    together = list(visgraft.predict_stream(paths, pictures, top=2, ensemble=True))
    assert [one.image for one in together] == pictures and {one.adapter for one in together} == {"ensemble"}
    for picture, one in zip(pictures, together, strict=True):
        rows = [dict(answer.classes) for answer in each if answer.image == picture]
        for kind, probability in one.classes:
            assert probability == pytest.approx(sum(row[kind] for row in rows) / 3, abs=1e-6)
    with pytest.raises(VisgraftError, match="an ensemble needs two adapters or more"):
        list(visgraft.predict_stream(paths[:1], pictures, ensemble=True))
    done = run("predict", *paths, *pictures, "--ensemble", "--json")
    assert len(json.loads(done.stdout)) == len(pictures)
