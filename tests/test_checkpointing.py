"""Blocks computed anew in the backward pass: the same gradients from less memory, and nothing left switched on."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import ALL_FAMILIES, family, fitted, images, size_of
from test_train import DEFAULTS, RECIPE, fit, held, ready, same
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft import VisgraftError
from visgraft.methods.lora import LoRAConfig

PAIRS = [(name, kind) for name in DEFAULTS for kind in ("plain", "swin") if (name[:3], kind) != ("vpt", "swin")]
PAIRS += [(name, kind) for name in ("sct", "alore", "lora") for kind in ALL_FAMILIES if kind not in ("plain", "swin")]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_gradients_are_the_very_same(name: str, kind: str) -> None:
    model: Any = fitted(DEFAULTS[name], kind, alive=True)
    x, passes = images(size=size_of(kind)), list[int]()
    last = [module for path, module in model.named_modules() if re.search(r"blocks\.\d+$", path)][-1]
    last.register_forward_pre_hook(lambda *_: passes.append(1))
    before = gradients(model, x)
    model.set_grad_checkpointing(True)
    assert len(passes) == 1
    after = gradients(model, x)
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(passes) == (2 if name == "linear" else 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_gives_the_same_weights_and_switches_it_off_again(precision: str) -> None:
    models = [ready(LoRAConfig()) for _ in range(2)]
    passes: list[int] = []
    models[1].blocks[1].register_forward_pre_hook(lambda *_: passes.append(1))
    recipe = replace(RECIPE, precision=precision)
    fit(models[0], recipe)
    fit(models[1], replace(recipe, grad_checkpointing=True))
    assert same(held(models[0]), held(models[1]))
    assert len(passes) == 1 + 2 * 3 * 3, "once to see where to cut, twice in each step"
    assert not models[1].grad_checkpointing


def refuse(enable: bool) -> None:
    raise NotImplementedError


def test_it_is_refused_where_it_would_do_nothing() -> None:
    for config in (DEFAULTS["linear"], LoRAConfig(last_blocks=1)):
        with pytest.raises(VisgraftError, match="run once per image; leave it out"):
            fit(ready(config), replace(RECIPE, grad_checkpointing=True))
    model: Any = ready(LoRAConfig())
    model.set_grad_checkpointing = refuse
    with pytest.raises(VisgraftError, match="timm's VisionTransformer has no gradient checkpointing"):
        fit(model, replace(RECIPE, grad_checkpointing=True))


def test_families_have_it() -> None:
    for kind in ALL_FAMILIES:
        model: Any = family(kind)
        model.set_grad_checkpointing(True)
        assert any(getattr(module, "grad_checkpointing", False) for module in model.modules()), kind
