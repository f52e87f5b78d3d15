"""How long do attaching, loading and merging take, apart from what depends on images?

    python benchmarks/setup_time.py        # about a minute on 2 cores

On a ViT-B/16 with random weights. *Attach* is all of `visgraft.attach`, with the dry run on the meta device, for
options that need no images. *Load* is `visgraft.load` with a ready backbone; an adapter whose config holds no digest is
not checked against the backbone, and the difference is what hashing the backbone takes. *Merge* is
`visgraft.merge.folded`: the copy and the folding, without the certificate, which depends on how many images it is
measured on. The first call in the process, which also imports parts of PyTorch, is shown apart.
"""

import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shared
import timm
import torch
from torch import nn

import visgraft
from visgraft.adapters.directory import CONFIG
from visgraft.export.merge import folded
from visgraft.methods import get_method

METHODS = "alore,lora,repadapter,ssf,sct"
OPTIONS: dict[str, dict[str, Any]] = {"sct": {"mode": "mlp", "score": "random"}}  # its mode attn does not merge


def seconds(act: Callable[[], object]) -> float:
    """Return how long a call takes; garbage of earlier ones is collected before, and its result let go after."""
    gc.collect()
    start = time.perf_counter()
    result = act()
    found = time.perf_counter() - start
    del result
    return found


def without_digest(adapter: Path) -> None:
    """Take the backbone's digest out of an adapter's config."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    config["backbone"]["digest"] = None
    (adapter / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def measure(model: nn.Module, method: str, rounds: int, first: list[float]) -> dict[str, Any]:
    """Return the quartiles of every part, in seconds."""
    config = get_method(method).Config(**OPTIONS.get(method, {}))
    found: dict[str, list[float]] = {name: [] for name in ("attach", "load", "load_with_digest", "merge")}

    def load(name: str, path: Path) -> None:
        found[name].append(seconds(lambda: visgraft.load(path, backbone=model)))
        visgraft.detach(model)

    with tempfile.TemporaryDirectory() as folder:
        checked, unchecked = Path(folder) / "checked", Path(folder) / "unchecked"
        for _ in range(rounds + 1):
            found["attach"].append(seconds(lambda: visgraft.attach(model, config)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.01 * torch.randn_like(parameter))
            found["merge"].append(seconds(lambda: folded(model)))
            if not checked.exists():
                visgraft.save(model, checked)
                visgraft.save(model, unchecked)
                without_digest(unchecked)
            visgraft.detach(model)
            load("load", unchecked)
            load("load_with_digest", checked)
    first.append(found["attach"][0])
    return {"method": method} | {
        name: [round(value, 4) for value in shared.quartiles(values[1:])] for name, values in found.items()
    }


def main() -> None:
    """Print a table."""
    parser = shared.arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--methods", default=METHODS)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(asked.backbone, num_classes=100).eval()
    first: list[float] = []
    rows = [measure(model, method, asked.rounds, first) for method in asked.methods.split(",")]
    head = ("method", "attach, s", "load, s", "load with digest, s", "merge, s")
    print(shared.table(head, [(row["method"], *(shared.shown(*row[n]) for n in list(row)[1:])) for row in rows]))
    print(f"\nfirst attach in the process: {first[0]:.3f} s")
    shared.report(asked, {"rows": rows, "first_attach_s": first[0]})


if __name__ == "__main__":
    main()
