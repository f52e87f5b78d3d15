"""What does a batch cost in which every image has an adapter of its own, beside one merged model?

    OMP_NUM_THREADS=1 python benchmarks/bank.py --quick                        # a minute
    OMP_NUM_THREADS=1 python benchmarks/bank.py --rounds 5 --lines FILE.jsonl  # as in docs/bank.md

Adapters are drawn at random. `mixed ÷ merged`: as many different adapters as images, beside the plain model, which is
what a merged one costs. `attached ÷ merged`: one adapter that is not merged, with `visgraft.attach`, beside it, which
is what the method itself costs. `one ÷ attached`: all images with one adapter of the bank, beside that model. All are
ratios of the same round, with their quartiles. `peft ÷ merged`: the same batch by huggingface/peft's `adapter_names`,
for LoRA of that rank on qkv, where peft is installed and takes the backbone. Then, for banks of several sizes: what
adding and swapping takes, and how much memory.

On a CPU all times are of the process, not of the clock, so that a busy machine disturbs them less. `--lines` appends
every result to a file as soon as it is there, of which `python benchmarks/bank_page.py` makes the tables of
docs/bank.md.
"""

import importlib.util
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import shared
import torch
from torch import nn

import visgraft
from visgraft.errors import SiteError
from visgraft.measure.precision import Compute

BACKBONES = "vit_small_patch16_224:224,vit_small_patch16_224:112,swin_tiny_patch4_window7_224:224"
METHODS = "alore,sct,lora,ssf,bitfit,adaptformer,vpt_deep"
RATIOS = (("mixed", "merged"), ("attached", "merged"), ("one", "attached"), ("peft", "merged"))
TIMES = ("swap ms", "file ms", "checked ms")
CPU = torch.device("cpu")
Line = dict[str, Any]


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


def row(backbone: str, method: str, images: int, precision: str, rounds: int) -> Line:
    """Return the ratios of one method on one backbone."""
    bank, model = visgraft.Bank(plain(backbone)), attached(plain(backbone), method)
    merged = plain(backbone)
    names = [f"{method} {number}" for number in range(images)]
    for name in names:
        bank.add(name, with_precision(redrawn(model), precision))
    x = torch.randn(images, *visgraft.model_data_config(merged)["input_size"])
    compute = Compute(CPU, precision)

    def run(one: Callable[[torch.Tensor], object]) -> object:
        with torch.no_grad(), compute.autocast():
            return one(x)

    parts = {
        "merged": lambda: run(merged),
        "attached": lambda: run(model),
        "one": lambda: bank(x, names[:1] * images),
        "mixed": lambda: bank(x, names),
    }
    others = peft_model(backbone, names) if method == "lora" else None
    if others is not None:
        parts["peft"] = lambda: run(lambda x: others(x, adapter_names=names))
    found = shared.in_turns({name: seconds_of(act) for name, act in parts.items()}, rounds)
    ratios = {f"{part} ÷ {bound}": shared.ratios(found, part, bound) for part, bound in RATIOS if part in parts}
    merged_ms = round(1000 * statistics.median(one["merged"] for one in found), 1)
    return {"kind": "batch", "backbone": backbone, "method": method, "precision": precision, "images": images,
            "merged ms": merged_ms, **ratios}  # fmt: skip


def seconds_of(act: Callable[[], object]) -> Callable[[], float]:
    """Return a function that returns the seconds of this process that a call takes."""
    return shared.seconds_of(act, CPU, clock=time.process_time)


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


def sizes(backbone: str, method: str, counts: Sequence[int], rounds: int) -> Iterator[Line]:
    """Yield what adding, swapping and loading take in banks of several sizes, and their memory."""
    bank, model = visgraft.Bank(plain(backbone)), attached(plain(backbone), method)
    adapted = visgraft.Adapted.of(redrawn(model))
    with tempfile.TemporaryDirectory() as place:
        file = visgraft.save(model, Path(place) / "adapter")
        stored = (file / "adapter_model.safetensors").stat().st_size
        for count in counts:
            for number in range(len(bank), count - 1):
                bank.add(str(number), adapted)
            parts = {
                "swap": seconds_of(lambda: bank.add("last", adapted, replace=True)),
                "file": seconds_of(lambda: bank.add("last", file, replace=True, canary=False)),
                "checked": seconds_of(lambda: bank.add("last", file, replace=True)),
            }
            found = shared.in_turns(parts, max(rounds, 9))
            times = {f"{part} ms": [round(1000 * t, 3) for t in shared.quartiles([one[part] for one in found])]
                     for part in parts}  # fmt: skip
            taken = bank.memory()
            held = taken.adapters + taken.heads
            yield {"kind": "bank", "backbone": backbone, "method": method, "adapters": count, **times,
                   "MiB": round(held / 2**20, 1), "held ÷ stored": round(held / (stored * count), 3)}  # fmt: skip


def cells(line: Line) -> list[str]:
    """Write a result as a row of a table."""
    names = [f"{part} ÷ {bound}" for part, bound in RATIOS] if line["kind"] == "batch" else TIMES
    told = [shown(line[name]) if name in line else "" for name in names]
    if line["kind"] == "batch":
        return [line["backbone"], line["method"], line["precision"], str(line["images"]), *told]
    return [
        line["backbone"],
        line["method"],
        f"{line['adapters']:,}",
        *told,
        str(line["MiB"]),
        str(line["held ÷ stored"]),
    ]


def shown(quartiles: Sequence[float]) -> str:
    """Write a median with its quartiles behind it."""
    low, middle, high = quartiles
    return shared.shown(low, middle, high, digits=2)


def listed(text: str) -> list[str]:
    """Return what is separated by commas."""
    return [part for part in text.split(",") if part]


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--backbones", default=BACKBONES, help="names of timm, each with an image size behind a colon")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--images", default="16,64")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--counts", default="1,64,1024,10000", help="adapters in the bank")
    parser.add_argument("--quick", action="store_true", help="one small backbone, 8 images, 3 rounds")
    parser.add_argument("--lines", type=Path, help="append every result to this file, a line of JSON each")
    asked = parser.parse_args()
    if asked.quick:
        asked.backbones, asked.images, asked.precisions, asked.rounds = "vit_tiny_patch16_224:112", "8", "fp32", 3
        asked.counts = "1,64,1024"
    torch.manual_seed(0)
    found: list[Line] = []

    def keep(line: Line) -> None:
        found.append(line)
        if asked.lines:
            with asked.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "rounds": asked.rounds, "machine": shared.machine()}) + "\n")

    for choice in itertools.product(*map(listed, (asked.backbones, asked.images, asked.precisions, asked.methods))):
        backbone, images, precision, method = choice
        try:
            keep(row(backbone, method, int(images), precision, asked.rounds))
        except SiteError as error:  # the method has no place there
            print(error)
    for line in sizes(listed(asked.backbones)[0], "alore", [int(n) for n in listed(asked.counts)], asked.rounds):
        keep(line)
    batches, banks = ([cells(line) for line in found if line["kind"] == kind] for kind in ("batch", "bank"))
    head = ["backbone", "method", "precision", "images", *(f"{part} ÷ {bound}" for part, bound in RATIOS)]
    print(shared.table(head, batches))
    print("\n" + shared.table(["backbone", "method", "adapters", *TIMES, "MiB", "held ÷ stored"], banks))
    shared.report(asked, {"lines": found})


if __name__ == "__main__":
    main()
