"""Measure what keeping freed memory in the process saves of a training step on a CPU.

    python benchmarks/allocation.py --methods alore,ssf,full --bf16
    python benchmarks/allocation.py --backbone vit_base_patch16_224 --image-size 224 --batch-size 16 --rounds 2

Each measurement is a process of its own, since an allocator keeps what it has learned; processes with and without
alternate. A ratio is the median step of a process that keeps freed memory divided by that of the one beside it that
does not. Page faults are per step, peak memory is of the process.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from shared import arguments, quartiles, report, seconds_of, shown, table
from step_time import make_step

from visgraft import attach
from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.measure.precision import frozen_weights_in_bf16, unfused_attention
from visgraft.methods import get_method
from visgraft.training.allocation import freed_memory_kept

STEPS = 9


def one(asked: argparse.Namespace, method: str, keep: bool) -> dict[str, float]:
    """Train some steps; return the median seconds, page faults per step and peak memory in GB."""
    torch.manual_seed(0)
    x = torch.randn(asked.batch_size, 3, asked.image_size, asked.image_size)
    y = torch.randint(10, (len(x),))
    backbone = Backbone(asked.backbone, "none", asked.image_size)
    model = attach(create_backbone(backbone, 10), get_method(method).Config(), [(x, y)]).train()
    with contextlib.ExitStack() as stack:
        if keep:
            stack.enter_context(freed_memory_kept(model))
        stack.enter_context(frozen_weights_in_bf16(model, asked.bf16))
        stack.enter_context(unfused_attention(model, asked.bf16))
        step = seconds_of(make_step(model, x, y, asked.bf16), x.device)
        for _ in range(3):
            step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = median(step() for _ in range(STEPS))
        usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "faults": (usage.ru_minflt - before) / STEPS, "peak": usage.ru_maxrss * 1024 / 1e9}


def child(method: str, keep: bool) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, *sys.argv, "--child", method, *(["--keep"] if keep else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def compared(method: str, rounds: int) -> dict[str, Any]:
    """Return a method's figures."""
    pairs = [(child(method, False), child(method, True)) for _ in range(rounds)]

    def middle(kept: int, name: str) -> float:
        return median(pair[kept][name] for pair in pairs)

    ratios = [kept["seconds"] / usual["seconds"] for usual, kept in pairs]
    low, ratio, high = quartiles(ratios) if len(ratios) > 1 else ratios * 3
    names = ("seconds", "faults", "peak")
    return {"low": low, "ratio": ratio, "high": high, **{n: [middle(k, n) for k in (0, 1)] for n in names}}


def rows(found: dict[str, dict[str, Any]]) -> Sequence[Sequence[object]]:
    """Return the lines of the table."""
    return [
        [
            method,
            f"{one['seconds'][0]:.3f}",
            shown(one["low"], one["ratio"], one["high"]),
            " → ".join(f"{faults:,.0f}" for faults in one["faults"]),
            " → ".join(f"{peak:.2f}" for peak in one["peak"]),
        ]
        for method, one in found.items()
    ]


def main() -> None:
    """Print a table; with `--json`, write the figures to a file."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--methods", default="alore,ssf,full")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(one(asked, asked.child, asked.keep)))
        return
    found = {method: compared(method, asked.rounds) for method in asked.methods.split(",")}
    heads = ("method", "step, s", "kept ÷ usual", "page faults per step", "peak memory, GB")
    print(table(heads, rows(found)))
    report(asked, found)


if __name__ == "__main__":
    main()
