"""Is ALoRE faster as two dense products, d × n²r and n²r × d, than in the factored form that trains here?

    OMP_NUM_THREADS=1 python benchmarks/alore_forms.py --json forms.json

The factored form multiplies each of the n blocks of channels by the small factors and mixes the blocks between; the
dense one writes the factors into two matrices with the blocks' zeros, and mixes nothing. Both are added, and
differentiated, by the same code (`visgraft.low_rank`). Every round times each form once, in turned order, forward and
backward with the forming of the factors; dense ÷ factored are medians over rounds, with quartiles.
"""

import time
from collections.abc import Callable

import torch
from shared import arguments, in_turns, ratios, report, shown, table
from torch import Tensor

from visgraft.low_rank import LowRank, add_low_rank
from visgraft.method import Place, Position
from visgraft.methods.alore import ALoRE, ALoREConfig

SHAPES = {"ViT-S, 16 × 197": (3152, 384), "ViT-S, 32 × 50": (1600, 384), "ViT-B, 8 × 197": (1576, 768)}
"""Tokens of a batch and channels."""


def dense(method: ALoRE) -> LowRank:
    """ALoRE's map as D [d, n²r] and U [n²r, d]."""
    n, inner, rank = method.down.shape
    same = torch.eye(n, dtype=method.down.dtype)
    down = torch.einsum("ac,ipr->apcir", same, method.down).reshape(n * inner, n * n * rank)
    up = torch.einsum("iab,irq->airbq", method.bank, method.up).reshape(n * n * rank, n * inner)
    return method.low_rank()._replace(down=down, up=up, mix=None)


def timed(form: Callable[[], LowRank], x: Tensor, bf16: bool) -> Callable[[], float]:
    """Return a function that adds the map to x and differentiates it, and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            added = add_low_rank(x, x, form())
        added.backward(x.detach())
        x.grad = None
        return time.perf_counter() - start

    return run


def main() -> None:
    """Print a table; with `--json`, write the figures to a file."""
    asked, rows, found = arguments(__doc__).parse_args(), [], {}
    config = ALoREConfig()
    for bf16 in (False, True):
        for name, (tokens, channels) in SHAPES.items():
            position = Position(0, Place("attn.in", "attn.in"), channels, channels)
            method = ALoRE(config, position, ALoRE.shared(config, [position])).train()
            torch.nn.init.normal_(method.up)
            x = torch.randn(1, tokens, channels, dtype=torch.bfloat16 if bf16 else torch.float32, requires_grad=True)
            forms = {"factored": method.low_rank, "dense": lambda method=method: dense(method)}
            rounds = in_turns({key: timed(form, x, bf16) for key, form in forms.items()}, asked.rounds)
            precision = "bf16" if bf16 else "fp32"
            found[f"{name}, {precision}"] = figures = ratios(rounds, "dense", "factored")
            rows.append([name, precision, shown(*figures)])
    print(table(["shape", "precision", "dense ÷ factored"], rows))
    report(asked, {"ratios": found})


if __name__ == "__main__":
    main()
