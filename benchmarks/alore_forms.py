"""Is ALoRE faster in another form than the factored one that trains here?

    OMP_NUM_THREADS=1 python benchmarks/alore_forms.py --json forms.json

The factored form multiplies each of the n blocks of channels by the small factors and mixes the blocks between, adds
the result to the features, and the frozen layer behind reads the sum (`visgraft.low_rank`). Against it:

- *dense*: the map alone, as two products, d × n²r and n²r × d, with the blocks' zeros written out and no mixing;
- *folded*: the map and the frozen layer behind it, whose weight W becomes W(I + A) for every forward pass. The backward
  pass forms no gradient of W: it takes the gradient in front of W, from which the factors' gradients come as before.
  Without dropout, because with it the map is another one for every token.

Every round times each form once, in turned order, forward and backward with the forming of the factors; what is shown
are medians over rounds, with quartiles. Values and gradients are compared first, in float64.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from shared import arguments, in_turns, ratios, report, shown, table
from torch import Tensor
from torch.nn import functional as F

from visgraft.core.low_rank import LowRank, add_low_rank
from visgraft.core.method import Place, Position
from visgraft.methods.alore import ALoRE, ALoREConfig

SHAPES = {"ViT-S, 16 × 197": (3152, 384), "ViT-S, 32 × 50": (1600, 384), "ViT-B, 8 × 197": (1576, 768)}
"""Tokens of a batch and channels."""
LAYERS = {"qkv": 3, "fc1": 4}
"""The layers behind ALoRE's places, and how many times as many channels they write as they read."""


def dense(method: ALoRE) -> LowRank:
    """ALoRE's map as D [d, n²r] and U [n²r, d]."""
    n, inner, rank = method.down.shape
    same = torch.eye(n, dtype=method.down.dtype)
    down = torch.einsum("ac,ipr->apcir", same, method.down).reshape(n * inner, n * n * rank)
    up = torch.einsum("iab,irq->airbq", method.bank, method.up).reshape(n * n * rank, n * inner)
    return method.low_rank()._replace(down=down, up=up, mix=None)


class Folded(torch.autograd.Function):
    """x ↦ x (I + A) Wᵀ [N, o] of x [N, d] with A = s D M U in blocks, for a frozen W [o, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, mix: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, down, mix, up)
        back = LowRank(up.T, down.T, mix.T)  # the rows of W(I + A) are those of W, sent through the map backwards
        return x @ add_low_rank(weight, weight, back).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, mix, up = ctx.saved_tensors
        front = gradient @ weight
        blocks, wide = x.view(-1, len(down)), front.view(-1, up.shape[1])
        hidden = (blocks @ down).view(len(x), -1)
        d_mixed = (wide @ up.T).view(len(x), -1)
        d_up = (hidden @ mix).view(-1, len(up)).T @ wide
        d_hidden = (d_mixed @ mix.T).view(-1, down.shape[1])
        d_x = torch.addmm(front.view(-1, len(down)), d_hidden, down.T).view(x.shape)
        return d_x, None, (d_hidden.T @ blocks).T, hidden.T @ d_mixed, d_up


def folded(method: ALoRE, x: Tensor, weight: Tensor) -> Tensor:
    """The map and the layer behind it in one product."""
    down, up, mix, *_ = method.low_rank()
    assert mix is not None
    return Folded.apply(x, weight, down.to(x.dtype), mix.to(x.dtype), (method.scale * up).to(x.dtype))


def factored(method: ALoRE, x: Tensor, weight: Tensor) -> Tensor:
    """The map, then the layer behind it."""
    return F.linear(add_low_rank(x, x, method.low_rank()), weight)


def make(channels: int, **options: Any) -> ALoRE:
    """A method at one place, moved off its start."""
    config = ALoREConfig(**options)
    position = Position(0, Place("attn.in", "attn.in"), channels, channels)
    method = ALoRE(config, position, ALoRE.shared(config, [position])).train()
    torch.nn.init.normal_(method.up, std=0.01)
    return method


def compare() -> None:
    """Raise an error if the folded form differs from the factored one, in values or gradients."""
    method, weight = make(64, dropout=0.0).double(), torch.randn(192, 64, dtype=torch.float64)
    method._bank[0].double()
    x, found = torch.randn(10, 64, dtype=torch.float64, requires_grad=True), []
    inputs = (x, method.down, method._bank[0].weight, method.up)
    for form in (factored, folded):
        y = form(method, x, weight)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)))
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected)


def timed(form: Callable[[], Tensor], x: Tensor) -> Callable[[], float]:
    """Return a function that runs a form forward and backward and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            result = form()
        result.backward(torch.ones_like(result))
        x.grad = None
        return time.perf_counter() - start

    return run


def main() -> None:
    """Print two tables; with `--json`, write the figures to a file."""
    asked, maps, layers, found = arguments(__doc__).parse_args(), [], [], {}
    compare()
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for name, (tokens, channels) in SHAPES.items():
            x = torch.randn(tokens, channels, dtype=dtype, requires_grad=True)
            method = make(channels)
            forms: dict[str, Callable[[], Tensor]] = {
                "factored": lambda m=method, x=x: add_low_rank(x, x, m.low_rank()),
                "dense": lambda m=method, x=x: add_low_rank(x, x, dense(m)),
            }
            rounds = in_turns({key: timed(form, x) for key, form in forms.items()}, asked.rounds)
            found[f"dense, {name}, {precision}"] = figures = ratios(rounds, "dense", "factored")
            maps.append([name, precision, shown(*figures)])
            method = make(channels, dropout=0.0)
            for layer, times in LAYERS.items():
                weight = torch.randn(times * channels, channels, dtype=dtype)
                forms = {
                    "alone": lambda x=x, w=weight: F.linear(x, w),
                    "factored": lambda m=method, x=x, w=weight: factored(m, x, w),
                    "folded": lambda m=method, x=x, w=weight: folded(m, x, w),
                }
                rounds = in_turns({key: timed(form, x) for key, form in forms.items()}, asked.rounds)
                pairs = [ratios(rounds, key, "alone") for key in ("factored", "folded")]
                found[f"{layer}, {name}, {precision}"] = pairs
                layers.append([f"{name}, {layer}", precision, *(shown(*pair) for pair in pairs)])
    print(table(["shape", "precision", "dense ÷ factored"], maps) + "\n")
    print(table(["shape, layer behind", "precision", "factored ÷ layer alone", "folded ÷ layer alone"], layers))
    report(asked, {"ratios": found})


if __name__ == "__main__":
    main()
