"""Low-rank maps added by the fast route: the same values and gradients as the plain one, and less memory."""

import copy
from typing import Any

import pytest
import torch
from support import CONFIGS, PAIRS, family, fitted, images, logits, refused, size_of, vit
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft import attach, list_methods
from visgraft.core.attached import get_attached
from visgraft.core.low_rank import LowRank, add_low_rank, add_product, hidden_features, keep_mask, masked
from visgraft.core.method import Method
from visgraft.methods.alore import ALoREConfig

FAST = {
    name
    for name, config in CONFIGS.items()
    if list_methods()[config.method].low_rank is not Method.low_rank and not config.passes
}
EACH = [(name, kind) for name, kind in PAIRS if name in FAST and not refused(name, kind)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


# a and b blocks of p and q channels: [B, N, a p] -> [B, N, b q], with k features per block in, m per block out.
SHAPES = [(1, 6, 1, 5, 3, 3, False), (2, 3, 2, 4, 4, 4, True), (1, 6, 3, 4, 2, 5, True), (3, 4, 1, 6, 2, 3, True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drop_mixed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_right_in_float64(
    shape: tuple[int, int, int, int, int, int, bool], drop_mixed: bool, dropout: float
) -> None:
    a, p, b, q, k, m, mixed = shape
    x, onto = numbers(2, 3, a * p), numbers(2, 3, b * q, seed=1)
    mix = numbers(a * k, b * m, seed=4) if mixed else None
    tensors = (x, onto, numbers(p, k, seed=2), numbers(m, q, seed=3), mix, numbers(b * q, seed=5))

    def run(x: Tensor, onto: Tensor, down: Tensor, up: Tensor, mix: Tensor | None, bias: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same features are dropped in every evaluation
        return add_low_rank(x, onto, LowRank(down, up, mix, bias, 1.5, dropout, drop_mixed))

    assert torch.autograd.gradcheck(run, tensors)


def test_gradients_are_right_where_the_map_adds_to_what_it_reads() -> None:
    x, down, mix, up = numbers(2, 3, 6), numbers(3, 2, seed=1), numbers(4, 4, seed=2), numbers(2, 3, seed=3)
    assert torch.autograd.gradcheck(lambda x, d, u, m: add_low_rank(x, x, LowRank(d, u, m)), (x, down, up, mix))


@pytest.mark.parametrize("rows", [(0, 4), (4, 8), (0, 12)])
def test_rows_are_added_to_in_place_with_the_right_gradients(rows: tuple[int, int]) -> None:
    x, weight, down, up = numbers(2, 3, 5), numbers(12, 5, seed=1), numbers(5, 2, seed=2), numbers(2, 4, seed=3)
    wide = up if rows[1] - rows[0] == 4 else numbers(2, 12, seed=4)

    def run(x: Tensor, weight: Tensor, down: Tensor, wide: Tensor) -> Tensor:
        factors = LowRank(down, wide)
        x, (hidden,) = hidden_features(x, [factors])
        return add_product(F.linear(x, weight), hidden, factors, rows)

    expected = F.linear(x, weight)
    expected = torch.cat(
        (expected[..., : rows[0]], expected[..., slice(*rows)] + x @ down @ wide, expected[..., rows[1] :]), -1
    )
    torch.testing.assert_close(run(x, weight, down, wide), expected)
    assert torch.autograd.gradcheck(run, (x, weight, down, wide))


@pytest.mark.parametrize("blocks", [1, 3])
def test_maps_that_read_one_tensor_together_read_what_each_would_alone(blocks: int) -> None:
    x, first, second = numbers(2, 3, 6), numbers(6 // blocks, 2, seed=1), numbers(6 // blocks, 3, seed=2)

    def run(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        passed_on, hidden = hidden_features(x, [LowRank(down, down.T) for down in factors])
        return passed_on, *hidden

    passed_on, *hidden = run(x, first, second)
    assert passed_on is x or torch.equal(passed_on, x)
    for found, down in zip(hidden, (first, second), strict=True):
        torch.testing.assert_close(found, run(x, down)[1])
    assert torch.autograd.gradcheck(run, (x, first, second))


def test_query_and_value_are_read_in_one_product() -> None:
    model = fitted(CONFIGS["lora-0"], "plain", True)
    attached = get_attached(model)
    nodes, seen = [model(images(2)).sum().grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    read = [node for node in seen if type(node).__name__ == "_HiddenBackward"]
    assert len(attached.positions) == 2 * len(read) > 0


def test_the_input_is_computed_again_from_its_source() -> None:
    u, down, up = numbers(2, 3, 6), numbers(6, 2, seed=1), numbers(2, 6, seed=2)
    runs = []

    def norm(u: Tensor) -> Tensor:
        runs.append(u.requires_grad)
        return F.layer_norm(u, (6,))

    def run(u: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return add_low_rank(x := F.layer_norm(u, (6,)), x, LowRank(down, up), (u, norm))

    assert torch.autograd.gradcheck(run, (u, down, up))
    assert runs and not any(runs), "the norm ran again with a graph, or not at all"


def test_dropped_features_are_as_many_as_asked_for_and_what_stays_is_scaled() -> None:
    torch.manual_seed(0)
    keep, chance = keep_mask(4000, 25, 0.3, torch.device("cpu"))
    assert keep.shape == (4000, 25) and set(keep.unique().tolist()) == {-1, 0}
    assert abs(chance - 0.7) < 1e-5
    share, spread = -keep.double().mean(), (0.7 * 0.3 / keep.numel()) ** 0.5
    assert abs(share - 0.7) < 4 * spread
    for lag in (1, 2, 3, 4):  # four features share a draw
        pairs = -(keep.flatten()[:-lag] & keep.flatten()[lag:]).double().mean()
        assert abs(pairs - 0.49) < 4 * (0.49 * 0.51 / keep.numel()) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(keep_mask(4000, 25, 0.3, torch.device("cpu"))[0], keep)
    x = torch.ones(1, 4000, 1, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    added = add_low_rank(x, torch.zeros_like(x), LowRank(one, one, dropout=0.3))
    assert set(added.unique().tolist()) == {0.0, 1 / chance}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_keeps_features_bit_by_bit(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1.5, 0.1, float("nan")], [float("inf"), -0.0, 3e-8]], dtype=dtype)
    mask = torch.tensor([[-1, 0, 0], [0, -1, -1]], dtype=torch.int8)
    for shown in (x, x.T.contiguous().T):
        found = masked(shown, mask)
        assert found.dtype == dtype and torch.equal(found, torch.where(mask != 0, x, 0))
        assert found[1, 1].signbit()


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The gradients of one step."""
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "kind"), EACH, ids=lambda value: value)
def test_the_fast_route_is_the_plain_one(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(CONFIGS[name], kind, True).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the routes drop different features
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    plain, x = copy.deepcopy(model), images(4, size=size_of(kind)).double().requires_grad_()
    used = [module.low_rank() for module in get_attached(model).positions.values()]  # type: ignore[operator]
    fast, fast_x = step(model, x), x.grad
    x.grad = None
    monkeypatch.setattr(list_methods()[CONFIGS[name].method], "low_rank", lambda self: None)
    slow = step(plain, x)
    assert fast.keys() == slow.keys()
    for key, gradient in slow.items():
        torch.testing.assert_close(fast[key], gradient, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(fast_x, x.grad, rtol=1e-8, atol=1e-9)
    assert any(factors is not None for factors in used) or name in ("repadapter-1",), "no fast route"


def test_factors_are_the_same_map_as_the_plain_form() -> None:
    for name in sorted(FAST):
        model = fitted(CONFIGS[name], "plain", True).double().eval()
        attached = get_attached(model)
        for key, position in attached.where.items():
            module: Any = attached.positions[key]
            factors = module.low_rank()
            if factors is not None:
                x = numbers(2, 3, position.reads_width).detach()
                torch.testing.assert_close(factors.delta(x), module.delta(x, None), rtol=1e-9, atol=1e-10)


def test_a_hook_on_a_method_s_module_sees_its_call() -> None:
    model, seen = fitted(CONFIGS["lora-0"], "plain", True), []
    get_attached(model).positions["1_attn_in_to_attn_v"].register_forward_hook(lambda *_: seen.append(1))
    fast, x = fitted(CONFIGS["lora-0"], "plain", True), images()
    torch.testing.assert_close(logits(model, x), logits(fast, x))
    assert seen == [1]


def test_it_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = attach(vit(), ALoREConfig()).train()
    model.to("meta")
    assert model(torch.empty(2, 3, 16, 16, device="meta")).shape == (2, 5)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for the backward pass, parameters left out, each memory once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).sum()
    del loss
    return sum(found.values())


def test_alore_keeps_its_hidden_features_and_nothing_of_the_features_size() -> None:
    model = vit(depth=2)
    count, sites, hidden = 64, 4, 4 * 4 * 4
    tokens, x = count * 17, images(count).requires_grad_()
    model.requires_grad_(False).head.requires_grad_(True)
    plain = kept_bytes(model, x)
    attach(model, ALoREConfig(rank=4, experts=4)).train()
    small = 32 * 1024 * sites  # the factors themselves
    more = kept_bytes(model, x) - plain
    assert tokens * sites * hidden * 4 <= more <= tokens * sites * hidden * 5 + small  # float32, and which to keep
    assert tokens * sites * 32 * 4 > small, "the features would not be noticed"


def test_bf16_hands_what_enters_linear_layers_over_in_bf16() -> None:
    model = attach(vit(), ALoREConfig()).train()
    seen: list[torch.dtype] = []
    model.blocks[1].attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))  # type: ignore[union-attr,operator]
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images()).float(), torch.arange(6) % 5)
    loss.backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_family_s_norm_is_the_one_that_makes_the_tensor() -> None:
    """A wrong norm in the table would be refused by the dry run; that the right ones are there is checked here."""
    from visgraft.core.finding import find_sites

    for kind in ("plain", "beit", "eva_fused", "swin", "convnext", "mixer"):
        for sites in find_sites(family(kind)).blocks:
            assert sites["mlp.in"].norm is not None, kind
    assert all(sites["mlp.in"].norm is None for sites in find_sites(family("swin_v2")).blocks)
