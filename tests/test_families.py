"""What differs from family to family: published counts, which blocks SCT tunes, scores in windows, missing biases."""

import pytest
import timm
import torch
from support import batches, enliven, family, fitted, images, logits, size_of
from torch.nn import functional as F

from visgraft import ALoREConfig, LoRAConfig, MethodConfig, SCTConfig, SSFConfig, attach, count_parameters, merge
from visgraft.core.attach import assemble
from visgraft.core.attached import get_attached
from visgraft.core.finding import find_sites
from visgraft.errors import MergeError, VisgraftError
from visgraft.export.merge import why_not_merged
from visgraft.methods.salience import SCORE_FUNCTIONS, channel_squares, salient_channels
from visgraft.methods.sct import SCT

COUNTS: list[tuple[str, MethodConfig, int]] = [
    ("swin_base_patch4_window7_224", SCTConfig(), 70_464),
    ("swin_base_patch4_window7_224", SCTConfig(channels=96), 102_432),
    ("swin_base_patch4_window7_224", ALoREConfig(), 192_576),
    ("convnext_base", ALoREConfig(), 288_832),
    ("mixer_b16_224", ALoREConfig(), 147_520),
    ("mixer_b16_224", ALoREConfig(places=("mlp.in",)), 73_792),
    ("swin_base_patch4_window7_224", LoRAConfig(targets=("q", "v")), 2 * 2 * 8 * 12_032),
]


@pytest.mark.parametrize(("name", "config", "count"), COUNTS, ids=[f"{n}-{c.method}-{k}" for n, c, k in COUNTS])
def test_counts_on_other_backbones(name: str, config: MethodConfig, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert count_parameters(assemble(model, config)).adapter == count


@pytest.mark.parametrize(
    ("stages", "blocks"),
    [
        ([0, 0, 1, 1, *[2] * 18, 3, 3], list(range(13, 24))),  # Swin-B: 9 of 18 and 2
        ([0, 0, 1, 1, *[2] * 6, 3, 3], [7, 8, 9, 10, 11]),  # Swin-T: 3 of 6 and 2
        ([0, 1, 2, 2, 2, 3], [3, 4, 5]),  # 2 of 3, rounded up, and 1
        ([0] * 12, list(range(12))),  # no stages
    ],
)
def test_sct_tunes_the_late_blocks_of_four_stages(stages: list[int], blocks: list[int]) -> None:
    assert SCT.spans(SCTConfig(), stages) == [(block, block) for block in blocks]
    assert SCT.spans(SCTConfig(blocks="all"), stages) == [(block, block) for block in range(len(stages))]


def test_sct_takes_an_eighth_of_each_stages_width() -> None:
    model = fitted(SCTConfig(), "swin")
    sizes = {position.block: len(get_attached(model).positions[key].index) for key, position in
             get_attached(model).where.items()}  # fmt: skip
    assert sizes == {3: 64 // 8, 4: 128 // 8}
    plain = family("swin")
    chosen = salient_channels(plain, batches(size=size_of("swin")), None)
    assert [len(index) for index in chosen] == [2, 4, 8, 8, 16]
    for key, position in get_attached(model).where.items():
        assert torch.equal(get_attached(model).positions[key].index, chosen[position.block])


@pytest.mark.parametrize("name", ["swin", "swin_padded", "swin_v2", "convnext", "convnext_conv", "mixer", "beit"])
def test_scores_do_not_depend_on_order_or_batches(name: str) -> None:
    model, (x, y) = family(name), (images(12, 3, size=size_of(name)), torch.arange(12) % 3)
    site = "mlp.out" if "convnext" in name else "stream.mid"
    turned = [(x.flip(0)[:5], y.flip(0)[:5]), (x.flip(0)[5:], y.flip(0)[5:])]
    for one, other in zip(channel_squares(model, [(x, y)], site), channel_squares(model, turned, site), strict=True):
        for label in one:
            torch.testing.assert_close(one[label], other[label], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["swin", "swin_v2", "beit"])
def test_scores_of_values_count_all_windows_of_an_image(name: str) -> None:
    """The sum over windows and tokens of the projection's output, its bias included, computed by hand."""
    model, x, y = family(name), images(4, size=size_of(name)), torch.tensor([0, 1, 1, 0])
    squares = channel_squares(model, [(x, y)], "attn.v")
    path = find_sites(model).blocks[0]["attn.v"].host
    qkv, entered = model.get_submodule(path), []
    attention = model.get_submodule(path.rpartition(".")[0])
    attention.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    before = getattr(attention, "qkv_bias_separate", None)
    logits(model, x)
    bias = qkv.bias if qkv.bias is not None else torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    values = F.linear(entered[0], qkv.weight, bias).chunk(3, dim=-1)[2]
    prefix = getattr(model, "num_prefix_tokens", 0)
    per_image = values[:, prefix:].double().square().sum(1).view(4, -1, values.shape[-1]).sum(1)
    torch.testing.assert_close(squares[0][1], per_image[1:3].sum(0), rtol=1e-5, atol=0)
    assert before == getattr(attention, "qkv_bias_separate", None)
    assert SCORE_FUNCTIONS["class_aware"](squares[0]).shape == (values.shape[-1],)


def test_more_channels_than_the_narrowest_block_has_are_refused() -> None:
    """Of the blocks that are tuned; the early ones of a backbone with stages are not."""
    with pytest.raises(VisgraftError, match=r"channels is 17, but stream\.mid has 1 to 16"):
        attach(family("swin"), SCTConfig(channels=17, blocks="all"), batches(size=64))
    attach(family("swin"), SCTConfig(channels=17), batches(size=64))


def test_a_new_bias_is_made_only_where_it_is_allowed() -> None:
    x = images(4, size=32).double()
    model = fitted(SSFConfig(), "dinov3").double()
    with pytest.raises(MergeError, match=r"adds a constant, but blocks\.0\.attn\.qkv has no bias"):
        merge(model, x)
    merged, _ = merge(model, x, allow_new_bias=True)
    assert (logits(merged, x) - logits(model, x)).abs().max() <= 1e-9 * logits(model, x).abs().max()
    new = set(merged.state_dict()) - set(family("dinov3").state_dict())
    assert new == {f"blocks.{i}.attn.qkv.bias" for i in range(2)}


@pytest.mark.parametrize("name", ["eva_fused", "swin_v2"])
def test_no_new_bias_helps_where_keys_have_none(name: str) -> None:
    """Rotary positions and cosine attention keep a constant on the keys from cancelling; it has no place."""
    model = enliven(attach(family(name), SSFConfig())).double()
    assert "has no bias for keys" in str(why_not_merged(family(name), SSFConfig(), allow_new_bias=True))
    with pytest.raises(MergeError, match="no bias for keys"):
        merge(model, images(2, size=size_of(name)).double(), allow_new_bias=True)


def test_attaching_and_detaching_leaves_attentions_as_they_were() -> None:
    """Some attentions add their bias apart only while something is attached behind their projection."""
    from visgraft import detach

    model = family("beit")
    attach(model, LoRAConfig())
    assert all(block.attn.qkv_bias_separate for block in model.blocks)
    detach(model)
    assert not any(block.attn.qkv_bias_separate for block in model.blocks)
