"""ALoRE against the dense Kronecker sum and expert by expert; its bank; the published counts. And LoRA's algebra."""

from typing import Any

import pytest
import timm
import torch
from support import CLASSES, enliven, family, fitted, images, logits, size_of, vit
from torch import Tensor, nn

from visgraft import ALoREConfig, FullConfig, LinearConfig, LoRAConfig, MethodConfig, attach, count_parameters, merge
from visgraft.core.attach import assemble
from visgraft.core.attached import get_attached
from visgraft.core.method import Grid
from visgraft.errors import MergeError, SiteError, VisgraftError
from visgraft.export.affine import probe

COUNTS = [
    ("vit_base_patch16_224", ALoREConfig(), 147_520),
    ("vit_large_patch16_224", ALoREConfig(), 393_280),
    ("vit_huge_patch14_224", ALoREConfig(), 655_424),
    ("vit_base_patch16_224", ALoREConfig(bank="per_place"), 147_584),
    ("vit_base_patch16_224", LoRAConfig(), 294_912),
    ("vit_base_patch16_224", LoRAConfig(rank=1, targets=("fc1", "fc2")), 12 * 2 * (768 + 3072)),
    ("vit_base_patch16_224", LinearConfig(), 0),
    ("vit_base_patch16_224", FullConfig(), 85_798_656),
]
GRID = Grid(4, 4, 1)


def dense(module: nn.Module) -> Tensor:
    """s Σ_i W_s^i ⊗ (W_d^i W_u^i), formed with torch.kron: [C, C]."""
    terms = [torch.kron(module.bank[i], module.down[i] @ module.up[i]) for i in range(len(module.down))]
    return module.scale * torch.stack(terms).sum(dim=0)


@pytest.mark.parametrize(("experts", "rank"), [(1, 1), (2, 3), (4, 4), (8, 2), (32, 1)])
def test_the_factored_form_is_the_dense_kronecker_sum(experts: int, rank: int) -> None:
    model = fitted(ALoREConfig(experts=experts, rank=rank, scale=0.7)).double()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    for module in get_attached(model).positions.values():
        with torch.no_grad():
            torch.testing.assert_close(module.delta(x, GRID), x @ dense(module), rtol=1e-12, atol=1e-12)
            single = sum(module.expert(x, i) for i in range(experts))
            torch.testing.assert_close(single, module.delta(x, GRID), rtol=1e-12, atol=1e-12)
            assert all(module.expert(x, i).abs().max() > 0 for i in range(experts))


def test_the_probe_recovers_the_dense_matrix() -> None:
    attached = get_attached(fitted(ALoREConfig()))
    for key, module in attached.positions.items():
        found = probe(module, attached.where[key], GRID, attached.shared)
        torch.testing.assert_close(found.matrix, dense(module.double()).T, rtol=1e-6, atol=1e-6)
        assert found.shift.abs().max() == 0


def test_the_probe_refuses_what_is_not_affine_or_mixes_tokens() -> None:
    attached = get_attached(fitted(ALoREConfig()))
    key, position = next(iter(attached.where.items()))
    module = attached.positions[key]
    for wrong in (torch.relu, lambda x: x.roll(1, dims=1), lambda x: x * x.mean()):
        changed = type("Changed", (type(module),), {"delta": lambda self, x, grid, wrong=wrong: wrong(x)})
        module.__class__ = changed
        with pytest.raises(MergeError, match="not affine"):
            probe(module, position, GRID, attached.shared)
        module.__class__ = changed.__base__


def test_the_bank_is_one_parameter_however_many_positions() -> None:
    model = fitted(ALoREConfig())
    attached = get_attached(model)
    banks = {id(module.bank) for module in attached.positions.values()}
    assert len(banks) == 1 and len(attached.positions) == 6
    named = [name for name, p in model.named_parameters() if id(p) in banks]
    assert named == ["visgraft.shared.bank.weight"]
    assert [key for key in model.state_dict() if "bank" in key] == named
    per_place = get_attached(fitted(ALoREConfig(bank="per_place")))
    assert set(per_place.shared) == {"bank_attn_in", "bank_mlp_in"}


def test_experts_must_divide_the_width() -> None:
    model = vit()
    with pytest.raises(SiteError, match="32 channels, which 5 experts do not divide"):
        attach(model, ALoREConfig(experts=5))
    assert not hasattr(model, "visgraft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"places": []}, "places is empty"),
        ({"places": ["attn.on"]}, "attn.in"),
        ({"bank": "two"}, "bank is 'two'"),
        ({"ranks": 4}, "did you mean rank|no option 'ranks'"),
        ({"rank": "4"}, "rank is '4'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(VisgraftError, match=message) as caught:
        ALoREConfig.from_dict(options)
    assert "\n" not in str(caught.value)


def test_dropout_acts_in_training_only() -> None:
    model = fitted(ALoREConfig(dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_both_initialisations_start_unchanged_with_a_live_bank() -> None:
    for init, largest in (("xavier", 1.0), ("normal", 0.06)):
        model = attach(vit(), ALoREConfig(init=init))
        weight = get_attached(model).shared["bank"].weight
        assert 0 < weight.abs().max() <= largest
        assert torch.equal(logits(model), logits(vit()))


def test_lora_adds_its_product_to_the_named_rows_of_the_projection() -> None:
    """Against a plain model whose query and value rows are changed by hand."""
    model, plain = fitted(LoRAConfig(rank=2, scale=3.0)).double(), vit().double()
    plain.head.load_state_dict(model.head.state_dict())
    attached = get_attached(model)
    for key, position in attached.where.items():
        module, qkv = attached.positions[key], plain.blocks[position.block].attn.qkv
        start = {"attn.q": 0, "attn.v": 64}[position.place.adds_to]
        with torch.no_grad():
            qkv.weight[start : start + 32] += 3.0 * (module.down @ module.up).T
    x = images(dtype=torch.float64)
    torch.testing.assert_close(logits(model, x), logits(plain, x), rtol=1e-11, atol=1e-11)


def test_a_place_that_the_backbone_lacks_is_named() -> None:
    with pytest.raises(SiteError, match=r"lora needs the site mlp\.hidden"):
        attach(vit("swiglu"), LoRAConfig(targets=("fc1",)))


@pytest.mark.parametrize(("name", "config", "count"), COUNTS, ids=[f"{n}-{c.method}-{k}" for n, c, k in COUNTS])
def test_counts_are_the_published_ones(name: str, config: MethodConfig, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
    assert count_parameters(assemble(model, config)).adapter == count


@pytest.mark.parametrize("share", ["experts", "none"])
@pytest.mark.parametrize("kind", ["plain", "swin"])
def test_tasks_with_factors_of_their_own_answer_as_separate_adapters(share: str, kind: str) -> None:
    def backbone() -> Any:
        return vit("plain") if kind == "plain" else family(kind)

    tasks = ALoREConfig(share=share, tasks=(2, 3), dropout=0.0)
    joint = enliven(attach(backbone(), tasks), strength=0.3).eval().double()  # such random weights amplify rounding
    x = images(size=16 if kind == "plain" else size_of(kind)).double()
    stored = get_attached(joint).stored()
    answers = joint(x)
    for task, outputs in enumerate((slice(0, 2), slice(2, 5))):
        alone = attach(backbone(), ALoREConfig(dropout=0.0)).eval().double()
        state = alone.state_dict()
        for name, tensor in stored.items():
            own = name.endswith((".down", ".up")) or (share == "none" and "bank" in name)
            state[name].copy_(tensor[task] if own else tensor)
        found = alone(x)
        assert (found - answers)[:, outputs].abs().max() < 1e-11
        assert (found - answers).abs().max() > 1e-3  # the other task's factors matter
    with pytest.raises(MergeError, match="answers each task in a pass of its own"):
        merge(joint)


def test_what_tasks_share_is_counted() -> None:
    counts = [
        count_parameters(attach(vit(), ALoREConfig(share=share, tasks=tasks))).adapter
        for share, tasks in (("all", None), ("experts", (2, 3)), ("none", (2, 3)))
    ]
    bank = 4**3
    assert counts == [counts[0], 2 * (counts[0] - bank) + bank, 2 * counts[0]]


def test_share_needs_several_tasks() -> None:
    with pytest.raises(VisgraftError, match="needs the outputs of each task"):
        attach(vit(), ALoREConfig(share="experts"))
    with pytest.raises(VisgraftError, match="5 outputs in all, but the head has 4"):
        attach(vit(num_classes=4), ALoREConfig(share="experts", tasks=(2, 3)))
    with pytest.raises(VisgraftError, match="has no effect on images with one label"):
        ALoREConfig(share="none").for_tasks(())
    assert ALoREConfig(share="none").for_tasks((2, 1)).tasks == (2, 1)
    assert ALoREConfig().for_tasks((2, 1)) == ALoREConfig()
