"""FacT against the dense tensor of its increments: cut into squares, in the model, merged; its factors and places."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from support import family, fitted, images, logits, vit
from test_baselines_2 import EXACT, GRID, alone, tokens
from torch import Tensor

from visgraft import attach, list_methods, merge
from visgraft.core.attached import get_attached
from visgraft.core.method import Place, Position
from visgraft.errors import MergeError, SiteError
from visgraft.methods.fact import FacTConfig


def increments(config: FacTConfig, modules: Sequence[Any], shared: Mapping[str, Any], width: int) -> Tensor:
    """All matrices ΔW_i = s U Σ_i V of one width as the paper's tensor [M, d, d], in order of the positions."""
    factors = shared[f"factors_{width}"]
    if config.form == "tt":
        cores = torch.cat([module.core for module in modules])
        return config.scale * torch.einsum("da,iab,be->ide", factors.down, cores, factors.up)
    equation = "da,abt,ti,be->ide"
    return config.scale * torch.einsum(equation, factors.down, factors.core, factors.matrices, factors.up)


BLOCK = (
    (Place("attn.in", "attn.qkv"), 1, 3),
    (Place("attn.context", "attn.out"), 1, 1),
    (Place("mlp.in", "mlp.hidden"), 1, 4),
    (Place("mlp.act", "mlp.out"), 4, 1),
)


def block_positions(width: int, blocks: Sequence[int]) -> list[Position]:
    return [Position(b, place, reads * width, adds * width) for b in blocks for place, reads, adds in BLOCK]


@pytest.mark.parametrize("form", ["tt", "tucker"])
def test_fact_is_the_dense_tensor_cut_into_squares(form: str) -> None:
    config = FacTConfig(form=form, rank=3, scale=0.6)
    positions = block_positions(5, (0, 1))
    modules, shared = alone(config, positions)
    assert list(shared) == ["factors_5"]
    squares = list(increments(config, modules, shared, 5))
    assert len(squares) == 2 * 12
    with torch.no_grad():
        for module, position in zip(modules, positions, strict=True):
            count = max(position.reads_width, position.adds_width) // 5
            mine, squares = squares[:count], squares[count:]
            dense = torch.cat(mine, dim=0 if position.reads_width > position.adds_width else 1)
            x = tokens(GRID, position.reads_width)
            torch.testing.assert_close(module.delta(x, GRID), x @ dense, **EXACT)
    assert not squares


@pytest.mark.parametrize("form", ["tt", "tucker"])
def test_fact_has_factors_for_each_width(form: str) -> None:
    config = FacTConfig(form=form, rank=2)
    positions = [*block_positions(4, (0,)), *block_positions(6, (1, 2))]
    modules, shared = alone(config, positions)
    assert list(shared) == ["factors_4", "factors_6"]
    first, second = increments(config, modules[:4], shared, 4), increments(config, modules[4:], shared, 6)
    assert first.shape == (12, 4, 4) and second.shape == (24, 6, 6)
    with torch.no_grad():
        x = tokens(GRID, 6)
        torch.testing.assert_close(modules[8].delta(x, GRID), x @ torch.cat(list(second[12:15]), dim=1), **EXACT)


@pytest.mark.parametrize("form", ["tt", "tucker"])
def test_fact_changes_the_model_as_its_increments_change_the_weights(form: str) -> None:
    """Against a plain model whose weights are changed by hand, and merged."""
    config = FacTConfig(form=form, rank=2, scale=3.0)
    model, plain = fitted(config).double(), vit().double()
    plain.head.load_state_dict(model.head.state_dict())
    attached = get_attached(model)
    modules = list(attached.positions.values())
    squares = increments(config, modules, dict(attached.shared.items()), 32).unflatten(0, (3, 12))
    with torch.no_grad():
        for block, mine in zip(plain.blocks, squares, strict=True):
            block.attn.qkv.weight += torch.cat(list(mine[:3]), dim=1).T
            block.attn.proj.weight += mine[3].T
            block.mlp.fc1.weight += torch.cat(list(mine[4:8]), dim=1).T
            block.mlp.fc2.weight += torch.cat(list(mine[8:]), dim=0).T
    x = images(dtype=torch.float64)
    torch.testing.assert_close(logits(model, x), logits(plain, x), **EXACT)
    merged, certificate = merge(model, x)
    torch.testing.assert_close(logits(merged, x), logits(plain, x), rtol=1e-9, atol=1e-9)
    assert certificate.top1_agreement == 1


def test_fact_starts_as_the_program_does() -> None:
    """U and the cores as layers that torch starts by itself, V at zero; in Tucker form P and C Xavier-uniform."""
    positions = block_positions(64, (0, 1, 2))
    torch.manual_seed(0)
    for form in ("tt", "tucker"):
        config, kind = FacTConfig(form=form), list_methods()["fact"]
        shared = kind.shared(config, positions)
        modules: list[Any] = [kind(config, position, shared) for position in positions]
        factors: Any = shared["factors_64"]
        bounds = {factors.down: 1 / 8}
        if form == "tt":
            bounds |= {modules[0].core: 1 / 4, modules[1].core: 1 / 4, modules[2].core: 1 / 4, modules[3].core: 1 / 8}
        else:
            bounds |= {factors.matrices: math.sqrt(6 / (16 + 36)), factors.core: math.sqrt(6 / (2 * 16 * 16))}
            assert not list(modules[0].parameters())
        for tensor, bound in bounds.items():
            assert 0.95 * bound < tensor.abs().max() <= bound
        assert factors.up.abs().max() == 0


def test_fact_takes_the_projections_that_a_family_has() -> None:
    def targets_of(config: FacTConfig) -> list[set[str]]:
        return [{place.adds_to for place in places} for places in list_methods()["fact"].placements(config)]

    mlp, proj = {"mlp.hidden", "mlp.out"}, {"attn.out"}
    one, three = {"attn.qkv"}, {"attn.q", "attn.k", "attn.v"}
    inside = {"proj.out"}
    expected = [
        where for rest in (mlp, set()) for where in (one | proj | rest, one | inside | rest, three | proj | rest)
    ]
    assert targets_of(FacTConfig()) == [*expected, mlp]
    assert targets_of(FacTConfig(targets=("qkv", "fc2"))) == [one | {"mlp.out"}] * 2 + [three | {"mlp.out"}]
    assert targets_of(FacTConfig(targets=("fc1",))) == [{"mlp.hidden"}]
    no_hidden = get_attached(attach(vit("swiglu"), FacTConfig()))
    assert {position.place.adds_to for position in no_hidden.where.values()} == one | proj
    with pytest.raises(SiteError, match=r"mlp\.hidden"):
        attach(vit("swiglu"), FacTConfig(targets=("fc1",)))


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("eva_unfused", {"attn.q", "attn.k", "attn.v", "attn.out"}),
        ("swin", {"attn.qkv", "proj.out", "mlp.hidden", "mlp.out"}),
        ("swin_v2", {"attn.qkv", "proj.out", "mlp.hidden", "mlp.out"}),
        ("convnext", {"mlp.hidden", "mlp.out"}),
    ],
)
def test_fact_on_other_families(name: str, adapted: set[str]) -> None:
    attached = get_attached(attach(family(name), FacTConfig(rank=2)))
    assert {position.place.adds_to for position in attached.where.values()} == adapted
    widths = {min(position.reads_width, position.adds_width) for position in attached.where.values()}
    assert set(attached.shared) == {f"factors_{width}" for width in widths}


def test_fact_projects_three_layers_like_one() -> None:
    """Query, key and value with a layer each get the increments that one layer for all three gets."""
    config = FacTConfig(rank=2, scale=1.0)
    (fused,), factors = alone(config, [Position(0, Place("attn.in", "attn.qkv"), 6, 18)])
    apart = [Position(0, Place("attn.in", f"attn.{part}"), 6, 6) for part in "qkv"]
    modules, shared = alone(config, apart, seed=1)
    with torch.no_grad():
        for name, parameter in shared["factors_6"].named_parameters():
            parameter.copy_(factors["factors_6"].get_parameter(name))
        for module, core in zip(modules, fused.core, strict=True):
            module.core.copy_(core.unsqueeze(0))
        x = tokens(GRID, 6)
        parts = torch.cat([module.delta(x, GRID) for module in modules], dim=-1)
        torch.testing.assert_close(parts, fused.delta(x, GRID), **EXACT)


@pytest.mark.parametrize("targets", [None, ("fc1",), ("fc2",)])
def test_fact_refuses_a_hidden_width_that_is_no_multiple(targets: tuple[str, ...] | None) -> None:
    with pytest.raises(SiteError, match="squares of 32; leave fc1 and fc2 out of targets"):
        attach(vit(mlp_ratio=2.5), FacTConfig(targets=targets))
    attach(vit(mlp_ratio=2.5), FacTConfig(targets=("qkv", "proj")))


def test_facts_projection_may_read_what_enters_attention() -> None:
    """Then it belongs to no layer: it computes as written, and is not merged."""
    config = FacTConfig(targets=("proj",), proj_reads="input", rank=2, scale=1.0)
    model, plain = fitted(config).double(), vit().double()
    attached = get_attached(model)
    squares = increments(config, list(attached.positions.values()), dict(attached.shared.items()), 32)
    x = images(2, dtype=torch.float64)
    with torch.no_grad():
        stream = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
        for block, square in zip(plain.blocks, squares, strict=True):
            normed = block.norm1(stream)
            stream = stream + block.attn(normed) + normed @ square
            stream = stream + block.mlp(block.norm2(stream))
        torch.testing.assert_close(model.forward_features(x), plain.norm(stream), **EXACT)
    with pytest.raises(MergeError):
        merge(model, x)
