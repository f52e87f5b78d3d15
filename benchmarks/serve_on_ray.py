"""One worker behind Ray Serve: batches by the engine of visgraft or by `serve.batch`, pictures per second and waits.

`python benchmarks/serve_on_ray.py` takes four minutes. Both answer the same JPEG files with the same 20 adapters in the
same bank; the clients share this machine's cores. Needs `pip install 'visgraft[serve-cluster]'`.
"""

import argparse
import asyncio
import io
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import ray
import torch
from PIL import Image
from ray import serve
from serve import draw, make_adapters

import visgraft
from visgraft.bank.opening import load_bank
from visgraft.executors.on_ray import OnRay
from visgraft.serve.on_ray import NAME, deployment, opened

ADAPTERS, CLIENTS, DELAY = 20, (1, 4, 16), 0.005


def by_ray(paths: list[Path]) -> Any:
    """Return a deployment as Ray's documentation has it: decoding in a thread, and a batched method."""

    @serve.deployment(name="Batched", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
    class Batched:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.bank = load_bank({path.name: path for path in paths})

        def compute(self, asked: list[Any]) -> list[Any]:
            with torch.inference_mode():
                found = self.bank([x for x, _ in asked], [self.bank.adapter(name) for _, name in asked])
            return [one.logits.softmax(-1).topk(5).values.tolist() for one in found]

        @serve.batch(max_batch_size=32, batch_wait_timeout_s=DELAY)
        async def answer(self, asked: list[Any]) -> list[Any]:
            return await asyncio.to_thread(self.compute, asked)

        def prepare(self, content: bytes, name: str) -> torch.Tensor:
            return self.bank.adapter(name).transform(Image.open(io.BytesIO(content)).convert("RGB"))

        async def __call__(self, request: Any) -> Any:
            name = request.query_params["adapter"]
            image = await asyncio.to_thread(self.prepare, await request.body(), name)
            return await self.answer((image, name))

    return Batched


def load(port: int, clients: int, seconds: float, pictures: list[bytes], names: list[str]) -> list[float]:
    """Return how long each request took."""
    found: list[float] = []
    until = time.perf_counter() + seconds

    def ask(number: int) -> None:
        while (begin := time.perf_counter()) < until:
            url = f"http://127.0.0.1:{port}/predict?adapter={names[number % len(names)]}"
            headers = {"content-type": "image/jpeg"}
            urlopen(Request(url, pictures[number % len(pictures)], headers), timeout=60).read()
            found.append(time.perf_counter() - begin)
            number += clients

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="in which both take turns")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = visgraft.Backbone(options.backbone, "none", options.image_size)
        paths = make_adapters(Path(folder), spec, ADAPTERS)
        pictures = [path.read_bytes() for path in draw(Path(folder))]
        cluster = OnRay(most=1, fresh=False, each="worker")
        seconds: dict[tuple[str, int], list[list[float]]] = {}
        with opened({path.name: path for path in paths}, {}, "127.0.0.1", 0, cluster) as server:
            serve.start(proxy_location="HeadOnly", http_options={"port": server.port})
            ways = {
                "visgraft's engine": deployment(server.config, cluster),
                "serve.batch": by_ray(paths),
            }
            for _ in range(options.rounds):
                for way, made in ways.items():
                    serve.run(made.bind(), name=NAME)
                    load(server.port, 4, 2.0, pictures, [path.name for path in paths])
                    for clients in CLIENTS:
                        found = load(server.port, clients, options.seconds, pictures, [path.name for path in paths])
                        seconds.setdefault((way, clients), []).append(found)
            serve.shutdown()
    for (way, clients), rounds in sorted(seconds.items(), key=lambda one: (one[0][1], one[0][0])):
        rates = [len(found) / options.seconds for found in rounds]
        middle, late = (statistics.median(statistics.quantiles(found, n=20)[at] for found in rounds) for at in (9, 18))
        told = f"{statistics.median(rates):6.1f} per s ({min(rates):.1f}–{max(rates):.1f})"
        print(f"{clients:3} clients, {way:18}: {told}, p50 {1000 * middle:.0f} ms, p95 {1000 * late:.0f} ms")
    ray.shutdown()


if __name__ == "__main__":
    main()
