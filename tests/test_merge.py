"""A right fold is certified on every processor, and a wrong one is refused, however little is wrong."""

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from support import CONFIGS, enliven, fitted, images, vit
from test_laws import adapted, in_turn, pictures
from test_merged import MERGING
from torch import Tensor, nn

from visgraft import ALoREConfig, LinearConfig, LoRAConfig, SSFConfig, attach, merge
from visgraft.core.attached import get_attached
from visgraft.core.finding import find_sites
from visgraft.errors import MergeError
from visgraft.export.affine import fold_target
from visgraft.export.certificate import ERROR_FACTOR, REFERENCE_IMAGES, answers, certify, image_batches
from visgraft.export.merge import folded

FOLDING = [(name, kind) for name, kind in MERGING if CONFIGS[name].has_places]
MODULE: Any = importlib.import_module("visgraft.export.merge")  # the name in the package is the function
Damage = Callable[[Tensor, Tensor], Tensor]


def perturbed(weight: Tensor, _: Tensor) -> Tensor:
    """One weight, the largest, by a thousandth of its size."""
    worst = weight.clone().flatten()
    worst[worst.abs().argmax()] *= 1.001
    return worst.view_as(weight)


def transposed(weight: Tensor, _: Tensor) -> Tensor:
    """A square block of a matrix; of a norm's factors and of depthwise kernels, their order turned round."""
    if min(weight.shape[:2]) == 1 or weight.ndim == 1:
        return weight.flip(weight.shape.index(max(weight.shape)))
    turned, side = weight.clone(), min(weight.shape[:2])
    turned[:side, :side] = weight[:side, :side].transpose(0, 1)
    return turned


def forgotten(bias: Tensor, before: Tensor) -> Tensor:
    """A bias as it was before the fold."""
    return before.clone()


def changed(after: Mapping[str, Tensor], before: Mapping[str, Tensor], bias: bool) -> list[str]:
    """Names of what a fold changed, biases or other tensors."""
    return [
        name
        for name, tensor in after.items()
        if name.endswith(("bias", "beta")) == bias and not torch.equal(tensor, before[name])
    ]


@in_turn(FOLDING)
def test_a_wrong_fold_is_refused(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(name, kind), pictures(kind, 8, seed=5)
    right = folded(copy.deepcopy(model).double()).state_dict()
    damaged: list[str] = []

    def fold_wrongly(damage: Damage) -> Callable[[nn.Module, nn.Module, bool], None]:
        def fold_all(_: nn.Module, plain: nn.Module, allow_new_bias: bool) -> None:
            before = copy.deepcopy(plain).state_dict()
            plain.load_state_dict(right)
            for one in changed(right, before, damage is forgotten)[-1:]:
                plain.state_dict()[one].copy_(damage(right[one], before[one]))
                damaged.append(one)

        return fold_all

    shifts = CONFIGS[name].shifts or moves_a_bias(model)
    for damage in (perturbed, transposed, forgotten) if shifts else (perturbed, transposed):
        damaged.clear()
        monkeypatch.setattr(MODULE, "_fold_all", fold_wrongly(damage))
        with pytest.raises(MergeError, match="another function: in float64 it differs"):
            merge(model, x)
        assert len(damaged) == 1, damage
    if not shifts:
        assert not changed(right, copy.deepcopy(model).double().state_dict(), bias=True)


def moves_a_bias(model: nn.Module) -> bool:
    """Whether the map stands behind a layer, whose bias it then maps as well."""
    attached = get_attached(model)
    sites = find_sites(attached._backbone[0])
    return any(fold_target(*sites.at(position)).side == "output" for position in attached.where.values())


def test_the_merged_model_is_the_exact_one_rounded_once() -> None:
    model = fitted(LoRAConfig(rank=2, targets=("q", "k", "v", "proj", "fc2")))
    plain, certificate = merge(model, images(20))
    exact = folded(copy.deepcopy(model).double())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].float()), name
    untouched = [name for name in vit().state_dict() if name.startswith("patch_embed")]
    assert untouched == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert all(torch.equal(plain.state_dict()[name], vit().state_dict()[name]) for name in untouched)
    assert {tensor.dtype for tensor in plain.state_dict().values()} == {torch.float32}
    assert 0 < certificate.fold_difference < certificate.fold_tolerance
    assert 0 < certificate.merged_error < certificate.error_tolerance


def test_damage_done_while_rounding_is_refused() -> None:
    model, x = fitted(ALoREConfig()), images(REFERENCE_IMAGES)
    plain, truth = merge(model, x)[0], answers(copy.deepcopy(model).double(), x)
    with torch.no_grad():
        plain.blocks[1].mlp.fc2.weight.copy_(plain.blocks[1].mlp.fc2.weight.bfloat16())
    with pytest.raises(MergeError, match=r"rounded to float32, the merged model errs by .* keep the adapter attached"):
        certify(model, plain, [x], x, truth, (0.0, 1e-9))


def test_a_fold_that_is_not_finite_is_refused() -> None:
    model = fitted(SSFConfig())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "visgraft" in n and p.requires_grad).fill_(float("inf"))
    with pytest.raises(MergeError):
        merge(model, images(4))


@pytest.mark.parametrize("count", [1, 3, 16, 20])
def test_errors_are_always_measured_on_enough_images(count: int) -> None:
    model = fitted(ALoREConfig(), num_classes=2)
    plain, certificate = merge(model, images(count))
    assert (certificate.images, certificate.reference_images) == (count, REFERENCE_IMAGES)
    difference = (answers(model, images(count)) - answers(plain, images(count))).abs().max().item()
    assert certificate.max_abs_difference == difference
    assert certificate.source == "images"


def test_an_iterator_of_batches_is_gone_through_once() -> None:
    def batches() -> Iterator[Any]:
        for number in range(5):
            yield images(6, number), torch.zeros(6)

    certificate = merge(fitted(ALoREConfig()), [images(0), *batches(), images(0)])[1]
    assert certificate.images == 30
    certificate = merge(fitted(ALoREConfig()), batches())[1]
    assert certificate.images == 30
    with pytest.raises(MergeError, match="no images to measure"):
        merge(fitted(ALoREConfig()), iter([]))


def test_images_of_several_sizes_are_all_compared() -> None:
    model = fitted(SSFConfig(), "convnext")
    certificate = merge(model, [images(2, size=32), images(3, size=64), images(4, size=32)])[1]
    assert (certificate.images, certificate.reference_images) == (9, REFERENCE_IMAGES)


def test_noise_stands_for_images_that_are_lacking() -> None:
    first, batches, source = image_batches(None, vit())
    assert source == "noise" and torch.equal(next(batches).unique(dim=0), first)
    assert next(batches, None) is None
    first, _, source = image_batches(images(3), vit())
    assert source == "images" and len(first) == REFERENCE_IMAGES and torch.equal(first[:3], images(3).unique(dim=0))


def test_a_model_in_float64_has_no_better_one_to_be_held_against() -> None:
    certificate = merge(fitted(ALoREConfig()).double(), images(4))[1]
    assert certificate.adapted_error is certificate.merged_error is certificate.error_tolerance is None
    assert certificate.max_abs_difference <= certificate.fold_tolerance
    assert "float64" in certificate.verdict and "errs" not in certificate.verdict


@pytest.mark.parametrize("pool", ["token", "", "avg"])
def test_a_model_without_a_head_is_held_to_its_features(pool: str) -> None:
    model = fitted(ALoREConfig(), num_classes=0, global_pool=pool)
    plain, certificate = merge(model, images(4))
    assert plain(images(4)).ndim == (2 if pool else 3)
    assert 0 < certificate.max_abs_difference < 1e-3 and certificate.images == 4


def test_a_head_of_zeros_is_merged_too() -> None:
    model = attach(vit(), LinearConfig()).eval()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    certificate = merge(model, images(4))[1]
    assert certificate.max_abs_difference == certificate.merged_error == certificate.error_tolerance == 0


def test_neither_a_masked_class_nor_a_constant_hides_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users mask classes with -1e9 or -inf; a tolerance relative to the largest logit would then allow anything."""
    for bias in (torch.tensor([-1e9, 0, 0, 0, 0]), torch.tensor([-torch.inf, 0, 0, 0, 0]), torch.full((5,), 1e6)):
        model = fitted(ALoREConfig())
        with torch.no_grad():
            model.head.bias.copy_(bias)
        certificate = merge(model, images(16))[1]
        assert certificate.merged_error < 1e-1 and certificate.top1_agreement == 1
        right = folded(copy.deepcopy(model).double()).state_dict()

        def fold_wrongly(_: nn.Module, plain: nn.Module, allow: bool, right: Any = right) -> None:
            plain.load_state_dict({**right, "blocks.1.mlp.fc2.weight": perturbed(right["blocks.1.mlp.fc2.weight"], _)})

        with monkeypatch.context() as patch:
            patch.setattr(MODULE, "_fold_all", fold_wrongly)
            with pytest.raises(MergeError, match="another function"):
                merge(model, images(16))


def test_answers_that_are_not_finite_are_not_blamed_on_the_fold() -> None:
    broken = torch.full((2, 3, 16, 16), torch.nan)
    with pytest.raises(MergeError, match="adapted model itself does not answer in finite numbers"):
        merge(fitted(ALoREConfig()), torch.cat([broken, images(4)]))
    with pytest.raises(MergeError, match=r"in its own precision .* not answer in finite numbers"):
        merge(fitted(ALoREConfig()), [images(16), broken])


@pytest.mark.parametrize("wrong", [images(1)[0], [{"image": 1}], ["one.png"], [(1, 2)], [images(16), images(1)[0]]])
def test_what_is_no_batch_of_images_is_named(wrong: Any) -> None:
    with pytest.raises(MergeError, match=r"tensors \[B, 3, H, W\] or \(images, labels\), not"):
        merge(fitted(ALoREConfig()), wrong)


def test_a_network_that_amplifies_rounding_on_some_images_is_merged() -> None:
    """Of 16 images one or two decide about the mean there, so that the ratio of two means is a matter of luck."""
    for seed in range(8):
        model = enliven(fitted(ALoREConfig(), "no_class_token", alive=False), seed, 1.0).eval()
        merge(model, images(16, seed))


def test_copies_of_one_image_are_one_sample() -> None:
    first, batches, _ = image_batches(torch.zeros(40, 3, 16, 16), vit())
    assert len(first.unique(dim=0)) == REFERENCE_IMAGES and len(next(batches)) == 40
    for seed in range(12):
        model = enliven(fitted(ALoREConfig(), alive=False, num_classes=1), seed).eval()
        assert merge(model, torch.zeros(16, 3, 16, 16))[1].images == 16


def test_modes_and_precisions_of_single_parts_stay() -> None:
    model = vit()
    model.register_buffer("fine", torch.tensor([1 + 1e-12], dtype=torch.float64))
    model.register_buffer("coarse", torch.tensor([1.5], dtype=torch.float16))
    model = enliven(attach(model, ALoREConfig())).train()
    model.head.eval()
    model.blocks[0].train()
    modes = [module.training for module in model.modules()]
    plain = merge(model, images(4))[0]
    assert [module.training for module in model.modules()] == modes
    assert (plain.fine.dtype, plain.coarse.dtype) == (torch.float64, torch.float16)
    assert plain.fine.item() == 1 + 1e-12


def test_a_model_merged_in_inference_mode_can_be_trained() -> None:
    model = fitted(ALoREConfig())
    with torch.inference_mode():
        plain = merge(model, images(4))[0]
    plain.requires_grad_(True)(images(2)).sum().backward()
    assert plain.head.weight.grad is not None


@pytest.mark.long
def test_the_bounds_leave_room_for_chance_and_none_for_mistakes() -> None:
    """On this processor, over all pairs: what docs/architecture.md reports."""
    ratios, folds = [], []
    for name, kind in FOLDING:
        certificate = merge(adapted(name, kind), pictures(kind, 8, seed=5))[1]
        ratios.append(certificate.merged_error / certificate.adapted_error)
        folds.append(certificate.fold_difference / certificate.fold_tolerance)
    middle = sorted(ratios)[len(ratios) // 2]
    print(f"merged ÷ adapted error: median {middle:.2f}, largest {max(ratios):.2f}; fold: {max(folds):.1e} of allowed")
    assert 0.8 < middle < 1.3
    assert max(ratios) < ERROR_FACTOR / 1.5
    assert max(folds) < 1e-2
