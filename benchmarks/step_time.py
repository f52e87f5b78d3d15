"""What does a training step cost beyond what no method can avoid? Ratios to a bound, in one process, rounds mixed.

    python benchmarks/step_time.py --methods sct,alore,lora --peers --json step.json
    python benchmarks/step_time.py --methods all --backbone swin_tiny_patch4_window7_224 --bf16

The bound is a step of the same frozen backbone without any method: the input of block 0 requires a gradient, so that
the backward pass reaches it as it must for any method that adapts block 0, and the head trains and is stepped; in bf16
its frozen weights are held in bf16 and attention is computed as it is for the methods. Every round times each candidate
once, in turned order, and the bound twice: a ratio is a time divided by the mean of its round's two bounds, and the
medians over rounds are shown with quartiles. The row `bound` is the first divided by that mean, which shows what the
machine's unrest does.

Beside it stands what a forward keeps for the backward pass: the bytes of all tensors that are still there when it ends,
parameters left out, divided by the bound's. Methods that leave the first blocks alone, and the linear probe, whose
backward pass ends at the head, may stay below 1.

With `--peers`, huggingface/peft's LoRA of rank 8 on qkv and on all linear layers runs beside (`pip install peft`). With
`--compile` every candidate is compiled by inductor first, into one graph.
"""

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from shared import arguments, in_turns, quartiles, report, seconds_of, shown, table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.core.attach import attach
from visgraft.core.finding import find_sites
from visgraft.errors import SiteError
from visgraft.measure.precision import frozen_weights_in_bf16, unfused_attention
from visgraft.methods import get_method, list_methods
from visgraft.training.allocation import freed_memory_kept


class Reached(torch.autograd.Function):
    """The identity; of the gradient that reaches it, one number goes on, to `start` [1].

    That keeps a compiler from leaving the backward pass out, as it does where nothing asks for its result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.flatten()[:1].float()


class NeedsGradient:
    """Forward pre-hook that makes a block's input require a gradient."""

    def __init__(self, device: torch.device) -> None:
        self.start = torch.zeros(1, device=device, requires_grad=True)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.start.grad = None
        return (Reached.apply(args[0], self.start), *args[1:])


def bound(model: nn.Module) -> nn.Module:
    """Freeze all but the head, and let the backward pass reach the input of block 0."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    first = find_sites(model).blocks[0]["stream.in"].host
    device = next(model.parameters()).device
    model.get_submodule(first).register_forward_pre_hook(NeedsGradient(device))
    return model.eval()


def peers(create: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """LoRA of huggingface/peft on qkv and on all linear layers, the head trained as in the others."""
    from peft import LoraConfig, get_peft_model

    targets: dict[str, Any] = {"qkv": ["qkv"], "all": ["qkv", "proj", "fc1", "fc2"]}
    return {
        f"peft lora, {name}": get_peft_model(
            create(), LoraConfig(r=8, lora_alpha=8, target_modules=modules, modules_to_save=["head"])
        ).train()
        for name, modules in targets.items()
    }


class Kept(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are still there, the model's own left out; each memory once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.own:
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = reference, storage.nbytes()
        return result

    def bytes(self) -> int:
        """Bytes of all that is alive."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept_bytes(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> int:
    """Bytes that a forward keeps for the backward pass."""
    with Kept(model) as kept:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        found = kept.bytes()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return found


def make_step(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Callable[[], None]:
    """Return a function that makes one training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def candidates(asked: argparse.Namespace, create: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Any:
    """Return {name: model} of the bound (twice), the methods and the peers, and {method: why it was refused}."""
    models: dict[str, nn.Module] = {"bound": bound(create()), "bound again": bound(create())}
    refused: dict[str, str] = {}
    for name in list_methods() if asked.methods == "all" else asked.methods.split(","):
        try:
            models[name] = attach(create(), get_method(name).Config(), [(x, y)]).train()
        except SiteError as error:
            if asked.methods != "all":
                raise
            refused[name] = str(error)
    if asked.checkpointing:
        for name in [name for name in models if not name.startswith("bound")]:
            models[f"{name}, checkpointing"] = copy.deepcopy(models[name])
            models[f"{name}, checkpointing"].set_grad_checkpointing(True)
    if asked.peers:
        models |= peers(create)
    return models, refused


def measure(models: dict[str, nn.Module], x: Tensor, y: Tensor, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every candidate."""
    kept = {name: kept_bytes(model, x, y, asked.bf16) for name, model in models.items()}
    if asked.compile:
        torch._dynamo.config.recompile_limit = 2 * len(models)  # all share the code of one class
        models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}
    steps = {name: seconds_of(make_step(model, x, y, asked.bf16), x.device) for name, model in models.items()}
    rounds = in_turns(steps, asked.rounds)
    result: dict[str, Any] = {"bound_ms": 1000 * statistics.median(r["bound"] for r in rounds)}
    for name in steps:
        ratios = [2 * r[name] / (r["bound"] + r["bound again"]) for r in rounds]
        low, middle, high = (round(value, 3) for value in quartiles(ratios))
        result[name] = {"low": low, "ratio": middle, "high": high, "kept": round(kept[name] / kept["bound"], 3)}
    return result


def main() -> None:
    """Print a table; with `--json`, write the figures to a file."""
    parser = arguments(__doc__)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--methods", default="sct,alore,lora")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="each method with --grad-checkpointing as well")
    parser.add_argument("--peers", action="store_true")
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    size, count = asked.image_size, asked.batch_size
    x, y = torch.randn(count, 3, size, size, device=device), torch.randint(10, (count,), device=device)

    def create() -> nn.Module:
        torch.manual_seed(0)
        return create_backbone(Backbone(asked.backbone, "none", size), 10).to(device)

    models, refused = candidates(asked, create, x, y)
    with contextlib.ExitStack() as stack:
        stack.enter_context(freed_memory_kept(models["bound"]))
        for model in models.values():
            stack.enter_context(frozen_weights_in_bf16(model, asked.bf16))
            stack.enter_context(unfused_attention(model, asked.bf16))
        figures = measure(models, x, y, asked)
    names = [name for name in figures if name != "bound_ms"]
    rows = [
        [name, shown(*(figures[name][k] for k in ("low", "ratio", "high"))), figures[name]["kept"]] for name in names
    ]
    print(f"bound: {figures['bound_ms']:.0f} ms\n")
    print(table(["", "step ÷ bound", "bytes kept ÷ bound's"], rows))
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    report(asked, {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "refused": refused, **figures})


if __name__ == "__main__":
    main()
