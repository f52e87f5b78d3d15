"""A server under load: locust's clients ask for many adapters while others come and go, and every answer is compared.

`python benchmarks/serve.py --quick` takes two minutes; without it, 200 clients ask for 10 minutes. Loopback only. Needs
`pip install locust` beside `visgraft[serve]`. The server and the clients share this machine's cores, so a throughput
with clients beside it is a lower bound; the plain loops it is compared with run alone, on the same pictures: a merged
model, and the bank on batches of all adapters. So images per CPU second of the server stand beside them too. With
`--apart` the server has one core to itself, as the loops had before it, and the clients have the others.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import psutil
import torch
from PIL import Image

import visgraft
from visgraft.adapters.directory import CONFIG, TENSORS
from visgraft.bank.opening import load_bank

HERE = Path(__file__).resolve().parent
PICTURES, SIDE = 40, 256
CLIENTS = HERE / "serve_clients.py"


def draw(folder: Path) -> list[Path]:
    """Write pictures with some structure as JPEG files."""
    generator, found = np.random.default_rng(0), []
    for number in range(PICTURES):
        coarse = Image.fromarray(generator.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        found.append(folder / f"{number:02}.jpg")
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(found[-1], quality=90)
    return found


def make_adapters(folder: Path, spec: visgraft.Backbone, count: int) -> list[Path]:
    """Write adapters of four methods, moved off their start."""
    kinds = [visgraft.ALoREConfig, visgraft.LoRAConfig, visgraft.SSFConfig, visgraft.BitFitConfig]
    torch.manual_seed(0)
    models = [visgraft.attach(visgraft.create_backbone(spec, 10), kind()) for kind in kinds]
    found = []
    for number in range(count):
        model = models[number % len(models)]
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0, 0.02)
        found.append(visgraft.save(model, folder / f"a{number:03}", classes=[f"class {i}" for i in range(10)]))
    return found


def expected(paths: list[Path], pictures: list[Path]) -> dict[str, dict[str, list[float]]]:
    """Return what `predict` says: by adapter and picture the probabilities in the order of the classes."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in visgraft.predict_stream(paths, pictures, top=10):
        by_class = dict(row.classes)
        found.setdefault(Path(row.adapter).name, {})[row.image.name] = [by_class[f"class {i}"] for i in range(10)]
    return found


class Rate(NamedTuple):
    """How quick something is."""

    per_second: float
    per_cpu_second: float


def loop_rate(answer: Callable[[list[Path], int], object], pictures: list[Path], seconds: float) -> Rate:
    """Time a loop over batches of 32 pictures; `answer` gets their paths and the batch's number."""
    answer(pictures[:32], 0)
    done, begin, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        answer([pictures[(done + i) % len(pictures)] for i in range(32)], done // 32)
        done += 32
    return Rate(done / (time.perf_counter() - begin), done / (time.process_time() - cpu))


def loops(paths: list[Path], pictures: list[Path], seconds: float) -> dict[str, Rate]:
    """Decode, prepare and answer: by one merged model, and by the bank, each picture with another adapter."""
    adapted, bank = visgraft.load(paths[0]), load_bank(paths)
    merged, _ = visgraft.merge(adapted.model)
    names = bank.names

    def prepared(chosen: list[Path]) -> torch.Tensor:
        return torch.stack([adapted.transform(Image.open(path).convert("RGB")) for path in chosen])

    def by_model(chosen: list[Path], number: int) -> object:
        return merged(prepared(chosen))

    def by_bank(chosen: list[Path], number: int) -> object:
        return bank(prepared(chosen), [names[(number + i) % len(names)] for i in range(len(chosen))])

    with torch.inference_mode():
        return {"merged": loop_rate(by_model, pictures, seconds), "bank": loop_rate(by_bank, pictures, seconds)}


def one_alone(port: int, picture: bytes, adapter: str, rounds: int = 30) -> float:
    """Return the median seconds of a request when there is no other."""
    seconds = []
    for _ in range(rounds):
        request = Request(f"http://127.0.0.1:{port}/predict?adapter={adapter}", picture, {"Content-Type": "image/jpeg"})
        begin = time.perf_counter()
        with urlopen(request) as reply:
            reply.read()
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[rounds // 2]


def forward_alone(path: Path, picture: Path, rounds: int = 30) -> float:
    """Return the median seconds to decode, prepare and answer one picture without a server."""
    adapted, seconds = visgraft.load(path), []
    for _ in range(rounds):
        begin = time.perf_counter()
        with torch.inference_mode():
            adapted.model(adapted.transform(Image.open(picture).convert("RGB"))[None])
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[rounds // 2]


def start(store: Path, adapters: Path, errors: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a server; returns it and its port, once it is ready."""
    words = [
        sys.executable,
        "-m",
        "visgraft",
        "serve",
        "--adapters",
        str(adapters),
        "--port",
        "0",
        "--store",
        str(store),
    ]
    with errors.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline().split("://")[1].split(",")[0].rsplit(":", 1)[1])
    for _ in range(600):
        try:
            with urlopen(f"http://127.0.0.1:{port}/v2/health/ready") as reply:
                if reply.status == 200:
                    return process, port
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(errors.read_text()[-2000:])


def swap(port: int, paths: list[Path], ending: threading.Event, counts: dict[str, int]) -> None:
    """Add and remove adapters under other names until the end."""
    from urllib3.filepost import encode_multipart_formdata

    number = 0
    while not ending.wait(0.5):
        path, name = paths[number % len(paths)], f"guest-{number % 7}"
        files = {"config": ("c", (path / CONFIG).read_bytes()), "tensors": ("t", (path / TENSORS).read_bytes())}
        body, kind = encode_multipart_formdata(files)
        for method, data in (("PUT", body), ("DELETE", None)):
            headers = {"Content-Type": kind} if data else {}
            address = f"http://127.0.0.1:{port}/adapters/{name}"
            with urlopen(Request(address, data, headers, method=method)) as reply:
                counts[f"{method} {reply.status}"] = counts.get(f"{method} {reply.status}", 0) + 1
        number += 1


def load(port: int, folder: Path, clients: int, seconds: int) -> dict[str, Any]:
    """Let locust's clients ask; returns its figures."""
    words = [
        sys.executable, "-m", "locust", "-f", str(CLIENTS), "--headless", "--users", str(clients), "--spawn-rate",
        str(max(clients // 5, 1)), "--run-time", f"{seconds}s", "--host", f"http://127.0.0.1:{port}", "--csv",
        str(folder / "locust"), "--only-summary", "--exit-code-on-error", "0",
    ]  # fmt: skip
    subprocess.run(words, env={**os.environ, "SERVE_FOLDER": str(folder)}, check=True, capture_output=True)
    with (folder / "locust_stats.csv").open(newline="") as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    return {
        name: {
            "requests": int(row["Request Count"]), "failures": int(row["Failure Count"]),
            "per_second": float(row["Requests/s"]),
            **{f"p{share}_ms": float(row[f"{share}%"]) for share in (50, 95, 99)},
        }
        for name, row in rows.items()
    }  # fmt: skip


def shares(apart: bool) -> tuple[set[int], set[int]]:
    """Return the cores of the server and the loops, and those of the clients: the same ones, unless `apart`.

    Raises:
        SystemExit: there is one core only.
    """
    cores = sorted(os.sched_getaffinity(0)) if apart else range(os.cpu_count() or 1)
    if apart and len(cores) < 2:
        raise SystemExit("--apart takes two cores, and there is one; leave it out")
    return ({cores[-1]}, set(cores[:-1])) if apart else (set(cores), set(cores))


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="of timm, drawn at random")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--apart", action="store_true", help="server and loops on one core, clients on the others")
    given = parser.parse_args()
    adapters, clients, seconds = (8, 40, 45) if given.quick else (given.adapters, given.clients, given.seconds)
    random.seed(0)
    own, others = shares(given.apart)
    if given.apart:
        os.sched_setaffinity(0, own)  # of this thread and what it starts
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("zoo", "pictures"):
            (folder / part).mkdir()
        spec = visgraft.Backbone(given.backbone, "none", given.size)
        pictures, paths = draw(folder / "pictures"), make_adapters(folder / "zoo", spec, adapters)
        (folder / "expected.json").write_text(json.dumps(expected(paths, pictures)))
        plain, bare = loops(paths, pictures, 20), forward_alone(paths[0], pictures[0])
        process, port = start(folder / "store", folder / "zoo", folder / "server.log")
        if given.apart:
            os.sched_setaffinity(0, others)
        watched, counts, ending = psutil.Process(process.pid), dict[str, int](), threading.Event()
        memory = [watched.memory_info().rss]
        alone = one_alone(port, pictures[0].read_bytes(), paths[0].name)
        swapping = threading.Thread(target=swap, args=(port, paths, ending, counts))
        watching = threading.Thread(
            target=lambda: [
                memory.append(watched.memory_info().rss) for _ in iter(lambda: ending.wait(seconds / 20), True)
            ]
        )
        for thread in (swapping, watching):
            thread.start()
        used = sum(watched.cpu_times()[:2])
        try:
            figures = load(port, folder, clients, seconds)
        finally:
            used = sum(watched.cpu_times()[:2]) - used
            ending.set()
            swapping.join()
            process.terminate()
            process.wait(60)
        good = figures["good"]
        print(
            json.dumps(
                {
                    "model": f"{given.backbone} at {given.size} px, {adapters} adapters of 4 methods",
                    "clients": clients,
                    "seconds": seconds,
                    "cores": {"server and loops": len(own), "clients": len(others), "shared": own == others},
                    "figures": figures,
                    "swaps": counts,
                    "plain_loops": {name: [round(value, 1) for value in rate] for name, rate in plain.items()},
                    "share_of_loops": {name: round(good["per_second"] / r.per_second, 3) for name, r in plain.items()},
                    "images_per_cpu_second": round(good["requests"] / used, 1),
                    "share_per_cpu_second": {
                        name: round(good["requests"] / used / r.per_cpu_second, 3) for name, r in plain.items()
                    },
                    "one_alone_ms": round(1000 * alone, 1),
                    "without_server_ms": round(1000 * bare, 1),
                    "memory_mb": [round(value / 2**20) for value in memory],
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
