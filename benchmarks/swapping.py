"""What does an adapter cost that comes as inputs of the ONNX graph, beside the one that is folded into its weights?

    python benchmarks/swapping.py --backbones vit_small_patch16_224,convnext_atto     # some minutes

Both graphs are written by visgraft, of random weights, and answer the same images in turn, by onnxruntime. The ratio is
that of each round, with its quartiles.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import shared
import torch

import visgraft
from visgraft.export.onnx import open_session

METHODS = {"alore": visgraft.ALoREConfig(), "lora": visgraft.LoRAConfig()}


def row(backbone: str, method: str, images: int, rounds: int) -> list[str]:
    """Return what was measured for one backbone and one method."""
    model = visgraft.create_backbone(visgraft.Backbone(backbone, "none"), 10)
    visgraft.attach(model, METHODS[method])
    with torch.no_grad():
        for trained in filter(lambda p: p.requires_grad, model.parameters()):
            trained.add_(0.02 * torch.randn_like(trained))
    adapted = visgraft.Adapted.of(model.eval())
    with tempfile.TemporaryDirectory() as place:
        merged, folder = Path(place) / "merged.onnx", Path(place) / "swapped"
        visgraft.export_model(adapted, merged)
        told = visgraft.export_model(adapted, folder, "onnx-adapter", name="one")
        whole, swapped = open_session(merged), open_session(folder / "backbone.onnx")
        adapter, run = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(folder / "one.onnx_adapter"))
        run.add_active_adapter(adapter)
        noise = np.random.default_rng(0).normal(size=(images, *adapted.record.data_config["input_size"]))
        x = {"pixels": noise.astype(np.float32)}
        device = torch.device("cpu")
        parts = {
            "merged": shared.seconds_of(lambda: whole.run(None, x), device),
            "swapped": shared.seconds_of(lambda: swapped.run(None, x, run), device),
        }
        rows = shared.in_turns(parts, rounds)
    return [
        backbone,
        method,
        shared.shown(*shared.ratios(rows, "swapped", "merged"), digits=2),
        f"{1000 * float(np.median([one['merged'] for one in rows])) / images:.1f}",
        f"{1000 * told.facts['swap_seconds']:.3f}",
        f"{told.facts['adapter_bytes'] / 1000:.0f}",
    ]


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--backbones", default="vit_small_patch16_224,convnext_atto")
    parser.add_argument("--methods", default="alore,lora")
    parser.add_argument("--images", type=int, default=8)
    asked = parser.parse_args()
    torch.manual_seed(0)
    found = [
        row(backbone, method, asked.images, asked.rounds)
        for backbone in asked.backbones.split(",")
        for method in asked.methods.split(",")
    ]
    head = ["backbone", "method", "swapped ÷ merged", "merged, ms/image", "loading a file, ms", "file, KB"]
    print(shared.table(head, found))
    shared.report(asked, {"rows": found})


if __name__ == "__main__":
    main()
