"""Adapter, AdaptFormer, RepAdapter, SSF, BitFit, LN-Tune and Partial-k against plain computations; published counts."""

import math
from typing import Any

import pytest
import timm
import torch
from support import CLASSES, fitted, images, logits, vit
from torch import Tensor, nn

from visgraft import MethodConfig, attach, count_parameters
from visgraft.core.attach import assemble
from visgraft.core.attached import get_attached
from visgraft.core.method import Grid, Method, OwnTensor, Place, Position
from visgraft.core.registry import get_method
from visgraft.errors import SiteError, VisgraftError
from visgraft.methods.adapter import AdapterConfig
from visgraft.methods.adaptformer import AdaptFormerConfig
from visgraft.methods.bitfit import BitFitConfig
from visgraft.methods.norm import NormConfig
from visgraft.methods.partial import PartialConfig
from visgraft.methods.repadapter import RepAdapterConfig
from visgraft.methods.ssf import SSFConfig

BLOCK, NORMS = 7_087_872, 25 * 2 * 768  # parameters of one block of ViT-B/16, and of its 25 LayerNorms
COUNTS = [
    (AdapterConfig(), 156_768),
    (AdapterConfig(places=("attn.out", "mlp.out"), bottleneck=64), 24 * (2 * 768 * 64 + 64 + 768)),
    (AdapterConfig(norms=True), 156_768 + NORMS),
    (AdaptFormerConfig(), 156_768),
    (AdaptFormerConfig(bottleneck=64, form="sequential"), 12 * (2 * 768 * 64 + 64 + 768)),
    (AdaptFormerConfig(learn_scale=True, norm="before"), 156_768 + 12 * (1 + 2 * 768)),
    (RepAdapterConfig(), 221_184),
    (RepAdapterConfig(bias=True), 239_808),
    (RepAdapterConfig(groups=1, places=("attn.in",)), 12 * 2 * 768 * 8),
    (SSFConfig(), 205_824),
    (SSFConfig(terms="shift"), 102_912),
    (SSFConfig(operations=("embed", "norm")), 2 * 768 * 26),
    (BitFitConfig(), 102_912),
    (NormConfig(), NORMS),
    (PartialConfig(), BLOCK + 2 * 768),
    (PartialConfig(blocks=4), 4 * BLOCK + 2 * 768),
    (PartialConfig(blocks=12), 12 * BLOCK + 2 * 768),
]
GRID = Grid(4, 4, 1)
WIDTH = 32


@pytest.mark.parametrize(("config", "count"), COUNTS, ids=[f"{c.method}-{k}" for c, k in COUNTS])
def test_counts_are_the_closed_forms(config: MethodConfig, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
    assert count_parameters(assemble(model, config)).adapter == count


def module_of(config: Any, alive: bool = True) -> Any:
    """One module of a method in float64 and eval mode, its parameters random unless `alive` is False."""
    torch.manual_seed(0)
    places = get_method(config.method).placements(config)
    module = get_method(config.method)(config, Position(0, places[0][0], WIDTH, WIDTH), {}).double().eval()
    if alive:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return module


def tokens() -> Tensor:
    return torch.randn(2, 17, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def bottleneck(x: Tensor, module: Any, activation: str) -> Tensor:
    """act(x W_d + b_d) W_u + b_u in plain matrix products."""
    hidden = x @ module.down.weight.T + module.down.bias
    if activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    elif activation == "relu":
        hidden = hidden.clamp(min=0)
    return hidden @ module.up.weight.T + module.up.bias


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def dense(module: Any) -> tuple[Tensor, Tensor]:
    """RepAdapter's map as one matrix [C, C] and one shift [C]: the groups of W_u on the diagonal."""
    up = torch.block_diag(*module.up)
    down_bias, up_bias = (torch.zeros(()) if b is None else b for b in (module.down_bias, module.up_bias))
    hidden = down_bias.expand(len(up))
    return module.scale * module.down @ up, module.scale * (hidden.to(up) @ up + up_bias)


@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
def test_the_adapter_is_its_formula(activation: str) -> None:
    module, x = module_of(AdapterConfig(activation=activation, scale=0.3, dropout=0.2)), tokens()
    torch.testing.assert_close(module.delta(x, GRID), 0.3 * bottleneck(x, module, activation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_adaptformer_is_its_formula(norm: str, learn_scale: bool) -> None:
    module, x = module_of(AdaptFormerConfig(norm=norm, learn_scale=learn_scale, scale=0.2)), tokens()
    expected = bottleneck(normed(x, module.norm_before) if norm == "before" else x, module, "relu")
    expected = (module.scale if learn_scale else 0.2) * expected
    expected = normed(expected, module.norm_after) if norm == "after" else expected
    torch.testing.assert_close(module.delta(x, GRID), expected, rtol=1e-10, atol=1e-10)


def test_a_learned_scale_starts_from_the_fixed_one() -> None:
    parameters = dict(module_of(AdaptFormerConfig(learn_scale=True, scale=0.7), alive=False).named_parameters())
    assert parameters["scale"].tolist() == pytest.approx([0.7])
    assert "scale" not in dict(module_of(AdaptFormerConfig()).named_parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rank", "groups"), [(8, 2), (8, 1), (4, 4), (1, 1)])
def test_repadapter_is_its_dense_map(rank: int, groups: int, bias: bool) -> None:
    module, x = module_of(RepAdapterConfig(bottleneck=rank, groups=groups, bias=bias, scale=0.5)), tokens()
    matrix, shift = dense(module)
    torch.testing.assert_close(module.delta(x, GRID), x @ matrix + shift, rtol=1e-12, atol=1e-12)
    assert bool((shift != 0).any()) is bias


@pytest.mark.parametrize("terms", ["both", "scale", "shift"])
def test_ssf_is_its_formula(terms: str) -> None:
    module, x = module_of(SSFConfig(terms=terms)), tokens()
    gamma = 1 + module.gain if terms != "shift" else torch.ones(WIDTH)
    beta = module.shift if terms != "scale" else torch.zeros(WIDTH)
    torch.testing.assert_close(module(x, x, GRID), gamma * x + beta, rtol=1e-12, atol=1e-12)
    assert len(list(module.parameters())) == (2 if terms == "both" else 1)


def test_ssf_may_start_around_the_identity() -> None:
    torch.manual_seed(0)
    position = Position(None, Place.at("patch.out")[0], 4096, 4096)
    for parameter in get_method("ssf")(SSFConfig(init="normal"), position, {}).parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05) and abs(parameter.mean().item()) < 2e-3


def first_set(config: MethodConfig, sites: set[str]) -> set[str]:
    """The sites that a method takes in a backbone that has these."""
    sets = get_method(config.method).placements(config)
    return next((set(sum(places, ())) for places in sets if set(sum(places, ())) <= sites), set())


VIT = {
    *("patch.out", "stream.in", "norm1.out", "attn.in", "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.context"),
    *("attn.out", "stream.mid", "norm2.out", "mlp.in", "mlp.hidden", "mlp.act", "mlp.out", "stream.out", "norm.out"),
}
ATTENTION = {site for site in VIT if site.startswith("attn.")}
SSF_ALL = {"patch.out", "norm1.out", "attn.qkv", "attn.out", "norm2.out", "mlp.hidden", "mlp.out", "norm.out"}


@pytest.mark.parametrize(
    ("config", "lacks", "taken"),
    [
        (SSFConfig(), set(), SSF_ALL),
        (SSFConfig(), {"attn.qkv"}, SSF_ALL - {"attn.qkv"} | {"attn.q", "attn.k", "attn.v"}),
        (SSFConfig(), {"mlp.hidden"}, SSF_ALL - {"mlp.hidden"} | {"mlp.act"}),
        (SSFConfig(), {"patch.out", "norm.out"}, SSF_ALL - {"patch.out", "norm.out"}),
        (SSFConfig(), ATTENTION, SSF_ALL - ATTENTION),
        (SSFConfig(), ATTENTION | {"norm1.out"}, SSF_ALL - ATTENTION - {"norm1.out"}),
        (SSFConfig(operations=("attn", "mlp")), set(), {"attn.qkv", "attn.out", "mlp.hidden", "mlp.out"}),
        (SSFConfig(operations=("attn", "mlp")), ATTENTION, set()),
        (RepAdapterConfig(), set(), {"attn.in", "mlp.in"}),
        (RepAdapterConfig(), ATTENTION, {"mlp.in", "mlp.out"}),
        (RepAdapterConfig(places=("attn.in",)), ATTENTION, set()),
        (AdaptFormerConfig(), set(), {"stream.mid", "stream.out"}),
        (AdaptFormerConfig(), {"stream.mid"}, {"mlp.in", "mlp.out"}),
        (AdaptFormerConfig(form="sequential"), set(), {"mlp.out"}),
        (AdapterConfig(), ATTENTION, {"mlp.out"}),
        (AdapterConfig(places=("attn.out", "mlp.out")), set(), {"attn.out", "mlp.out"}),
    ],
)
def test_where_a_site_lacks_the_next_best_places_are_taken(config: MethodConfig, lacks: set, taken: set) -> None:
    assert first_set(config, VIT - lacks) == taken


ALL_DEFAULTS = [AdapterConfig(), AdaptFormerConfig(), RepAdapterConfig(bias=True), SSFConfig()]
MORE = [AdapterConfig(places=("attn.out",)), AdaptFormerConfig(norm="after", form="sequential")]


def adapted(plain: Any, x: Tensor, attached: Any, config: Any) -> Tensor:
    """A pre-norm ViT's logits with a method written into its forward, as the authors' programs do."""
    modules = {name: iter([]) for name in VIT}
    for key, position in attached.where.items():
        place = position.place
        modules[place.adds_to] = iter([*modules[place.adds_to], attached.positions[key]])

    def at(name: str, x: Tensor, reads: Tensor | None = None) -> Tensor:
        module = next(modules[name], None)
        return x if module is None else x + added(module, x if reads is None else reads, config)

    def inner(mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp.fc2(mlp.act(at("mlp.hidden", mlp.fc1(x))))

    stream = plain._pos_embed(at("patch.out", plain.patch_embed(x)))
    for block in plain.blocks:
        attn, entering = block.attn, at("attn.in", at("norm1.out", block.norm1(stream)))
        q, k, v = at("attn.qkv", attn.qkv(entering)).chunk(3, dim=-1)
        heads = [t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        scores = (heads[0] @ heads[1].transpose(-2, -1) * attn.scale).softmax(-1)
        branch = at("attn.out", attn.proj((scores @ heads[2]).transpose(1, 2).flatten(2)))
        middle = stream + block.ls1(branch)
        branch = at("mlp.out", inner(block.mlp, at("mlp.in", at("norm2.out", block.norm2(middle)))))
        stream = at("stream.out", middle + block.ls2(branch), reads=middle)
    return plain.head(at("norm.out", plain.norm(stream))[:, 0])


def added(module: Any, x: Tensor, config: Any) -> Tensor:
    if isinstance(config, AdapterConfig):
        return config.scale * bottleneck(x, module, config.activation)
    if isinstance(config, AdaptFormerConfig):
        found = config.scale * bottleneck(x, module, "relu")
        return normed(found, module.norm_after) if config.norm == "after" else found
    if isinstance(config, RepAdapterConfig):
        matrix, shift = dense(module)
        return x @ matrix + shift
    return x * module.gain + module.shift


@pytest.mark.parametrize("variant", ["plain", "layer_scale"])
@pytest.mark.parametrize("config", [*ALL_DEFAULTS, *MORE], ids=lambda config: config.method)
def test_the_adapted_model_is_the_one_written_out(config: Any, variant: str) -> None:
    """With and without a LayerScale, whose wrong side would show."""
    model, plain = fitted(config, variant).double(), vit(variant).double()
    plain.head.load_state_dict(model.head.state_dict())
    x = images(dtype=torch.float64)
    with torch.no_grad():
        expected = adapted(plain, x, get_attached(model), config)
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(expected, logits(plain, x), atol=1e-3)


@pytest.mark.parametrize("config", [*ALL_DEFAULTS, *MORE], ids=lambda config: config.method)
def test_the_model_starts_unchanged(config: Any) -> None:
    assert torch.equal(logits(fitted(config, alive=False)), logits(vit()))


def test_an_adapter_drawn_as_published_starts_nearly_unchanged() -> None:
    plain, start = logits(vit()), logits(fitted(AdapterConfig(init_std=0.01), alive=False))
    assert 0 < (start - plain).abs().max() < 1e-2 * plain.abs().max()
    module = module_of(AdapterConfig(init_std=0.01), alive=False)
    for weight in (module.down.weight, module.up.weight):
        assert 0 < weight.abs().max() <= 0.02


@pytest.mark.parametrize("config", [AdapterConfig(dropout=0.5), AdaptFormerConfig(), RepAdapterConfig()])
def test_dropout_acts_in_training_only(config: Any) -> None:
    module, x = module_of(config), tokens()
    assert torch.equal(module.delta(x, GRID), module.delta(x, GRID))
    module.train()
    assert not torch.equal(module.delta(x, GRID), module.delta(x, GRID))


def trained(config: MethodConfig, model: nn.Module) -> set[str]:
    """Names of the backbone's tensors that train, the head's left out."""
    names = {name for name, p in attach(model, config).named_parameters() if p.requires_grad}
    return {name for name in names if not name.startswith(("head.", "visgraft."))}


def test_what_unfreezes_is_what_is_named() -> None:
    names = {name for name, _ in vit("qk_norm").named_parameters() if not name.startswith("head.")}
    norms = {name for name in names if "norm" in name}
    assert trained(BitFitConfig(), vit("qk_norm")) == {name for name in names if name.endswith(".bias")}
    assert trained(NormConfig(), vit("qk_norm")) == norms and "blocks.0.attn.q_norm.weight" in norms
    assert trained(AdapterConfig(norms=True), vit("qk_norm")) == norms
    assert trained(AdapterConfig(), vit("qk_norm")) == set()
    last = {name for name in names if name.startswith(("blocks.2.", "norm."))}
    assert trained(PartialConfig(), vit("qk_norm")) == last
    assert trained(PartialConfig(blocks=3), vit("qk_norm")) == {n for n in names if n.startswith(("blocks.", "norm."))}


def test_batch_norm_keeps_its_statistics_with_what_trains() -> None:
    tensors = [
        OwnTensor("conv.weight", "weight", False, 0, 2),
        OwnTensor("bn.bias", "bias", True, 0, 2),
        OwnTensor("bn.running_mean", "buffer", True, 0, 2),
        OwnTensor("attn.index", "buffer", False, 1, 2),
    ]
    for config in (BitFitConfig(), NormConfig()):
        assert get_method(config.method).unfrozen(config, tensors) == ["bn.bias", "bn.running_mean"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BitFitConfig(), "finds no bias"),
        (NormConfig(), "finds no normalisation layer"),
        (PartialConfig(blocks=2), "blocks is 2, but timm counts 1 in this backbone"),
    ],
)
def test_a_backbone_without_what_should_train_is_refused(config: MethodConfig, message: str) -> None:
    tensors = [OwnTensor("stem.weight", "weight", False, 0, 2), OwnTensor("block.weight", "weight", False, 1, 2)]
    with pytest.raises(VisgraftError, match=message) as caught:
        get_method(config.method).unfrozen(config, tensors)
    assert "\n" not in str(caught.value)


def test_more_blocks_than_the_backbone_has_are_refused_before_anything_changes() -> None:
    model = vit()
    with pytest.raises(VisgraftError, match="blocks is 4, but timm counts 3"):
        attach(model, PartialConfig(blocks=4))
    assert not hasattr(model, "visgraft") and all(p.requires_grad for p in model.parameters())


def test_groups_must_divide_the_width() -> None:
    with pytest.raises(SiteError, match="32 channels, which 3 groups do not divide"):
        attach(vit(), RepAdapterConfig(bottleneck=9, groups=3))


def test_every_weight_of_a_fresh_module_can_move() -> None:
    """After one step the up-projection lives, and with it everything behind it."""
    for config in [*ALL_DEFAULTS, *MORE]:
        module: Method = module_of(config, alive=False)
        x = tokens()
        for _ in range(2):
            module.zero_grad()
            (module.delta(x, GRID) * x.cos()).sum().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.sub_(1e-3 * parameter.grad)
        assert all(p.grad.abs().sum() > 0 for p in module.parameters()), config


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AdapterConfig, {"bottleneck": 0}, "bottleneck is 0"),
        (AdapterConfig, {"places": []}, "places is empty"),
        (AdapterConfig, {"places": ["mlp.on"]}, "did you mean mlp.out"),
        (AdapterConfig, {"activation": "tanh"}, "activation is 'tanh'"),
        (AdapterConfig, {"dropout": 1.0}, "dropout is 1.0"),
        (AdapterConfig, {"init_std": 0.0}, "init_std is 0.0"),
        (AdaptFormerConfig, {"bottleneck": -1}, "bottleneck is -1"),
        (AdaptFormerConfig, {"form": "serial"}, "form is 'serial'"),
        (AdaptFormerConfig, {"scale": 0.0}, "scale is 0.0"),
        (AdaptFormerConfig, {"norm": "in"}, "norm is 'in'"),
        (AdaptFormerConfig, {"dropout": -0.1}, "dropout is -0.1"),
        (RepAdapterConfig, {"groups": 3}, "groups is 3, which does not divide bottleneck 8"),
        (RepAdapterConfig, {"groups": 0}, "groups is 0"),
        (RepAdapterConfig, {"places": []}, "places is empty"),
        (RepAdapterConfig, {"scale": -5.0}, "scale is -5.0"),
        (RepAdapterConfig, {"dropout": 1.5}, "dropout is 1.5"),
        (SSFConfig, {"operations": []}, "operations is empty"),
        (SSFConfig, {"operations": ["conv"]}, "operations is 'conv'"),
        (SSFConfig, {"terms": "none"}, "terms is 'none'"),
        (SSFConfig, {"init": "zero"}, "init is 'zero'"),
        (PartialConfig, {"blocks": 0}, "blocks is 0"),
        (BitFitConfig, {"blocks": 1}, "no option 'blocks'"),
    ],
)
def test_bad_options_are_refused_in_one_line(kind: Any, options: dict, message: str) -> None:
    with pytest.raises(VisgraftError, match=message) as caught:
        kind.from_dict(options)
    assert "\n" not in str(caught.value)
