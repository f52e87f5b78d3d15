"""Adapters for a bank, and law 17 for one batch."""

import copy
import functools
from typing import Any

from support import CONFIGS, enliven, fitted, logits
from torch import Tensor

from visgraft import Bank

TOLERANCE = 1e-5


@functools.cache
def attached(name: str, kind: str = "plain") -> Any:
    return fitted(CONFIGS[name], kind, alive=False)


def trained(name: str, kind: str = "plain", seed: int = 1, outputs: int | None = None) -> Any:
    """A tiny backbone with a method attached and moved off its start, with a head of its own size."""
    model = copy.deepcopy(attached(name, kind))
    if outputs:
        model.reset_classifier(outputs)
    return enliven(model, seed).eval()


def answers(bank: Bank, x: Any, names: list[str]) -> list[Tensor]:
    return [answer.logits for answer in bank(x, names)]


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def held_to(bank: Bank, models: dict[str, Any], x: Tensor, names: list[str]) -> None:
    """Law 17 for one batch."""
    alone = {name: logits(models[name], x) for name in set(names)}
    for row, (found, name) in enumerate(zip(answers(bank, x, names), names, strict=True)):
        assert difference(found, alone[name][row]) <= TOLERANCE, (name, row)
