"""SCT: the scores against a naive computation, what they depend on, the two forms, and the published counts."""

from pathlib import Path

import pytest
import timm
import torch
from support import batches, fitted, images, logits, vit
from torch import Tensor

from visgraft import SCTConfig, attach, count_parameters, load, merge, salient_channels, save
from visgraft.core.attach import assemble
from visgraft.core.attached import get_attached
from visgraft.errors import VisgraftError
from visgraft.methods.salience import _class_agnostic, _class_aware, channel_squares
from visgraft.methods.sct import SCT

COUNTS = [
    ("vit_base_patch16_224", SCTConfig(), 111_744),
    ("vit_base_patch16_224", SCTConfig(channels=32), 12_672),
    ("vit_base_patch16_224", SCTConfig(channels=192), 444_672),
    ("vit_large_patch16_224", SCTConfig(channels=96), 223_488),
    ("vit_large_patch16_224", SCTConfig(), 396_288),
    ("vit_huge_patch14_224", SCTConfig(), 824_320),
    ("vit_base_patch16_224", SCTConfig(channels=96, mode="qkv"), 223_488),
    ("vit_base_patch16_224", SCTConfig(mode="qkv"), 223_488),
]


def features(model: torch.nn.Module, x: Tensor, site: str) -> list[Tensor]:
    """A site's tensor in every block, written out from timm's block: [images, tokens, channels] in float64."""
    found = []
    with torch.no_grad():
        stream = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks:
            q, _, v = block.attn.qkv(block.norm1(stream)).chunk(3, dim=-1)
            middle = stream + block.ls1(block.attn(block.norm1(stream)))
            stream = middle + block.ls2(block.mlp(block.norm2(middle)))
            found.append({"stream.mid": middle, "stream.out": stream, "attn.q": q, "attn.v": v}[site])
    return found


def naive_scores(model: torch.nn.Module, task: list[tuple[Tensor, Tensor]], site: str, aware: bool) -> list[Tensor]:
    """The score as the paper words it, image by image in float64."""
    scores = []
    for number in range(len(model.blocks)):
        per_class: dict[int, Tensor] = {}
        for x, y in task:
            for image, label in zip(x, y.tolist(), strict=True):
                h = features(model, image[None].double(), site)[number][0, model.num_prefix_tokens :]
                per_class[label if aware else 0] = per_class.get(label if aware else 0, 0) + (h**2).sum(dim=0)
        norms = [per_class[label].sqrt() for label in sorted(per_class)]
        scores.append(torch.stack(norms).mean(dim=0))
    return scores


@pytest.mark.parametrize("site", ["stream.mid", "stream.out", "attn.q", "attn.v"])
@pytest.mark.parametrize("score", ["class_aware", "class_agnostic", "lowest"])
@pytest.mark.parametrize("variant", ["plain", "registers", "no_class_token", "layer_scale"])
def test_scores_are_those_of_a_naive_float64_computation(variant: str, score: str, site: str) -> None:
    model = vit(variant).double()
    task = [(x.double(), y) for x, y in batches(15)]
    task[1] = (task[1][0], task[1][1].clamp_max(2))  # classes of unequal size
    chosen = salient_channels(model, task, 6, site, score)
    for index, naive in zip(chosen, naive_scores(model, task, site, score != "class_agnostic"), strict=True):
        order = naive.sort(descending=score != "lowest")
        assert (order.values[5] - order.values[6]).abs() > 1e-6 * order.values[0], "a tie would make this test luck"
        assert torch.equal(index, order.indices[:6].sort().values)


def test_class_awareness_prefers_what_answers_to_every_class() -> None:
    """Channel 2 answers to both classes; one norm over all images would rank it last."""
    sums = {0: torch.tensor([81.0, 0.0, 36.0]), 1: torch.tensor([0.0, 100.0, 36.0])}
    assert _class_aware(sums).tolist() == [4.5, 5.0, 6.0]
    assert _class_agnostic(sums).tolist() == pytest.approx([9.0, 10.0, 72**0.5])


def test_scores_do_not_depend_on_order_or_batching() -> None:
    model = vit()
    x, y = images(70), torch.arange(70) % 5
    shuffle = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    whole = channel_squares(model, [(x, y)], "stream.mid")
    ones = channel_squares(model, zip(x.split(1), y.split(1), strict=True), "stream.mid")
    shuffled = channel_squares(model, zip(x[shuffle].split(9), y[shuffle].split(9), strict=True), "stream.mid")
    for block, same, other in zip(whole, ones, shuffled, strict=True):
        assert all(torch.equal(block[label], same[label]) for label in range(5))
        for label in range(5):
            torch.testing.assert_close(block[label], other[label], rtol=1e-6, atol=0)


def test_prefix_tokens_are_not_scored() -> None:
    """Something added to prefix tokens alone, in the last block, changes no score."""
    model, task = vit("registers"), batches()
    before = salient_channels(model, task, 6)

    def shout(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, : model.num_prefix_tokens] += 1e3
        return output

    model.blocks[-1].drop_path1.register_forward_hook(shout)
    assert all(torch.equal(a, b) for a, b in zip(salient_channels(model, task, 6), before, strict=True))


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = vit("drop_path").train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    salient_channels(model, batches(), 4)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_random_channels_need_no_images_and_lowest_is_the_other_end() -> None:
    model, task = vit(), batches()
    torch.manual_seed(0)
    first, second = (salient_channels(model, None, 16, score="random") for _ in range(2))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    high, low = (salient_channels(model, task, 16, score=s) for s in ("class_aware", "lowest"))
    assert all(sorted(torch.cat(pair).tolist()) == list(range(32)) for pair in zip(high, low, strict=True))


def test_images_are_brought_to_the_models_precision() -> None:
    expected = salient_channels(vit().double(), [(x.double(), y) for x, y in batches()], 6)
    found = salient_channels(vit().double(), batches(), 6)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 33}, "channels is 33"),
        ({"channels": 0}, "channels is 0"),
        ({"channels": 4, "score": "best"}, "unknown score"),
        ({"channels": 4, "site": "nowhere"}, "cannot be scored at 'nowhere'; this backbone has attn.in"),
        ({"channels": 4, "site": "nowhere", "score": "random"}, "cannot be scored at 'nowhere'"),
    ],
)
def test_bad_scoring_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(VisgraftError, match=message):
        salient_channels(vit(), batches(), **options)


def test_attaching_needs_the_tasks_images() -> None:
    for empty in (None, []):
        model = vit()
        with pytest.raises(VisgraftError, match="batches"):
            attach(model, SCTConfig(), empty)
        assert not hasattr(model, "visgraft") and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("mode", ["attn", "mlp"])
@pytest.mark.parametrize(("form", "scale"), [("A", 1.0), ("A", 0.3), ("B", 0.3), ("B", 1.0)])
def test_the_forms_are_the_papers(form: str, scale: float, mode: str) -> None:
    """Against the block written out: the chosen channels of all tokens, the class token included, are rewritten."""
    config = SCTConfig(form=form, scale=scale, mode=mode)
    model, plain = fitted(config).double(), vit().double()
    plain.head.load_state_dict(model.head.state_dict())
    modules = list(get_attached(model).positions.values())

    def tuned(h: Tensor, module: torch.nn.Module) -> Tensor:
        z, (w, b) = h[..., module.index], (module.linear.weight, module.linear.bias)
        new = z + scale * (z @ w.T + b) if form == "A" else scale * z + z @ w.T + b
        out = h.clone()
        out[..., module.index] = new
        return out

    x = images(dtype=torch.float64)
    with torch.no_grad():
        stream = plain._pos_embed(plain.patch_embed(x))
        for block, module in zip(plain.blocks, modules, strict=True):
            stream = stream + block.attn(block.norm1(stream))
            stream = tuned(stream, module) if mode == "attn" else stream
            branch = block.mlp(block.norm2(stream))
            stream = stream + (tuned(branch, module) if mode == "mlp" else branch)
        expected = plain.forward_head(plain.norm(stream))
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "qk_norm", "registers"])
def test_mode_qkv_adds_to_queries_and_values(variant: str) -> None:
    """Against a plain model whose qkv projection is wrapped: z + Wz + b on K channels of q, and others of v."""
    model, plain = fitted(SCTConfig(mode="qkv"), variant).double(), vit(variant).double()
    plain.head.load_state_dict(model.head.state_dict())
    places = get_attached(model).positions
    for number, block in enumerate(plain.blocks):
        pair = [places[f"{number}_attn_q"], places[f"{number}_attn_v"]]

        def tuned(layer: torch.nn.Module, args: tuple, output: Tensor, pair: list = pair) -> Tensor:
            parts = list(output.clone().chunk(3, dim=-1))
            for which, module in zip((0, 2), pair, strict=True):
                z = parts[which][..., module.index]
                parts[which][..., module.index] = z + z @ module.linear.weight.T + module.linear.bias
            return torch.cat(parts, dim=-1)

        block.attn.qkv.register_forward_hook(tuned)
    x = images(dtype=torch.float64)
    torch.testing.assert_close(logits(model, x), logits(plain, x), rtol=1e-10, atol=1e-10)


def test_mode_qkv_chooses_queries_and_values_apart_in_one_pass() -> None:
    task, plain = batches(), vit()
    model = attach(vit(), SCTConfig(mode="qkv"), iter(task))  # an iterator can be gone through once only
    for site in ("attn.q", "attn.v"):
        expected = salient_channels(plain, task, 4, site)
        for number, index in enumerate(expected):
            key = f"{number}_{site.replace('.', '_')}"
            assert torch.equal(get_attached(model).positions[key].index, index)
    assert not torch.equal(torch.stack(salient_channels(plain, task, 4, "attn.q")), torch.stack(expected))


def test_mode_qkv_folds_into_the_projection() -> None:
    model, plain = fitted(SCTConfig(mode="qkv")).double(), vit().double()
    merged, certificate = merge(model, images(dtype=torch.float64))
    assert certificate.max_abs_difference <= certificate.fold_tolerance
    changed = {
        name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, plain.state_dict()[name])
    }
    assert {name.split(".", 2)[2] for name in changed if "head" not in name} == {"attn.qkv.weight", "attn.qkv.bias"}
    k = slice(32, 64)  # the rows of the keys
    assert torch.equal(merged.blocks[0].attn.qkv.weight[k], plain.blocks[0].attn.qkv.weight[k])


@pytest.mark.parametrize("given", [{"scale": 1.0}, {"scale": 0.5}, {"form": "A"}, {"form": "B"}])
def test_mode_qkv_refuses_what_it_does_not_have(given: dict) -> None:
    (name, value) = next(iter(given.items()))
    with pytest.raises(VisgraftError, match=f"{name} is {value}, but mode qkv"):
        SCTConfig(mode="qkv", **given)


def test_earlier_adapters_load_and_defaults_are_stored_as_before(tmp_path: Path) -> None:
    for stored in ({"channels": None, "mode": None, "form": "A", "scale": 1.0, "score": "class_aware"}, {}):
        config = SCTConfig.from_dict(stored)
        assert (config.form, config.scale) == ("A", 1.0)
    assert SCTConfig().to_dict() == SCTConfig(form="A", scale=1.0).to_dict()
    model = fitted(SCTConfig(mode="qkv"))
    save(model, tmp_path / "adapter")
    again = load(tmp_path / "adapter", backbone=vit()).model
    assert get_attached(again).config == SCTConfig(mode="qkv")
    assert torch.equal(logits(again), logits(model))


def test_without_the_place_of_mode_attn_the_mlps_output_is_taken_but_never_qkv() -> None:
    alone = [SCT.placements(SCTConfig(mode=mode)) for mode in ("attn", "mlp")]
    assert SCT.placements(SCTConfig()) == alone[0] + alone[1]


def test_where_images_have_several_classes_each_counts_for_all_of_its_classes() -> None:
    model = vit()
    x, labels = images(5), torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 1]]).float()
    sums = channel_squares(model, [(x, labels)], "stream.mid")[1]
    whole = channel_squares(model, [(x, torch.zeros(5, dtype=torch.long))], "stream.mid")[1]
    each = channel_squares(model, [(x, torch.arange(5))], "stream.mid")[1]  # one class per image
    torch.testing.assert_close(_class_agnostic(sums), _class_agnostic(whole))
    expected = ((each[0] + each[1]).sqrt() + (each[1] + each[2] + each[4]).sqrt()) / 2
    torch.testing.assert_close(_class_aware(sums), expected)
    with pytest.raises(VisgraftError, match="none of the images has a class"):
        salient_channels(model, [(x, torch.zeros(5, 3))], 4)
    assert len(salient_channels(model, [(x, torch.zeros(5, 3))], 4, score="class_agnostic")) == 3


@pytest.mark.parametrize("mode", ["attn", "mlp"])
def test_with_w_zero_the_model_answers_bit_for_bit_as_before(mode: str) -> None:
    model = attach(vit(), SCTConfig(mode=mode), batches())
    for module in get_attached(model).positions.values():
        torch.nn.init.zeros_(module.linear.weight)
    assert torch.equal(logits(model), logits(vit()))


def test_channels_come_from_the_plain_network_in_ascending_order() -> None:
    """Earlier blocks' modules, random at the start, must not shift what later blocks choose."""
    expected = salient_channels(vit(), batches(), 4)
    modules = get_attached(attach(vit(), SCTConfig(), batches())).positions.values()
    for module, index in zip(modules, expected, strict=True):
        assert torch.equal(module.index, index) and torch.equal(index, index.sort().values)


@pytest.mark.parametrize(("name", "config", "count"), COUNTS, ids=[f"{n}-{c.channels}-{c.mode}" for n, c, _ in COUNTS])
def test_counts_are_the_published_ones(name: str, config: SCTConfig, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert count_parameters(assemble(model, config)).adapter == count
