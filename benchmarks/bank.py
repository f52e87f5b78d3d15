"""What does a batch cost in which every image has an adapter of its own, beside one merged model?

    OMP_NUM_THREADS=1 python benchmarks/bank.py --quick          # a minute
    python benchmarks/bank.py --rounds 7                         # as in docs/bank.md

Adapters are drawn at random. `mixed ÷ merged`: as many different adapters as images, beside the plain model, which is
what a merged one costs. `one ÷ attached`: all images with one adapter, beside the model that `visgraft.attach` gives.
Both are ratios of the same round, with their quartiles. `peft ÷ merged`: the same batch by huggingface/peft's
`adapter_names`, for LoRA of that rank on qkv, where peft is installed and takes the backbone. Then, for banks of
several sizes: what adding and swapping takes, and how much memory.
"""

import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shared
import torch
from torch import nn

import visgraft
from visgraft.measure.precision import Compute

BACKBONES = "vit_small_patch16_224:224,vit_small_patch16_224:112,swin_tiny_patch4_window7_224:224"
METHODS = "alore,sct,lora,ssf,bitfit,adaptformer,vpt_deep"


def redrawn(model: nn.Module) -> nn.Module:
    """Move all that trains a little, at random."""
    with torch.no_grad():
        for trained in filter(lambda p: p.requires_grad, model.parameters()):
            trained.add_(0.02 * torch.randn_like(trained))
    return model.eval()


def plain(backbone: str) -> nn.Module:
    name, size = backbone.split(":")
    model = visgraft.create_backbone(visgraft.Backbone(name, "none", int(size)), 10)
    return model.eval().requires_grad_(False)


def attached(model: nn.Module, method: str) -> nn.Module:
    """Return another model of the same backbone with the method attached."""
    options = {"score": "random"} if method == "sct" else {}
    return visgraft.attach(model, visgraft.list_methods()[method].Config(**options))


def row(backbone: str, method: str, images: int, precision: str, rounds: int) -> list[str]:
    """Return the ratios of one method on one backbone."""
    bank, model = visgraft.Bank(plain(backbone)), attached(plain(backbone), method)
    merged = plain(backbone)
    names = [f"{method} {number}" for number in range(images)]
    for name in names:
        bank.add(name, with_precision(redrawn(model), precision))
    x = torch.randn(images, *visgraft.model_data_config(merged)["input_size"])
    device = torch.device("cpu")
    compute = Compute(device, precision)

    def run(one: Callable[[torch.Tensor], object]) -> object:
        with torch.no_grad(), compute.autocast():
            return one(x)

    parts = {
        "merged": shared.seconds_of(lambda: run(merged), device),
        "attached": shared.seconds_of(lambda: run(model), device),
        "one": shared.seconds_of(lambda: bank(x, names[:1] * images), device),
        "mixed": shared.seconds_of(lambda: bank(x, names), device),
    }
    others = peft_model(backbone, names) if method == "lora" else None
    if others is not None:
        parts["peft"] = shared.seconds_of(lambda: run(lambda x: others(x, adapter_names=names)), device)
    found = shared.in_turns(parts, rounds)
    mixed, one = shared.ratios(found, "mixed", "merged"), shared.ratios(found, "one", "attached")
    told = [shared.shown(*ratio, digits=2) for ratio in (mixed, one)]
    told.append("" if others is None else shared.shown(*shared.ratios(found, "peft", "merged"), digits=2))
    return [backbone, method, precision, str(images), *told]


def peft_model(backbone: str, names: Sequence[str]) -> Any:
    """Return the backbone with as many LoRA adapters of peft; None where peft is missing or does not take it."""
    if importlib.util.find_spec("peft") is None or not backbone.startswith("vit"):
        return None
    import peft

    rank = visgraft.LoRAConfig().rank
    config = peft.LoraConfig(r=rank, target_modules=["qkv"], init_lora_weights=False)
    model = peft.get_peft_model(plain(backbone), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def with_precision(model: nn.Module, precision: str) -> visgraft.Adapted:
    """Return a model with a record that says how its adapter was trained."""
    adapted = visgraft.Adapted.of(model)
    return visgraft.Adapted(model, type(adapted.record)(**{**vars(adapted.record), "precision": precision}))


def sizes(backbone: str, method: str, counts: list[int], rounds: int) -> list[list[str]]:
    """Return what adding, swapping and loading take in banks of several sizes, and their memory."""
    bank, model, rows = visgraft.Bank(plain(backbone)), attached(plain(backbone), method), []
    adapted, device = visgraft.Adapted.of(redrawn(model)), torch.device("cpu")
    with tempfile.TemporaryDirectory() as place:
        file = visgraft.save(model, Path(place) / "adapter")
        stored = (file / "adapter_model.safetensors").stat().st_size
        for count in counts:
            for number in range(len(bank), count - 1):
                bank.add(str(number), adapted)

            def add() -> None:
                bank.add("last", adapted, replace=True)

            def load(canary: bool) -> None:
                bank.add("last", file, replace=True, canary=canary)

            parts = {
                "swap": shared.seconds_of(add, device),
                "file": shared.seconds_of(lambda: load(False), device),
                "checked": shared.seconds_of(lambda: load(True), device),
            }
            found = shared.in_turns(parts, rounds)
            times = [shared.quartiles([1000 * one[part] for one in found]) for part in parts]
            taken = bank.memory()
            share = (taken.adapters + taken.heads) / (stored * count)
            rows.append([backbone, method, str(count), *(shared.shown(*t, digits=2) for t in times),
                         f"{(taken.adapters + taken.heads) / 2**20:.1f}", f"{share:.3f}"])  # fmt: skip
    return rows


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--backbones", default=BACKBONES, help="names of timm, each with an image size behind a colon")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--images", default="16,64")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--counts", default="1,64,1024", help="adapters in the bank")
    parser.add_argument("--quick", action="store_true", help="one small backbone, 8 images, 3 rounds")
    asked = parser.parse_args()
    if asked.quick:
        asked.backbones, asked.images, asked.precisions, asked.rounds = "vit_tiny_patch16_224:112", "8", "fp32", 3
    torch.manual_seed(0)
    found: list[Any] = []
    for choice in itertools.product(asked.backbones.split(","), asked.images.split(","), asked.precisions.split(",")):
        backbone, images, precision = choice
        found += [row(backbone, m, int(images), precision, asked.rounds) for m in asked.methods.split(",")]
    head = ["backbone", "method", "precision", "images", "mixed ÷ merged", "one ÷ attached", "peft ÷ merged"]
    print(shared.table(head, found))
    held = sizes(asked.backbones.split(",")[0], "alore", [int(n) for n in asked.counts.split(",")], asked.rounds)
    head = ["backbone", "method", "adapters", "swap, ms", "file, ms", "file with canary, ms", "MiB", "÷ stored"]
    print("\n" + shared.table(head, held))
    shared.report(asked, {"rows": found, "sizes": held})


if __name__ == "__main__":
    main()
