"""What do several processes bring to one training? Images per second and memory, against one process.

    python benchmarks/several_processes.py --processes 2 --json several.json
    python benchmarks/several_processes.py --processes 8 --batch-size 256 --backbone vit_base_patch16_224    # on 8 GPUs

On a CPU one process has as many threads as there are processes, and several have one each, so that both use the same
cores; on GPUs each process has one. Both train the same images in the same steps. Images per second are those of the
median of `--rounds` epochs after one that does not count; memory is the largest of any process. The column `apart` says
how far the weights are from one process's, as a part of the way that these went.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from shared import arguments, report, table

WORKER = "VISGRAFT_BENCHMARK_WORKER"


def work(asked: argparse.Namespace, out: Path) -> None:
    """Train in this process, together with those started with it, and write what it took."""
    import safetensors.torch

    from visgraft import Images, TrainConfig, attach
    from visgraft.adapters.directory import adapter_tensors
    from visgraft.backbones.creation import Backbone, create_backbone
    from visgraft.executors import distributed
    from visgraft.measure.evaluation import peak_memory_bytes
    from visgraft.methods import get_method
    from visgraft.training.loop import train

    distributed.join()
    count = asked.steps * asked.batch_size
    draws, labels = torch.Generator().manual_seed(0), torch.arange(count) % 10
    pixels = torch.randint(0, 256, (count, 3, asked.image_size, asked.image_size), generator=draws, dtype=torch.uint8)
    images = Images(pixels, labels, (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    model = create_backbone(Backbone(asked.backbone, "none", asked.image_size), 10)
    attach(model, get_method(asked.method).Config(), images.batches())
    start = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    ends = [time.perf_counter()]
    train(
        model,
        images,
        TrainConfig(
            epochs=asked.rounds + 1, batch_size=asked.batch_size, warmup_epochs=0.0, precision=asked.precision,
            gradient_accumulation=asked.gradient_accumulation,
        ),
        on_progress=lambda epoch: ends.append(time.perf_counter()) if epoch.complete else None,
    )  # fmt: skip
    epochs = [later - earlier for earlier, later in pairwise(ends[1:])]
    found = {"images_per_second": count / statistics.median(epochs), "memory": peak_memory_bytes()}
    out.with_suffix(f".{distributed.rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    if distributed.is_first():
        moved = {f"start/{name}": tensor for name, tensor in start.items()} | adapter_tensors(model)
        safetensors.torch.save_file(moved, out.with_suffix(".safetensors"))
    distributed.leave()


def measure(asked: argparse.Namespace, processes: int, out: Path) -> dict[str, Any]:
    """Train in so many processes, and return images per second and the largest memory."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    threads = 1 if processes > 1 else asked.processes
    running = []
    for rank in range(processes):
        more = {"OMP_NUM_THREADS": threads, WORKER: out}
        if processes > 1:
            more |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            more |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in more.items()}
        running.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    if any(process.wait() for process in running):
        raise SystemExit("a process failed; its error stands above")
    told = [json.loads(out.with_suffix(f".{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    return {
        "processes": processes,
        "threads of each": threads,
        "images_per_second": round(told[0]["images_per_second"], 2),
        "memory_mb": round(max(one["memory"] for one in told) / 1e6),
    }


def apart(one: Path, several: Path) -> float:
    """Return the distance of two trainings' weights, as a part of the way that the first went."""
    import safetensors.torch

    first, second = (safetensors.torch.load_file(path.with_suffix(".safetensors")) for path in (one, several))
    trained = [name for name in first if not name.startswith("start/") and first[name].is_floating_point()]
    far = sum((first[name] - second[name]).square().sum().item() for name in trained)
    went = sum((first[name] - first[f"start/{name}"]).square().sum().item() for name in trained)
    return float((far / went) ** 0.5)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--method", default="alore")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of an epoch")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    asked = parser.parse_args()
    if worker := os.environ.get(WORKER):
        work(asked, Path(worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {count: Path(folder) / str(count) for count in (1, asked.processes)}
        rows = [measure(asked, count, file) for count, file in files.items()]
        rows[0]["apart"], rows[1]["apart"] = 0.0, float(f"{apart(*files.values()):.1e}")
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(f"device: {device}")
    report(asked, {"device": device, "rows": rows})


if __name__ == "__main__":
    main()
