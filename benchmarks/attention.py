"""How long does attention take on a CPU, fused by torch and as two products with a softmax between?

    python benchmarks/attention.py --json attention.json

Shapes are those of common backbones at small and usual image sizes. Every round times each form once, in turned order;
unfused ÷ fused are medians over rounds, with quartiles, of a forward pass alone and of one with its backward pass.
"""

import time
from collections.abc import Callable

import torch
from shared import arguments, in_turns, ratios, report, shown, table
from torch import Tensor
from torch.nn import functional as F

SHAPES = {
    "ViT-S/14, 98 px": (32, 6, 50, 64),
    "ViT-S/16, 224 px": (16, 6, 197, 64),
    "ViT-B/16, 224 px": (8, 12, 197, 64),
    "ViT-S/16, 320 px": (8, 6, 401, 64),
    "ViT-S/16, 512 px": (4, 6, 1025, 64),
}
"""Images, heads, tokens, channels of a head."""


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by torch's own kernel; all [B, heads, N, channels]."""
    return F.scaled_dot_product_attention(q, k, v)


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as timm computes it without the kernel."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def timed(attention: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor, backward: bool) -> Callable[[], float]:
    """Return a function that runs attention on [B, N, 3, heads, channels] and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            out = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(-2)
        if backward:
            out.backward(out.detach())
            qkv.grad = None
        return time.perf_counter() - start

    return run


def main() -> None:
    """Print a table; with `--json`, write the figures to a file."""
    asked, rows, found = arguments(__doc__).parse_args(), [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (count, heads, tokens, channels) in SHAPES.items():
            qkv = torch.randn(count, tokens, 3, heads, channels, dtype=dtype, requires_grad=True)
            forms = {"fused": fused, "unfused": unfused}
            forward = in_turns({key: timed(form, qkv, False) for key, form in forms.items()}, asked.rounds)
            both = in_turns({key: timed(form, qkv, True) for key, form in forms.items()}, asked.rounds)
            precision = str(dtype).removeprefix("torch.")
            one = {"forward": ratios(forward, "unfused", "fused"), "both": ratios(both, "unfused", "fused")}
            found[f"{name}, {precision}"] = one
            rows.append([name, precision, *(shown(*one[part]) for part in ("forward", "both"))])
    print(table(["shape", "precision", "forward, unfused ÷ fused", "with backward, unfused ÷ fused"], rows))
    report(asked, {"ratios": found})


if __name__ == "__main__":
    main()
