"""Convpass, ARC and VPT against plain computations of their formulas; the published counts of them and of FacT."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import timm
import torch
from support import CLASSES, family, fitted, images, logits, size_of, vit
from torch import Tensor, nn

from visgraft import LinearConfig, MethodConfig, attach, count_parameters, list_methods, merge
from visgraft.core.attach import assemble
from visgraft.core.attached import get_attached
from visgraft.core.method import Grid, Place, Position
from visgraft.errors import MergeError, VisgraftError
from visgraft.export.affine import probe
from visgraft.methods.arc import ARCConfig
from visgraft.methods.convpass import ConvpassConfig
from visgraft.methods.fact import FacTConfig
from visgraft.methods.vpt import VPTDeepConfig, VPTShallowConfig

COUNTS = [
    ("vit_base_patch16_224", ConvpassConfig(), 327_552),
    ("vit_base_patch16_224", ConvpassConfig(places=("attn",)), 327_552 // 2),
    ("vit_base_patch16_224", FacTConfig(), 61_440),
    ("vit_base_patch16_224", FacTConfig(proj_reads="input"), 61_440),
    ("vit_base_patch16_224", FacTConfig(form="tucker"), 30_976),
    ("vit_base_patch16_224", FacTConfig(form="tucker", rank=32), 86_528),
    ("vit_base_patch16_224", FacTConfig(targets=("qkv",), rank=4), 2 * 768 * 4 + 36 * 4**2),
    ("vit_base_patch16_224", FacTConfig(form="tucker", targets=("fc2",), rank=4), 2 * 768 * 4 + 4 * 48 + 4**3),
    ("vit_large_patch16_224", FacTConfig(), 2 * 1024 * 16 + 24 * 12 * 16**2),
    ("vit_base_patch16_224", ARCConfig(), 96_432),
    ("vit_base_patch16_224", ARCConfig(bias=False), 96_432 - 24 * 768),
    ("vit_base_patch16_224", ARCConfig(places=("attn.in",)), 96_432 // 2),
    ("vit_base_patch16_224", VPTShallowConfig(), 10 * 768),
    ("vit_base_patch16_224", VPTDeepConfig(), 12 * 10 * 768),
    ("vit_base_patch16_224", VPTDeepConfig(prompts=3), 12 * 3 * 768),
]
GRID = Grid(3, 4, 2)
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}


def alone(config: MethodConfig, positions: Sequence[Position], seed: int = 0) -> tuple[list[Any], Mapping[str, Any]]:
    """The method's modules at these positions, off their start and in float64, and what they share; no backbone."""
    method = list_methods()[config.method]
    torch.manual_seed(seed)
    shared = method.shared(config, positions)
    modules = [method(config, position, shared) for position in positions]
    everything = nn.ModuleList([*modules, *shared.values()]).double().eval()
    with torch.no_grad():
        for parameter in everything.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return modules, shared


def tokens(grid: Grid, width: int, batch: int = 2, seed: int = 0) -> Tensor:
    count = grid.prefix_tokens + grid.height * grid.width
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("name", "config", "count"), COUNTS, ids=[f"{n}-{c.method}-{k}" for n, c, k in COUNTS])
def test_counts_are_the_published_ones(name: str, config: MethodConfig, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
    assert count_parameters(assemble(model, config)).adapter == count


# Convpass


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def bypass(module: Any, x: Tensor, grid: Grid) -> Tensor:
    """Convpass token by token: each patch sums its neighbours on the grid, each prefix token has none."""
    hidden = quick_gelu(x @ module.down.weight.T + module.down.bias)
    kernel, bias, start = module.conv.weight, module.conv.bias, grid.prefix_tokens
    convolved = []
    for token in range(hidden.shape[1]):
        total = bias.expand(len(x), -1)
        row, column = divmod(token - start, grid.width)
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                inside = 0 <= row + down < grid.height and 0 <= column + right < grid.width
                alone_there = down == right == 0
                if alone_there or (token >= start and inside):
                    neighbour = hidden[:, token + down * grid.width + right]
                    total = total + neighbour @ kernel[:, :, 1 + down, 1 + right].T
        convolved.append(total)
    return module.scale * (quick_gelu(torch.stack(convolved, dim=1)) @ module.up.weight.T + module.up.bias)


@pytest.mark.parametrize("grid", [GRID, Grid(2, 5, 0), Grid(1, 1, 3)])
def test_convpass_convolves_patches_on_their_grid_and_prefix_tokens_alone(grid: Grid) -> None:
    config = ConvpassConfig(bottleneck=3, scale=0.7)
    (module,), _ = alone(config, [Position(0, Place("attn.in", "stream.mid"), 6, 6)])
    x = tokens(grid, 6)
    with torch.no_grad():
        torch.testing.assert_close(module.delta(x, grid), bypass(module, x, grid), **EXACT)


@pytest.mark.parametrize("variant", ["layer_scale", "registers", "no_class_token"])
def test_convpass_reads_the_norms_and_adds_to_the_stream_outside_layer_scale(variant: str) -> None:
    """Against a hand-written forward of the blocks."""
    model = fitted(ConvpassConfig(bottleneck=2, scale=2.0), variant).double()
    attached, x = get_attached(model), images(2, dtype=torch.float64)
    grid = Grid(4, 4, model.num_prefix_tokens)
    plain = vit(variant).double()
    with torch.no_grad():
        stream = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
        for number, block in enumerate(plain.blocks):
            beside_attention = attached.positions[f"{number}_attn_in_to_stream_mid"]
            beside_mlp = attached.positions[f"{number}_mlp_in_to_stream_out"]
            normed = block.norm1(stream)
            stream = stream + block.ls1(block.attn(normed)) + bypass(beside_attention, normed, grid)
            normed = block.norm2(stream)
            stream = stream + block.ls2(block.mlp(normed)) + bypass(beside_mlp, normed, grid)
        torch.testing.assert_close(model.forward_features(x), plain.norm(stream), **EXACT)


def test_convpass_starts_with_the_kernels_centre_or_xavier() -> None:
    place = Position(0, Place("attn.in", "stream.mid"), 32, 32)
    for init in ("centre", "xavier"):
        torch.manual_seed(0)
        module: Any = list_methods()["convpass"](ConvpassConfig(init=init), place, {})
        x = torch.randn(2, 8, 3, 3)
        bound = math.sqrt(6 / (2 * 8 * 9))
        with torch.no_grad():
            assert torch.equal(module.conv(x), x) == (init == "centre")
            assert module.down.weight.abs().max() <= math.sqrt(6 / 40)
            assert module.delta(torch.randn(2, 17, 32), Grid(4, 4, 1)).abs().max() == 0
        if init == "xavier":
            assert 0.8 * bound < module.conv.weight.abs().max() <= bound


# ARC


def test_arc_re_scales_one_projection_in_each_layer() -> None:
    config = ARCConfig(bottleneck=3)
    positions = [Position(b, Place(s, s), w, w) for b, w in ((0, 6), (1, 6), (2, 8)) for s in ("attn.in", "mlp.in")]
    modules, shared = alone(config, positions)
    assert set(shared) == {f"projection_{place}_{width}" for place in ("attn_in", "mlp_in") for width in (6, 8)}
    for module, position in zip(modules, positions, strict=True):
        place, width = position.place.reads.replace(".", "_"), position.reads_width
        projection = shared[f"projection_{place}_{width}"].weight
        dense = projection @ torch.diag(module.coefficients) @ projection.T
        x = tokens(GRID, width)
        with torch.no_grad():
            torch.testing.assert_close(module.delta(x, GRID), x @ dense + module.bias, **EXACT)


def test_arc_rewrites_what_enters_attention_and_mlp() -> None:
    model, plain = fitted(ARCConfig(bottleneck=4)).double(), vit().double()
    attached, x = get_attached(model), images(2, dtype=torch.float64)

    def adapted(number: int, place: str, x: Tensor) -> Tensor:
        module: Any = attached.positions[f"{number}_{place}"]
        projection = attached.shared[f"projection_{place}_32"].weight
        return x + (x @ projection * module.coefficients) @ projection.T + module.bias

    with torch.no_grad():
        stream = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
        for number, block in enumerate(plain.blocks):
            stream = stream + block.attn(adapted(number, "attn_in", block.norm1(stream)))
            stream = stream + block.mlp(adapted(number, "mlp_in", block.norm2(stream)))
        torch.testing.assert_close(model.forward_features(x), plain.norm(stream), **EXACT)
    for key, module in attached.positions.items():
        found = probe(module, attached.where[key], Grid(4, 4, 1), attached.shared)
        torch.testing.assert_close(found.shift, module.bias.detach(), rtol=1e-12, atol=1e-12)


def test_arc_starts_as_its_option_says() -> None:
    bound = math.sqrt(6 / 51)
    for init, at_random in (("mixed", {"mlp.in"}), ("xavier", {"attn.in", "mlp.in"}), ("zero", set())):
        model = attach(vit(), ARCConfig(init=init))
        attached = get_attached(model)
        for key, position in attached.where.items():
            coefficients = attached.positions[key].coefficients
            assert (coefficients.abs().max() > 0) == (position.place.reads in at_random)
            assert coefficients.abs().max() <= bound
        assert torch.equal(logits(model), logits(vit())) == (init == "zero")
    assert ARCConfig(places=("attn.in",)).starts_as_identity and ARCConfig(init="zero").starts_as_identity
    assert not ARCConfig().starts_as_identity


# VPT


def with_prompts(x: Tensor, prompts: Tensor, prefix: int) -> Tensor:
    rows = [torch.cat((image[:prefix], prompts, image[prefix:])) for image in x]
    return torch.stack(rows)


@pytest.mark.parametrize("variant", ["plain", "registers", "no_class_token", "layer_scale"])
def test_vpt_shallow_carries_its_prompts_through_all_blocks(variant: str) -> None:
    model, plain = fitted(VPTShallowConfig(prompts=3), variant).double(), vit(variant).double()
    plain.head.load_state_dict(model.head.state_dict())
    (module,), prefix, x = (
        get_attached(model).positions.values(),
        plain.num_prefix_tokens,
        images(2, dtype=torch.float64),
    )
    with torch.no_grad():
        stream = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
        stream = with_prompts(stream, module.prompts, prefix)
        for block in plain.blocks:
            stream = block(stream)
        kept = [token for token in range(stream.shape[1]) if not prefix <= token < prefix + 3]
        stream = plain.norm(stream[:, kept])
        torch.testing.assert_close(model.forward_features(x), stream, **EXACT)
        torch.testing.assert_close(model(x), plain.forward_head(stream), **EXACT)


@pytest.mark.parametrize("variant", ["plain", "registers", "no_class_token"])
def test_vpt_deep_replaces_the_prompts_before_every_block(variant: str) -> None:
    model, plain = fitted(VPTDeepConfig(prompts=3), variant).double(), vit(variant).double()
    prefix, x = plain.num_prefix_tokens, images(2, dtype=torch.float64)
    first, *later = get_attached(model).positions.values()
    assert len(later) == 2
    with torch.no_grad():
        stream = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
        stream = plain.blocks[0](with_prompts(stream, first.prompts, prefix))
        for block, module in zip(plain.blocks[1:], later, strict=True):
            stream[:, prefix : prefix + 3] = module.prompts  # what became of the last block's is overwritten
            stream = block(stream)
        kept = torch.cat((stream[:, :prefix], stream[:, prefix + 3 :]), dim=1)
        torch.testing.assert_close(model.forward_features(x), plain.norm(kept), **EXACT)


def test_prompts_leave_the_rotary_positions_of_the_patches_alone() -> None:
    model, plain = fitted(VPTDeepConfig(prompts=3), "dinov3").double(), family("dinov3").double()
    prefix, x = plain.num_prefix_tokens, images(2, dtype=torch.float64, size=size_of("dinov3"))
    with torch.no_grad():
        stream, rope = plain._pos_embed(plain.patch_embed(x))
        stream = plain.norm_pre(stream)
        for block, module in zip(plain.blocks, get_attached(model).positions.values(), strict=True):
            block.attn.num_prefix_tokens = prefix + 3
            stream = block(with_prompts(stream, module.prompts, prefix), rope=rope)
            stream = torch.cat((stream[:, :prefix], stream[:, prefix + 3 :]), dim=1)
        torch.testing.assert_close(model.forward_features(x), plain.norm(stream), **EXACT)


@pytest.mark.parametrize("grid", [GRID, Grid(3, 4, 0)])
def test_prompts_stand_behind_the_prefix_and_leave_no_trace(grid: Grid) -> None:
    (module,), _ = alone(VPTDeepConfig(prompts=5), [Position(0, Place("tokens.in", "tokens.out"), 6, 6)])
    x = tokens(grid, 6)
    with torch.no_grad():
        inserted = module.insert(x, grid)
        assert module.tokens() == 5
        assert torch.equal(inserted, with_prompts(x, module.prompts, grid.prefix_tokens))
        assert torch.equal(module.remove(inserted, grid), x)
        assert module.insert(x.bfloat16(), grid).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [VPTShallowConfig(prompts=50), VPTDeepConfig(prompts=50)])
def test_prompts_start_within_the_papers_bound_on_vit_b(config: MethodConfig) -> None:
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    kind = list_methods()[config.method]
    torch.manual_seed(0)
    module: Any = kind(config, Position(0, Place("tokens.in", "tokens.out"), 768, 768), {})
    assert 0.99 * bound < module.prompts.abs().max() <= bound
    assert abs(module.prompts.mean()) < 0.01 * bound


def test_vpt_refuses_to_merge() -> None:
    for config in (VPTShallowConfig(prompts=2), VPTDeepConfig(prompts=2)):
        with pytest.raises(MergeError):
            merge(fitted(config))


# All


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convpass", {"bottleneck": 0}, "bottleneck is 0"),
        ("convpass", {"scale": 0.0}, r"scale is 0\.0"),
        ("convpass", {"dropout": 1.0}, r"dropout is 1\.0"),
        ("convpass", {"places": []}, "places is empty; name at least one of attn, mlp"),
        ("convpass", {"places": ["mpl"]}, "did you mean mlp"),
        ("convpass", {"init": "center"}, "did you mean centre"),
        ("fact", {"form": "tucket"}, "did you mean tucker"),
        ("fact", {"rank": 0}, "rank is 0"),
        ("fact", {"scale": -1.0}, r"scale is -1\.0"),
        ("fact", {"dropout": -0.1}, r"dropout is -0\.1"),
        ("fact", {"targets": []}, "targets is empty; name at least one of qkv, proj, fc1, fc2"),
        ("fact", {"targets": ["q"]}, "targets is 'q'"),
        ("fact", {"proj_reads": "output"}, "proj_reads is 'output'"),
        ("arc", {"bottleneck": 0}, "bottleneck is 0"),
        ("arc", {"dropout": 1.5}, r"dropout is 1\.5"),
        ("arc", {"places": []}, r"places is empty; name at least one of attn\.in"),
        ("arc", {"init": "random"}, "init is 'random'"),
        ("vpt_shallow", {"prompts": 0}, "prompts is 0"),
        ("vpt_deep", {"prompts": -1}, "prompts is -1"),
        ("vpt_deep", {"dropout": 1.0}, r"dropout is 1\.0"),
        ("vpt_deep", {"prompt": 5}, "did you mean prompts"),
    ],
)
def test_bad_options_are_refused_in_one_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(VisgraftError, match=message) as caught:
        list_methods()[name].Config.from_dict(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        ConvpassConfig(dropout=0.5), FacTConfig(dropout=0.5), FacTConfig(form="tucker", dropout=0.5),
        ARCConfig(dropout=0.5), VPTShallowConfig(dropout=0.5), VPTDeepConfig(dropout=0.5),
    ],
    ids=lambda config: config.method,
)  # fmt: skip
def test_dropout_acts_in_training_only(config: MethodConfig) -> None:
    model = fitted(config)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("config", [FacTConfig(), FacTConfig(form="tucker"), ARCConfig()], ids=lambda c: c.method)
def test_what_is_shared_is_registered_once(config: MethodConfig) -> None:
    model = fitted(config)
    shared = {id(p) for p in get_attached(model).shared.parameters()}
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in shared]
    assert len(names) == len(shared) and all(name.startswith("visgraft.shared.") for name in names)
    head = count_parameters(attach(vit(), LinearConfig())).head
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model).adapter == trained - head
