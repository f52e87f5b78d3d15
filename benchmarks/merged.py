"""Does a merged model cost anything beyond the plain one? The same operations, and the same time.

    python benchmarks/merged.py            # about 4 minutes on 2 cores

Every method is attached to a backbone with random weights, moved off its start, merged and stored; what is measured is
the model that timm opens from that folder (`local-dir:`). Its ordered list of aten operations with the shapes of
everything that enters and leaves them, and its module tree (paths and classes), must be those of a model that timm
made. Then a forward pass of the plain, the merged and the adapted model is timed in turns; a ratio is the median over
rounds of a time divided by the plain model's of the same round, with the quartiles beside it.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shared
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import visgraft
from visgraft.export.plain import save_plain
from visgraft.methods import get_method

BACKBONES = "vit_small_patch16_224,vit_base_patch16_224,swin_tiny_patch4_window7_224"
METHODS = "alore,lora,repadapter,ssf,sct"
OPTIONS: dict[str, dict[str, Any]] = {"sct": {"mode": "mlp", "score": "random"}}  # its mode attn does not merge
CLASSES = 100


class Operations(TorchDispatchMode):
    """Writes down every aten operation with the shapes of the tensors that enter and leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        entered, left = (
            [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(values)]
            for values in ((args, kwargs), result)
        )
        self.seen.append(f"{func} {entered} -> {left}")
        return result


def operations(model: nn.Module, x: Tensor) -> list[str]:
    """Return the operations of one forward pass [B, 3, H, W] in their order."""
    with torch.no_grad(), Operations() as found:
        model(x)
    return found.seen


def tree(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    """Return the path and the class of every module."""
    return [(path, type(module)) for path, module in model.named_modules()]


def forward(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """Return a function that makes one forward pass and returns its seconds."""

    def run() -> None:
        with torch.inference_mode():
            model(x)

    return shared.seconds_of(run, x.device)


def adapted(backbone: str, method: str) -> nn.Module:
    """Return a backbone with random weights and a method that has moved off its start."""
    model = timm.create_model(backbone, num_classes=CLASSES)
    visgraft.attach(model, get_method(method).Config(**OPTIONS.get(method, {})))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def measure(backbone: str, method: str, x: Tensor, rounds: int) -> dict[str, Any]:
    """Compare one merged model with the plain one."""
    plain = timm.create_model(backbone, num_classes=CLASSES).eval()
    model = adapted(backbone, method)
    merged, certificate = visgraft.merge(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = save_plain(merged, Path(folder) / "merged", [], visgraft.model_data_config(merged), certificate)
        opened = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    expected = operations(plain, x)
    found = shared.in_turns(
        {"plain": forward(plain, x), "merged": forward(opened, x), "adapted": forward(model, x)}, rounds
    )
    return {
        "backbone": backbone,
        "method": method,
        "operations": len(expected),
        "same_operations": operations(opened, x) == expected == operations(merged, x),
        "same_modules": tree(opened) == tree(plain) == tree(merged),
        "adapted_operations": len(operations(model, x)),
        "max_abs_difference": certificate.max_abs_difference,
        "plain_ms": round(1000 * shared.quartiles([one["plain"] for one in found])[1], 1),
        "merged": shared.ratios(found, "merged", "plain"),
        "adapted": shared.ratios(found, "adapted", "plain"),
    }


def main() -> None:
    """Print a table."""
    parser = shared.arguments(__doc__)
    parser.add_argument("--backbones", default=BACKBONES)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batch-size", type=int, default=2)
    asked = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for backbone in asked.backbones.split(","):
        for method in asked.methods.split(","):
            x = torch.randn(asked.batch_size, 3, 224, 224)
            rows.append(measure(backbone, method, x, asked.rounds))
    print(
        shared.table(
            ("backbone", "method", "operations", "same", "plain, ms", "merged ÷ plain", "adapted ÷ plain"),
            [
                (
                    row["backbone"],
                    row["method"],
                    f"{row['operations']} ({row['adapted_operations']} adapted)",
                    "yes" if row["same_operations"] and row["same_modules"] else "NO",
                    row["plain_ms"],
                    shared.shown(*row["merged"]),
                    shared.shown(*row["adapted"]),
                )
                for row in rows
            ],
        )
    )
    shared.report(asked, {"rows": rows})


if __name__ == "__main__":
    main()
