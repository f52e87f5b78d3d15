"""What does a step cost where only the last K blocks are adapted? Ratios to the bound of `step_time.py`.

    python benchmarks/last_blocks.py --method lora --blocks 1,3,6,12
    python benchmarks/last_blocks.py --backbone vit_base_patch16_224 --batch-size 8 --json last-blocks.json

The bound is a step of the same frozen backbone whose backward pass reaches block 0. Each K is measured on images, where
the frozen blocks run forward in every step, and on what enters the first adapted block, computed once. Rounds are mixed
and turned, and bytes counted, as in `step_time.py`: a ratio is the median over rounds of a time divided by the same
round's bound.
"""

import argparse
import contextlib

import torch
from shared import arguments, in_turns, ratios, report, seconds_of, shown, table
from step_time import bound, kept_bytes, make_step
from torch import Tensor, nn

from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.core.attach import attach
from visgraft.measure.precision import frozen_weights_in_bf16, unfused_attention
from visgraft.methods import get_method
from visgraft.training.allocation import freed_memory_kept
from visgraft.training.prefix import Tail, enter, find_cut


def networks(asked: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the bound and, for every K, the whole network with images and the tail with what enters it."""

    def create() -> nn.Module:
        torch.manual_seed(0)
        return create_backbone(Backbone(asked.backbone, "none", asked.image_size), 10).to(x.device)

    found: dict[str, tuple[nn.Module, Tensor]] = {"bound": (bound(create()), x)}
    for count in map(int, asked.blocks.split(",")):
        model = attach(create(), get_method(asked.method).Config(last_blocks=count), [(x, y)])
        found[f"{count} images"] = (model, x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=asked.bf16):
            cut = find_cut(model, x[:2])
            if cut is not None:
                with torch.no_grad():
                    found[f"{count} kept"] = (Tail(model, cut, x), enter(model, cut, x))
        model.train()
    return found


def main() -> None:
    """Print a table; with `--json`, write the figures to a file."""
    parser = arguments(__doc__)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--blocks", default="1,3,6,12")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size, count = asked.image_size, asked.batch_size
    x, y = torch.randn(count, 3, size, size, device=device), torch.randint(10, (count,), device=device)
    models = networks(asked, x, y)
    with contextlib.ExitStack() as stack:
        stack.enter_context(freed_memory_kept(models["bound"][0]))
        for model, _ in models.values():
            stack.enter_context(frozen_weights_in_bf16(model, asked.bf16))
            stack.enter_context(unfused_attention(model, asked.bf16))
        kept = {name: kept_bytes(model, entering, y, asked.bf16) for name, (model, entering) in models.items()}
        steps = {
            name: seconds_of(make_step(model, entering, y, asked.bf16), y.device)
            for name, (model, entering) in models.items()
        }
        rounds = in_turns(steps, asked.rounds)
    figures = {name: ratios(rounds, name, "bound") for name in models}
    shares = {name: round(kept[name] / kept["bound"], 3) for name in models}
    rows = []
    for blocks in asked.blocks.split(","):
        images, once = f"{blocks} images", f"{blocks} kept"
        last = once if once in figures else images
        rows.append([blocks, *(shown(*figures[n]) if n in figures else "–" for n in (images, once)), shares[last]])
    head = ["last blocks", "step, frozen blocks in every step", "step, frozen blocks run once", "bytes kept"]
    print(f"{asked.method} on {asked.backbone}\n\n{table(head, rows)}")
    report(asked, {"device": str(device), "steps": figures, "kept": shares})


if __name__ == "__main__":
    main()
