"""Where the sites are: the tensor that passes is the one that the row's name promises, and a wrong row is refused."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CONFIGS, DEFAULTS, FAMILIES, VARIANTS, batches, family, images, logits, size_of, vit
from timm.models.mlp_mixer import MixerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft import attach, list_methods
from visgraft.core.dryrun import prove_sites
from visgraft.core.families import BLOCKS, _mixer_block, _open_block, _swin_block
from visgraft.core.finding import find_sites
from visgraft.core.method import Grid
from visgraft.core.sites import Neighbour, Site
from visgraft.core.taps import Taps
from visgraft.core.tensors import CHILD
from visgraft.errors import SiteError

WITH_SITES = [name for name in DEFAULTS if list_methods()[CONFIGS[name].method].placements(CONFIGS[name])]


class Note:
    """Act that remembers what passes, once."""

    def __init__(self, seen: dict[Any, Tensor], key: Any) -> None:
        self.seen, self.key = seen, key

    def __call__(self, value: Tensor, onto: Tensor, grid: Grid) -> Tensor:
        assert self.key not in self.seen
        assert value.ndim == 3
        self.seen[self.key] = value
        return onto


def every_site(model: nn.Module) -> list[Site]:
    found = find_sites(model)
    return [*(site for sites in found.blocks for site in sites.values()), *found.outside.values()]


def look(model: nn.Module, x: Tensor) -> dict[Any, Tensor]:
    """Return what passes each site as tokens: {(block, name): [B, N, C]}."""
    seen: dict[Any, Tensor] = {}
    apart = {site.separate_bias for site in every_site(model) if site.separate_bias}
    for path in apart:
        model.get_submodule(path).qkv_bias_separate = True
    taps = Taps()
    for site in every_site(model):
        taps.put(model, site, Note(seen, (site.block, site.name)))
    logits(model, x)
    taps.remove()
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_is_the_tensor_its_row_names(variant: str) -> None:
    model, x = vit(variant), images(2)
    seen = look(model, x)
    with torch.no_grad():
        stream = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for number, block in enumerate(model.blocks):
            attended = block.attn(block.norm1(stream))
            middle = stream + block.ls1(attended)
            branch = block.mlp(block.norm2(middle))
            expected = {
                "attn.in": block.norm1(stream), "attn.out": attended, "stream.mid": middle,
                "mlp.in": block.norm2(middle), "mlp.out": branch, "attn.qkv": block.attn.qkv(block.norm1(stream)),
            }  # fmt: skip
            expected |= {"stream.in": stream, "norm1.out": expected["attn.in"], "norm2.out": expected["mlp.in"]}
            stream = middle + block.ls2(branch)
            expected["stream.out"] = stream
            for name, tensor in expected.items():
                torch.testing.assert_close(seen.pop((number, name)), tensor, msg=f"{name} of block {number}")
        torch.testing.assert_close(seen[None, "patch.out"], model.patch_embed(x))


def tokens(x: Tensor, channels_first: bool = False) -> Tensor:
    """[B, H, W, C] or [B, C, H, W] as [B, N, C]."""
    x = x.permute(0, 2, 3, 1) if channels_first else x
    return x.flatten(1, -2)


def swin(block: Any, x: Tensor) -> dict[str, Tensor]:
    normed = block.norm1(x)
    attended = block._attn(normed)
    middle = tokens(x + attended)
    return {
        "attn.in": tokens(normed), "norm1.out": tokens(normed), "attn.out": tokens(attended), "stream.mid": middle,
        "mlp.in": block.norm2(middle), "mlp.out": block.mlp(block.norm2(middle)),
        "stream.out": middle + block.mlp(block.norm2(middle)),
    }  # fmt: skip


def swin_v2(block: Any, x: Tensor) -> dict[str, Tensor]:
    attended = block._attn(x)
    middle = tokens(x + block.norm1(attended))
    branch = block.mlp(middle)
    return {
        "attn.out": tokens(attended), "norm1.out": tokens(block.norm1(attended)), "stream.mid": middle,
        "mlp.in": middle, "mlp.out": branch, "norm2.out": block.norm2(branch),
        "stream.out": middle + block.norm2(branch),
    }  # fmt: skip


def convnext(block: Any, x: Tensor) -> dict[str, Tensor]:
    normed = block.norm(block.conv_dw(x).permute(0, 2, 3, 1))
    branch = block.mlp(normed)
    out = x + (branch * block.gamma).permute(0, 3, 1, 2)
    return {
        "mlp.in": tokens(normed), "norm2.out": tokens(normed), "mlp.hidden": tokens(block.mlp.fc1(normed)),
        "mlp.out": tokens(branch), "stream.out": tokens(out, channels_first=True),
    }  # fmt: skip


def mixer(block: Any, x: Tensor) -> dict[str, Tensor]:
    middle = x + block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2)
    normed = block.norm2(middle)
    return {"stream.mid": middle, "mlp.in": normed, "stream.out": middle + block.mlp_channels(normed)}


def resmlp(block: Any, x: Tensor) -> dict[str, Tensor]:
    middle = x + block.ls1 * block.linear_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2)
    branch = block.mlp_channels(block.norm2(middle))
    return {"stream.mid": middle, "mlp.out": branch, "stream.out": middle + block.ls2 * branch}


def as_mlp(block: Any, x: Tensor) -> dict[str, Tensor]:
    def seen(x: Tensor) -> Tensor:
        return tokens(x, channels_first=True)

    shifted = block.axial_shift(block.norm1(x))
    middle = x + shifted
    branch = block.mlp(block.norm2(middle))
    return {
        "attn.in": seen(block.norm1(x)), "norm1.out": seen(block.norm1(x)), "attn.out": seen(shifted),
        "stream.mid": seen(middle), "mlp.in": seen(block.norm2(middle)), "norm2.out": seen(block.norm2(middle)),
        "mlp.hidden": seen(block.mlp.fc1(block.norm2(middle))), "mlp.out": seen(branch),
        "stream.out": seen(middle + branch),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected_sites"),
    [("swin", swin), ("swin_padded", swin), ("swin_v2", swin_v2), ("convnext", convnext), ("mixer", mixer),
     ("resmlp", resmlp), ("as_mlp", as_mlp)],
)  # fmt: skip
def test_sites_of_other_families(name: str, expected_sites: Callable[[Any, Tensor], dict[str, Tensor]]) -> None:
    """Every block, given what entered it, computes by hand what passed its sites."""
    model, x = family(name), images(2, size=size_of(name))
    entered: list[tuple[Any, Tensor]] = []
    for module in model.modules():
        if type(module) in BLOCKS:
            module.register_forward_pre_hook(lambda module, args: entered.append((module, args[0])))
    seen = look(model, x)
    assert len(entered) == len(find_sites(model).blocks)
    with torch.no_grad():
        for number, (block, entering) in enumerate(entered):
            for site, tensor in expected_sites(block, entering).items():
                torch.testing.assert_close(seen[number, site], tensor, msg=f"{site} of block {number}")


@pytest.mark.parametrize("name", ["beit", "eva_fused", "eva_unfused", "dinov3", "pe"])
def test_sites_around_scaled_branches(name: str) -> None:
    """The branch counts before its factor, the stream after it; the projection's output with its bias."""
    model = family(name)
    seen = look(model, images(2, size=size_of(name)))
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            attended, branch = seen[number, "attn.out"], seen[number, "mlp.out"]
            first, second = (1 if g is None else g for g in (block.gamma_1, block.gamma_2))
            middle = seen[number, "stream.in"] + first * attended
            torch.testing.assert_close(seen[number, "stream.mid"], middle)
            torch.testing.assert_close(seen[number, "stream.out"], middle + second * branch)
            if name in ("beit", "eva_fused"):
                bias = torch.cat((block.attn.q_bias, block.attn.k_bias, block.attn.v_bias))
                expected = F.linear(block.norm1(seen[number, "stream.in"]), block.attn.qkv.weight, bias)
                torch.testing.assert_close(seen[number, "attn.qkv"], expected)
                torch.testing.assert_close(seen[number, "attn.v"], expected.chunk(3, dim=-1)[2])


@pytest.mark.parametrize("name", [*VARIANTS, *FAMILIES])
def test_every_row_is_proven(name: str) -> None:
    model = family(name)
    prove_sites(model, every_site(model))


def test_the_norm_of_a_post_norm_block_is_not_what_enters_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swin v2 has every name that Swin v1 has, and norm1 runs once per block; still the row is wrong."""
    monkeypatch.setitem(BLOCKS, SwinTransformerV2Block, _swin_block)
    with pytest.raises(SiteError, match=r"attn\.in of block 0 .*does not carry the tensor of layers\.0\.blocks"):
        attach(family("swin_v2"), CONFIGS["alore-0"])


def test_channels_must_be_whole_where_a_layer_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token mixing reads the very tensor that norm1 returns, but along its tokens."""

    def wrong(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
        reads = (Neighbour(f"{path}.mlp_tokens.fc1"),)
        site = Site("attn.in", index, 32, f"{path}.norm1", "output", feeds=reads, grid=grid)
        return [*_mixer_block(block, path, index, grid), site]

    monkeypatch.setitem(BLOCKS, MixerBlock, wrong)
    with pytest.raises(SiteError, match=r"does not carry the tensor of blocks\.0\.mlp_tokens\.fc1"):
        attach(family("mixer"), CONFIGS["alore-0"])


def test_the_middle_of_the_stream_must_be_the_sum_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
        sites = {site.name: site for site in _open_block(block, path, index, grid)}
        middle = sites["stream.mid"]
        sites["stream.mid"] = Site(
            "stream.mid", index, middle.width, f"{path}.drop_path2", "residual", entry=path, next=middle.next, grid=grid
        )
        return list(sites.values())

    monkeypatch.setitem(BLOCKS, Block, wrong)
    with pytest.raises(SiteError, match=r"stream\.mid of block 0"):
        attach(vit(), CONFIGS["sct-0"], batches())


@pytest.mark.parametrize("name", WITH_SITES)
@pytest.mark.parametrize("block", [ResPostBlock, ParallelScalingBlock])
def test_unknown_blocks_are_refused_by_name(name: str, block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, block_fn=block)
    keys = set(model.state_dict())
    with pytest.raises(SiteError, match=block.__name__):
        attach(model, CONFIGS[name], batches())
    assert set(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def bypass_qkv(attn: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Attention that reads the weights of qkv without calling the module, as timm's BEiT does."""
    return attn.proj(F.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)[2])


def bypass_drop_path(block: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """A block that never calls the module after which the stream is read."""
    x = x + block.ls1(block.attn(block.norm1(x)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def post_norm(block: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """A block that normalises after the sum, so what norm2 receives is not the stream."""
    x = block.norm1(x + block.drop_path1(block.ls1(block.attn(x))))
    return x + block.mlp(block.norm2(x))


def change_after_projection(mlp: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """An MLP whose output is not that of its last linear layer: nothing could be folded into it."""
    return mlp.fc2(mlp.act(mlp.fc1(x))) * 2


@pytest.mark.parametrize(
    ("name", "part", "forward"),
    [
        ("lora-0", "attn", bypass_qkv),
        ("sct-0", "", bypass_drop_path),
        ("sct-0", "", post_norm),
        ("sct-1", "mlp", change_after_projection),
        ("alore-1", "mlp", change_after_projection),
    ],
)
def test_a_block_whose_forward_differs_is_refused(name: str, part: str, forward: Callable[..., torch.Tensor]) -> None:
    """Names and hooks are all there; only the identity of the tensors shows that they are in the wrong place."""
    model = vit()
    for block in model.blocks:
        module = block.get_submodule(part)
        module.forward = types.MethodType(forward, module)
    with pytest.raises(SiteError, match="block 0"):
        attach(model, CONFIGS[name], batches())
    assert not hasattr(model, CHILD)


def test_a_model_that_cannot_be_proven_is_refused() -> None:
    model = vit()
    norm = model.blocks[0].norm1
    model.blocks[0].norm1.forward = lambda x: F.layer_norm(x, (32,), norm.weight, norm.bias)
    with pytest.raises(SiteError, match="meta device"):
        attach(model, CONFIGS["alore-0"])
