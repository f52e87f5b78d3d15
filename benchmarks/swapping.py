"""What does an adapter cost that comes as inputs of the ONNX graph, beside the one that is folded into its weights?

    python benchmarks/swapping.py --backbones vit_small_patch16_224,convnext_atto     # some minutes
    python benchmarks/swapping.py --backbones vit_small_patch16_224 --size 112 --images 16 --methods alore,lora,fact,sct

All graphs are written by visgraft, of random weights, and answer the same images in turn, by onnxruntime: the format
`onnx` (folded where the method folds), the one whose adapter is swapped between runs, and the mixed one, to which every
image brings its adapter as a row. The ratios are those of each round, with their quartiles.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import shared
import torch
from safetensors.numpy import load_file

import visgraft
from visgraft.backbones.input_size import input_size
from visgraft.export.onnx import open_session

DEVICE = torch.device("cpu")


def adapted_model(backbone: str, method: str, size: int | None) -> visgraft.Adapted:
    """Return a backbone of random weights with a method attached and moved off its start."""
    model = visgraft.create_backbone(visgraft.Backbone(backbone, "none", size), 10)
    batch = torch.randn(8, *input_size(model)), torch.arange(8)
    visgraft.attach(model, visgraft.list_methods()[method].Config(), [batch])
    with torch.no_grad():
        for trained in filter(lambda p: p.requires_grad, model.parameters()):
            trained.add_(0.02 * torch.randn_like(trained))
    return visgraft.Adapted.of(model.eval())


def row(adapted: visgraft.Adapted, images: int, rounds: int) -> list[str]:
    """Return what was measured for one adapter."""
    with tempfile.TemporaryDirectory() as place:
        merged, folder, both = (Path(place) / name for name in ("merged.onnx", "swapped", "mixed"))
        visgraft.export_model(adapted, merged)
        told = visgraft.export_model(adapted, folder, "onnx-adapter", name="one")
        begin = time.perf_counter()
        visgraft.export_model(adapted, both, "onnx-adapter", name="one", mixed=True)
        seconds = time.perf_counter() - begin
        whole, swapped, mixed = map(open_session, (merged, folder / "backbone.onnx", both / "backbone.onnx"))
        adapter, run = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(folder / "one.onnx_adapter"))
        run.add_active_adapter(adapter)
        noise = np.random.default_rng(0).normal(size=(images, *adapted.record.data_config["input_size"]))
        x = {"pixels": noise.astype(np.float32)}
        rows = {"adapters": np.stack([load_file(both / "one.safetensors")["row"]] * images)}
        parts = {
            "merged": shared.seconds_of(lambda: whole.run(None, x), DEVICE),
            "swapped": shared.seconds_of(lambda: swapped.run(None, x, run), DEVICE),
            "mixed": shared.seconds_of(lambda: mixed.run(None, x | rows), DEVICE),
        }
        found = shared.in_turns(parts, rounds)
    return [
        adapted.record.backbone.name,
        adapted.record.method.method,
        *(shared.shown(*shared.ratios(found, name, "merged"), digits=2) for name in ("swapped", "mixed")),
        f"{1000 * float(np.median([one['merged'] for one in found])) / images:.1f}",
        f"{1000 * told.facts['swap_seconds']:.3f}",
        f"{told.facts['adapter_bytes'] / 1000:.0f}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--backbones", default="vit_small_patch16_224,convnext_atto")
    parser.add_argument("--methods", default="alore,lora")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, help="pixels of an image's side; none: the backbone's own")
    asked = parser.parse_args()
    torch.manual_seed(0)
    found = [
        row(adapted_model(backbone, method, asked.size), asked.images, asked.rounds)
        for backbone in asked.backbones.split(",")
        for method in asked.methods.split(",")
    ]
    head = [
        "backbone", "method", "swapped ÷ merged", "mixed ÷ merged", "merged, ms/image", "loading a file, ms",
        "file, KB", "exporting mixed, s",
    ]  # fmt: skip
    print(shared.table(head, found))
    shared.report(asked, {"rows": found})


if __name__ == "__main__":
    main()
