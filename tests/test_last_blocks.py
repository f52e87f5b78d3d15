"""Only the last blocks adapted: where methods stand, and the frozen prefix that runs once per image."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FAMILIES, VARIANTS, fitted, images, logits, size_of, vit
from test_cli import SMALL, draw, fail, succeed
from test_train import RECIPE, held, same, task, training
from timm.layers import DropPath
from timm.models.beit import Beit
from torch import Tensor, nn

import visgraft.training.prefix
from visgraft import MethodConfig, SCTConfig, TrainConfig, VisgraftError, attach, list_methods, load, save
from visgraft.adapters.directory import CONFIG
from visgraft.bench.ledger import read_file
from visgraft.bench.running import method_config
from visgraft.cli.options import train_flags
from visgraft.core.attached import get_attached
from visgraft.core.families import BLOCKS
from visgraft.measure.precision import make_compute
from visgraft.options import method_fields
from visgraft.report.parts import show_parts
from visgraft.training.objective import make_objective
from visgraft.training.prefix import Prefix, Tail, find_cut, run_prefix

IN_BLOCKS = [name for name, kind in list_methods().items() if kind.Config.has_places]
ROOT = Path(__file__).parents[1]


def config(name: str, **options: Any) -> MethodConfig:
    return list_methods()[name].Config(**options)


def blocks_of(model: nn.Module) -> set[int | None]:
    return {position.block for position in get_attached(model).where.values()}


def prefix_of(model: nn.Module, kind: str = "plain", precision: str = "fp32", count: int = 6) -> Prefix:
    found = run_prefix(model, [task(count, size=size_of(kind))], make_compute(precision), batch_size=4)
    assert isinstance(found, Prefix), found
    return found


def test_methods_without_modules_in_blocks_refuse_it_and_do_not_offer_it() -> None:
    others = [name for name in list_methods() if name not in IN_BLOCKS]
    assert set(others) == {"linear", "full", "bitfit", "norm", "partial"}
    for name in others:
        with pytest.raises(VisgraftError, match=f"last_blocks has no effect on {name}"):
            config(name, last_blocks=1)
        assert "last_blocks" not in {field.name for field in method_fields(list_methods()[name].Config)}
    (flag,) = (flag for flag in train_flags() if flag.field.name == "last_blocks")
    assert flag.kind is int and "|" not in flag.help


def test_a_number_of_blocks_that_the_backbone_has_not_is_refused() -> None:
    with pytest.raises(VisgraftError, match="last_blocks is 4, but VisionTransformer has 3 blocks"):
        attach(vit(), config("lora", last_blocks=4))
    with pytest.raises(VisgraftError, match="last_blocks is 0, but must be above 0"):
        config("lora", last_blocks=0)


def test_blocks_are_counted_over_all_stages_and_among_those_a_method_takes() -> None:
    assert blocks_of(fitted(config("alore", last_blocks=2), "swin")) == {3, 4}
    assert blocks_of(fitted(config("sct", last_blocks=3), "swin")) == {3, 4}
    assert blocks_of(fitted(config("sct", last_blocks=3, blocks="all"), "swin")) == {2, 3, 4}
    assert blocks_of(fitted(config("lora", last_blocks=3))) == {0, 1, 2}


def test_places_before_the_blocks_are_left_out_and_refused_where_asked_for() -> None:
    model = fitted(config("ssf", last_blocks=3))
    assert {key for key in get_attached(model).where if not key[0].isdigit()} == {"norm_out"}
    with pytest.raises(VisgraftError, match=r"patch\.out, before the blocks that last_blocks=1 adapts"):
        attach(vit(), config("ssf", last_blocks=1, operations=("embed", "mlp")))


def test_prompts_that_pass_all_blocks_enter_the_first_adapted_one() -> None:
    (position,) = get_attached(fitted(config("vpt_shallow", last_blocks=2))).where.values()
    assert (position.block, position.last) == (1, 2)


@pytest.mark.parametrize("kind", ["plain", "swin", "convnext", "mixer"])
def test_of_the_backbones_own_tensors_only_those_from_the_first_adapted_block_on_train(kind: str) -> None:
    model = fitted(config("adapter", norms=True, last_blocks=1), kind)
    last = {"plain": "blocks.2.", "swin": "layers.3.blocks.0.", "convnext": "stages.3.blocks.0.", "mixer": "blocks.1."}
    trained = get_attached(model).unfrozen
    assert any(name.startswith(last[kind]) for name in trained)
    assert {name for name in trained if "blocks." in name} == {n for n in trained if n.startswith(last[kind])}
    assert any("blocks." not in name for name in trained), "the final norm trains too"
    cut = find_cut(model, images(2, size=size_of(kind)))
    assert cut is not None and cut.block == last[kind].rstrip(".")


def test_sct_chooses_for_the_adapted_blocks_what_it_would_choose_there_anyway() -> None:
    every, last = (get_attached(fitted(SCTConfig(last_blocks=k), alive=False)).positions for k in (None, 1))
    assert list(last) == ["2_stream_mid"]
    assert torch.equal(last["2_stream_mid"].index, every["2_stream_mid"].index)


def test_the_report_names_the_block_whose_parts_it_shows() -> None:
    shown = show_parts(fitted(config("alore", last_blocks=1)), task(), "fp32")
    assert shown is not None and (shown.block, shown.blocks) == (3, 3)


def test_adapters_and_results_from_before_the_option_stay_valid(tmp_path: Path) -> None:
    save(fitted(SCTConfig()), tmp_path / "old")
    assert "last_blocks" not in json.loads((tmp_path / "old" / CONFIG).read_text())["method_config"]
    load(tmp_path / "old", backbone=vit())
    assert SCTConfig.from_dict(SCTConfig(last_blocks=2).to_dict()) == SCTConfig(last_blocks=2)
    results = read_file(ROOT / "results" / "offline.jsonl")  # refuses a line whose key is not its trial's
    assert len(results) > 50
    for result in results:
        today = replace(result.trial, method_options=method_config(result.trial).to_dict())
        assert today.key == result.trial.key


CUTS = [("lora", kind, {"last_blocks": 1}) for kind in (*VARIANTS, *FAMILIES)]
CUTS += [(name, "plain", {"last_blocks": k}) for name in IN_BLOCKS for k in (1, 2)]
CUTS += [("partial", kind, {}) for kind in ("plain", "swin", "convnext")]
CUTS += [("sct", "swin", {}), ("linear", "deit_distilled", {}), ("adapter", "swin", {"norms": True, "last_blocks": 2})]


def check_outputs(outputs: Tensor, model: nn.Module, x: Tensor) -> None:
    """Hold outputs against those of the whole model, by how much that itself errs in float32 on this processor."""
    whole, exact = model(x), copy.deepcopy(model).double()(x.double())
    rounding = (whole - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (outputs - exact).abs().max() <= 4 * rounding <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize(("name", "kind", "options"), CUTS)
def test_the_tail_gives_the_same_outputs_and_gradients_as_the_whole(name: str, kind: str, options: Any) -> None:
    model = fitted(config(name, **options), kind)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # timm's Swin and one variant have some
    x, y = images(6, size=size_of(kind)), torch.arange(6) % 5
    found = prefix_of(model, kind)
    pictures = task(6, size=size_of(kind))
    x = pictures.normalised(pictures.pixels)
    check_outputs(found.tail(found.entering[0]), model, x)
    gradients = []
    for network, entering in ((model, x), (found.tail, found.entering[0])):
        model.train()
        torch.manual_seed(0)
        nn.functional.cross_entropy(network(entering), y).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert gradients[0].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model.eval(), x), logits(copy.deepcopy(model), x))
    assert not any("forward" in vars(module) for module in model.modules()), "modules were left standing still"


def test_nothing_before_the_cut_computes() -> None:
    model = fitted(config("lora", last_blocks=1))
    found, ran = prefix_of(model), []
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    found.tail(found.entering[0])
    working = {path for path in ran if path not in found.tail.cut.done}
    assert any(path.startswith("blocks.2.") for path in working)
    assert not any(path.startswith(("patch_embed", "blocks.0.", "blocks.1.")) for path in working)


def both(model: nn.Module, monkeypatch: pytest.MonkeyPatch, recipe: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Train the same model with the prefix run once and in every step; return both results and both adapters."""
    other = copy.deepcopy(model)
    once = training.train(model, task(), recipe, task(10, 1), **options)
    monkeypatch.setattr(visgraft.training.prefix, "MEMORY_SHARE", 0.0)
    with pytest.warns(UserWarning, match="would take"):
        always = training.train(other, task(), recipe, task(10, 1), **options)
    return once, always, held(model), held(other)


@pytest.mark.parametrize("name", ["sct", "alore", "lora", "vpt_deep", "ssf"])
def test_training_on_what_the_prefix_gave_is_training_on_the_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = attach(vit(), config(name, last_blocks=1), task().batches())
    once, always, first, second = both(model, monkeypatch, RECIPE)
    per_image = 17 * 32 * 4
    assert once.kept_bytes == 30 * per_image and always.kept_bytes == 0
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    for one, other in zip(once.history, always.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-5)


def test_in_bf16_the_tail_computes_what_the_whole_computes() -> None:
    model = fitted(config("lora", last_blocks=2))
    found, pictures = prefix_of(model, precision="bf16"), task(6)
    with torch.autocast("cpu", torch.bfloat16):
        tail, whole = found.tail(found.entering[0]), model(pictures.normalised(pictures.pixels))
    torch.testing.assert_close(tail, whole, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert found.tail(found.entering[0][:4]).equal(model(pictures.normalised(pictures.pixels[:4])))


def test_the_prefix_runs_once_per_image_and_in_every_step_where_images_change() -> None:
    passes: list[int] = []
    model: Any = attach(vit(), config("lora", last_blocks=1))
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    training.train(model, task(), RECIPE, on_warning=pytest.fail)
    assert sum(passes) == 20 + 3 * 2, "all images, and two of them to see where to cut and to compare"
    passes.clear()
    told: list[str] = []
    training.train(model, task(), replace(RECIPE, flip=True), on_warning=told.append)
    assert sum(passes) == 3 * 20
    assert len(told) == 1 and "images are augmented" in told[0]


VIEWS = replace(RECIPE, rand_augment="rand-m9-mstd0.5-inc1", flip=True, cached_views=2)


def test_cached_views_take_turns_and_each_runs_through_the_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    model: Any = attach(vit(), config("lora", last_blocks=1))
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    tasks = [make_objective(model, model, task(), None, VIEWS, make_compute("fp32"))]
    assert sum(passes) == 2 * 20 + 3 * 2, "both views of all images; two to see where to cut, and to compare"
    monkeypatch.setattr(visgraft.training.prefix, "MEMORY_SHARE", 0.0)
    with pytest.warns(UserWarning, match="would take"):
        tasks.append(make_objective(model, model, task(), None, VIEWS, make_compute("fp32")))
    chosen = torch.tensor([7, 2, 11])
    with torch.no_grad():
        kept, anew = ([one.network(one.inputs(chosen, epoch)) for epoch in (1, 2, 3, 4)] for one in tasks)
    torch.testing.assert_close(kept, anew, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept[0], kept[2]) and torch.equal(kept[1], kept[3]) and not torch.equal(kept[0], kept[1])
    unlimited, told = replace(VIEWS, cached_views=None), list[str]()
    first = make_objective(model, model, task(), None, unlimited, make_compute("fp32"), on_warning=told.append)
    torch.testing.assert_close(first.network(first.inputs(chosen, 2)), kept[1], rtol=1e-5, atol=1e-6)


def test_training_on_cached_views_is_training_on_those_views(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in (("sct", {"last_blocks": 1}), ("partial", {})):
        torch.manual_seed(0)
        model = attach(vit(), config(name, **options), task().batches())
        with monkeypatch.context() as patch:
            once, _, first, second = both(model, patch, VIEWS)
        assert once.kept_bytes == (2 * 20 + 10) * 17 * 32 * 4
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_a_head_alone_trains_on_features_of_cached_views(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = attach(vit(), config("linear"))
    other, passes, features = copy.deepcopy(model), list[int](), dict[str, Tensor]()
    model.patch_embed.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    training.train(model, task(), VIEWS, task(10, 1), features=features)
    assert sum(passes) == 2 * 20 + 10
    assert (len(features["train"]), len(features["val"])) == (40, 10)
    monkeypatch.setattr("visgraft.training.objective.sees_features", lambda *_: False)
    monkeypatch.setattr("visgraft.training.objective.run_prefix", lambda *_, **__: "it is tested")
    training.train(other, task(), VIEWS, task(10, 1), on_warning=lambda line: None)
    torch.testing.assert_close(held(model), held(other), rtol=1e-4, atol=1e-6)


def test_cached_views_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(VisgraftError, match="cached_views has no effect without augmentation"):
        TrainConfig(cached_views=2)
    with pytest.raises(VisgraftError, match="cached_views is 0, but must be above 0"):
        replace(VIEWS, cached_views=0)
    for name in ("lora", "full"):
        with pytest.raises(VisgraftError, match="adapt the last_blocks only"):
            training.train(attach(vit(), config(name)), task(), VIEWS)
    assert "cached_views" not in TrainConfig().to_dict()
    assert TrainConfig.from_dict(VIEWS.to_dict()) == VIEWS


def test_drop_path_in_the_prefix_keeps_it_in_every_step() -> None:
    told: list[str] = []
    model = attach(vit("drop_path"), config("lora", last_blocks=1))
    result = training.train(model, task(), replace(RECIPE, drop_path=0.2), on_warning=told.append)
    assert result.kept_bytes == 0
    assert len(told) == 1 and "blocks.1.drop_path1 is random while training" in told[0]
    quiet = attach(vit("drop_path"), config("partial"))
    training.train(quiet, task(), replace(RECIPE, drop_path=0.2), on_warning=pytest.fail)


def test_no_prefix_is_kept_where_the_first_block_trains_or_the_blocks_are_unknown() -> None:
    compute = make_compute("fp32")
    for name in ("lora", "bitfit", "full", "norm"):
        assert run_prefix(attach(vit(), config(name)), [task()], compute) is None
    known = dict(BLOCKS)
    try:
        BLOCKS.clear()
        assert run_prefix(attach(vit(), config("partial")), [task()], compute) is None
    finally:
        BLOCKS.update(known)


class Skips(nn.Module):
    """A block that also sees what the first block returned."""

    def __init__(self, first: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.seen: list[Tensor] = []
        first.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out + self.seen.pop()


def test_a_model_that_uses_the_prefix_elsewhere_too_trains_as_ever() -> None:
    model: Any = attach(vit(), config("lora", last_blocks=1))
    model.norm = Skips(model.blocks[0], model.norm)
    told: list[str] = []
    result = training.train(model, task(), RECIPE, on_warning=told.append)
    assert result.kept_bytes == 0
    assert len(told) == 1 and "does not give the same from block 3 on alone" in told[0]
    model.head.weight.data.zero_()  # then logits alone would tell nothing
    model.head.bias.data.zero_()
    assert isinstance(run_prefix(model, [task()], make_compute("fp32")), str)


def test_positions_that_all_blocks_share_are_still_computed() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    plain = Beit(**sizes, num_classes=5, use_shared_rel_pos_bias=True)
    nn.init.normal_(plain.rel_pos_bias.relative_position_bias_table)
    model = attach(plain, config("adapter", last_blocks=1))
    found, pictures = prefix_of(model, "beit"), task(6, size=32)
    x = pictures.normalised(pictures.pixels)
    check_outputs(found.tail(found.entering[0]), model, x)


def test_a_resumed_run_ends_with_the_very_same_weights() -> None:
    states: list[Any] = []
    model = attach(vit(), config("lora", last_blocks=1))
    other = copy.deepcopy(model)
    training.train(model, task(), RECIPE, on_state=states.append)
    training.train(other, task(), RECIPE, resume=states[0])
    assert same(held(model), held(other))


def test_a_tail_takes_any_number_of_images_and_leaves_the_model_usable_after_an_error() -> None:
    model = fitted(config("lora", last_blocks=1))
    found = prefix_of(model)
    assert isinstance(found.tail, Tail)
    assert found.tail(found.entering[0][:1]).shape == (1, 5)
    with pytest.raises(RuntimeError):
        found.tail(found.entering[0][..., :3])
    assert not any("forward" in vars(module) for module in model.modules())
    assert logits(model).shape == (6, 5)


def test_labels_and_validation_go_with_the_kept_inputs() -> None:
    model = attach(vit(), config("lora", last_blocks=1))
    task_of = make_objective(model, model, task(), task(10, 1), RECIPE, make_compute("fp32"))
    assert task_of.val_inputs is not None
    chosen = torch.tensor([7, 2])
    for inputs, part in ((task_of.inputs(chosen, 1), task()), (task_of.val_inputs(chosen), task(10, 1))):
        with torch.no_grad():
            expected = model(part.normalised(part.pixels[chosen]))
            torch.testing.assert_close(task_of.network(inputs), expected, rtol=1e-5, atol=1e-6)


def test_the_command_line_trains_the_last_blocks(tmp_path: Path) -> None:
    data, out = draw(tmp_path / "data", 10), tmp_path / "adapter"
    words = ["train", data, *SMALL, "--epochs", "1", "--out"]
    assert succeed(*words, out, "--method", "lora", "--last-blocks", "1")["kept_bytes"] > 0
    assert json.loads((out / CONFIG).read_text())["method_config"]["last_blocks"] == 1
    assert "6 blocks; take at most 6" in fail(*words, tmp_path / "other", "--method", "lora", "--last-blocks", "99")
    assert "has no effect on linear" in fail(*words, tmp_path / "other", "--method", "linear", "--last-blocks", "1")
    grown = ["train", data, "--epochs", "1", "--init-from", out, "--out", tmp_path / "grown"]
    assert "--last-blocks cannot change with --init-from" in fail(*grown, "--last-blocks", "2")
    assert succeed(*grown)["kept_bytes"] > 0
