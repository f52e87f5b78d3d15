"""Training in bf16 with the frozen layers held in it: the same numbers as autocast's, and nothing left behind."""

import pytest
import torch
from support import ALL_FAMILIES, CONFIGS, family, fitted, images, size_of
from test_train import RECIPE, fit, held, ready, same
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.errors import TrainingDiverged
from visgraft.measure.precision import MOST_UNFUSED_TOKENS, frozen_weights_in_bf16, unfused_attention
from visgraft.methods.sct import SCTConfig
from visgraft.options import TrainConfig


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    F.cross_entropy(logits.float(), torch.arange(len(x)) % 5).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "logits": logits.detach()}


@pytest.mark.parametrize("kind", ALL_FAMILIES)
def test_frozen_layers_in_bf16_give_the_gradients_that_autocast_gives(kind: str) -> None:
    model, x = fitted(CONFIGS["linear-0"], kind, True), images(size=size_of(kind))
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.requires_grad_(True)  # so that gradients pass through every layer
    before, state = gradients(model, x), {name: p.data for name, p in model.named_parameters()}
    with frozen_weights_in_bf16(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
        inside = gradients(model, x)
    assert before.keys() == inside.keys() and all(torch.equal(before[key], inside[key]) for key in before)
    assert all(p.data.data_ptr() == state[name].data_ptr() for name, p in model.named_parameters())


def test_what_trains_stays_in_float32_and_nothing_changes_unless_it_is_wanted() -> None:
    model = family("plain").requires_grad_(False)
    model.blocks[0].mlp.fc1.requires_grad_(True)
    with frozen_weights_in_bf16(model):
        assert model.blocks[0].mlp.fc1.weight.dtype == torch.float32
        assert model.blocks[0].mlp.fc2.weight.dtype == torch.bfloat16
    with frozen_weights_in_bf16(model, wanted=False):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_training_gives_the_frozen_weights_back_as_they_were_also_after_an_error() -> None:
    config = TrainConfig(**{**RECIPE.to_dict(), "precision": "bf16"})
    for lr in (5e-3, 1e30):
        model = ready(SCTConfig(channels=4))
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        before = held(model)
        try:
            fit(model, TrainConfig(**{**config.to_dict(), "lr": lr}))
        except TrainingDiverged:
            assert lr > 1
        else:
            assert lr < 1 and not same(before, held(model))
        after = dict(model.named_parameters())
        assert frozen
        assert all(after[name].dtype == torch.float32 and torch.equal(after[name], frozen[name]) for name in frozen)


@pytest.mark.parametrize("kind", ["plain", "eva_fused"])
def test_attention_is_unfused_for_few_tokens_where_gradients_flow_and_otherwise_as_it_was(kind: str) -> None:
    model, x = family(kind), images(size=size_of(kind))
    parts = [module for module in model.modules() if hasattr(module, "fused_attn")]
    seen: list[bool] = []
    watch = parts[0].register_forward_hook(lambda module, args, output: seen.append(module.fused_attn))
    with unfused_attention(model):
        logits = model(x)
        with torch.no_grad():
            fused = model(x)
        parts[0].forward = lambda *args, **kwargs: args[0]
        parts[0](torch.zeros(1, MOST_UNFUSED_TOKENS, 8))
        parts[0](torch.zeros(1, MOST_UNFUSED_TOKENS + 1, 8))
    with unfused_attention(model, bf16=False):
        parts[0](x)
    watch.remove()
    assert seen == [False, True, False, True, True]
    assert parts and all(module.fused_attn and not module._forward_pre_hooks for module in parts)
    torch.testing.assert_close(logits, fused)


def test_training_in_bf16_uses_unfused_attention() -> None:
    for precision, fused in (("bf16", {False}), ("fp32", {True})):
        model = ready(SCTConfig(channels=4))
        seen: set[bool] = set()
        attention = model.blocks[1].attn

        def watch(module: nn.Module, args: tuple[Tensor], output: Tensor, seen: set[bool] = seen) -> None:
            if output.requires_grad and len(output) == RECIPE.batch_size:  # a step of training
                seen.add(module.fused_attn)

        attention.register_forward_hook(watch)
        fit(model, TrainConfig(**{**RECIPE.to_dict(), "precision": precision}))
        assert seen == fused and attention.fused_attn
