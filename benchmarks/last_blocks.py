"""What does a step cost where only the last K blocks are adapted? Ratios to the bound of `step_time.py`.

    python benchmarks/last_blocks.py --method lora --blocks 1,3,6,12
    python benchmarks/last_blocks.py --backbone vit_base_patch16_224 --batch-size 8 --json last-blocks.json

The bound is a step of the same frozen backbone whose backward pass reaches block 0. Each K is measured on images, where
the frozen blocks run forward in every step, and on what enters the first adapted block, computed once. Rounds are mixed
and turned as in `step_time.py`: a ratio is the median over rounds of a time divided by the same round's bound. The
bytes are those of the tensors that autograd keeps from the forward pass for the backward pass, parameters and buffers
left out.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from step_time import bound, make_step
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.attach import attach
from visgraft.backbone import Backbone, create_backbone
from visgraft.prefix import Tail, enter, find_cut
from visgraft.registry import get_method


def kept_bytes(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> int:
    """Return the bytes of the storages kept between the forward and the backward pass, each counted once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(x.device.type, torch.bfloat16, enabled=bf16),
    ):
        loss = F.cross_entropy(model(x).float(), y)
        total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def networks(arguments: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the bound and, for every K, the whole network with images and the tail with what enters it."""

    def create() -> nn.Module:
        torch.manual_seed(0)
        return create_backbone(Backbone(arguments.backbone, "none", arguments.image_size), 10).to(x.device)

    found: dict[str, tuple[nn.Module, Tensor]] = {"bound": (bound(create()), x)}
    for count in map(int, arguments.blocks.split(",")):
        model = attach(create(), get_method(arguments.method).Config(last_blocks=count), [(x, y)])
        found[f"{count} images"] = (model, x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=arguments.bf16):
            cut = find_cut(model, x[:2])
            if cut is not None:
                with torch.no_grad():
                    found[f"{count} kept"] = (Tail(model, cut, x), enter(model, cut, x))
        model.train()
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the ratios of every network to the bound."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size, count = arguments.image_size, arguments.batch_size
    x, y = torch.randn(count, 3, size, size, device=device), torch.randint(10, (count,), device=device)
    models = networks(arguments, x, y)
    kept = {name: kept_bytes(model, entering, y, arguments.bf16) for name, (model, entering) in models.items()}
    steps = {name: make_step(model, entering, y, arguments.bf16) for name, (model, entering) in models.items()}
    for step in steps.values():
        step()
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        names = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        rounds.append({name: steps[name]() for name in names})
    result: dict[str, Any] = {
        "device": str(device), "threads": torch.get_num_threads(), **vars(arguments),
        "bound_ms": 1000 * statistics.median(r["bound"] for r in rounds), "bound_bytes": kept["bound"], "rows": [],
    }  # fmt: skip
    for name in list(steps)[1:]:
        low, middle, high = statistics.quantiles((r[name] / r["bound"] for r in rounds), n=4)
        blocks, source = name.split()
        result["rows"].append(
            {
                "blocks": int(blocks), "source": source, "time": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)], "bytes": round(kept[name] / kept["bound"], 3),
                "input_bytes": models[name][1].nbytes // count,
            }
        )  # fmt: skip
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: one row for every K."""
    lines = [
        "| last blocks | step, frozen blocks in every step | step, frozen blocks run once | bytes kept for backward |",
        "|---|---|---|---|",
    ]
    rows = {(row["blocks"], row["source"]): row for row in result["rows"]}
    for blocks in dict.fromkeys(row["blocks"] for row in result["rows"]):
        cells = [
            f"{row['time']:.2f} ({row['quartiles'][0]:.2f}–{row['quartiles'][1]:.2f})" if row else "–"
            for row in (rows.get((blocks, source)) for source in ("images", "kept"))
        ]
        kept = rows.get((blocks, "kept"), rows[blocks, "images"])
        lines.append(f"| {blocks} | {cells[0]} | {cells[1]} | {kept['bytes']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and write one JSON document where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--blocks", default="1,3,6,12")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    print(f"{arguments.method} on {arguments.backbone}, bound {result['bound_ms']:.0f} ms\n\n{table(result)}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**result, "json": str(arguments.json)}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
