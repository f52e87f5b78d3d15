"""What does a training step cost beyond what no method can avoid? Ratios to a bound, in one process, rounds mixed.

    python benchmarks/step_time.py --methods sct,alore,lora --image-size 224 --batch-size 16
    python benchmarks/step_time.py --methods all --backbone swin_tiny_patch4_window7_224

The bound is a step of the same frozen backbone without any method: the input of block 0 requires a gradient, so that
the backward pass reaches it as it must for any method that adapts block 0, and the head trains and is stepped. Every
round times the bound and each method once, in turned order; a method's ratio is the median over rounds of its time
divided by the same round's bound, with the quartiles beside it. Methods that leave the first blocks alone, and the
linear probe, whose backward pass ends at the head, may stay below 1.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.attach import attach
from visgraft.backbone import Backbone, create_backbone
from visgraft.errors import SiteError
from visgraft.finding import find_sites
from visgraft.registry import get_method, methods


class NeedsGradient:
    """Forward pre-hook that makes a block's input require a gradient."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].detach().requires_grad_(), *args[1:])


def bound(model: nn.Module) -> nn.Module:
    """Freeze all but the head, and let the backward pass reach the input of block 0."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    first = find_sites(model).blocks[0]["stream.in"].host
    model.get_submodule(first).register_forward_pre_hook(NeedsGradient())
    return model.eval()


def make_step(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Callable[[], float]:
    """Return a function that makes one training step and returns its seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    cuda = x.device.type == "cuda"

    def step() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Time and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--methods", default="sct,alore,lora")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size, count = arguments.image_size, arguments.batch_size
    x, y = torch.randn(count, 3, size, size, device=device), torch.randint(10, (count,), device=device)

    def create() -> nn.Module:
        torch.manual_seed(0)
        return create_backbone(Backbone(arguments.backbone, "none", size), 10).to(device)

    models, refused = {"bound": bound(create())}, {}
    for name in methods() if arguments.methods == "all" else arguments.methods.split(","):
        try:
            models[name] = attach(create(), get_method(name).Config(), [(x, y)]).train()
        except SiteError as error:
            if arguments.methods != "all":
                raise
            refused[name] = str(error)
    steps = {name: make_step(model, x, y, arguments.bf16) for name, model in models.items()}
    for step in steps.values():
        step()
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        names = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        rounds.append({name: steps[name]() for name in names})
    result = {"device": str(device), "threads": torch.get_num_threads(), **vars(arguments), "refused": refused}
    result["bound_ms"] = 1000 * statistics.median(r["bound"] for r in rounds)
    for name in list(steps)[1:]:
        low, middle, high = statistics.quantiles((r[name] / r["bound"] for r in rounds), n=4)
        result[name] = {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
