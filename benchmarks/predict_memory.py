"""Memory and time of `visgraft predict` in parts: many images against few, here, in processes and on Ray.

`python benchmarks/predict_memory.py` draws tiny pictures, gives them as many names as there are images, and answers
them with a tiny adapter. It prints a line for each executor: the peak of memory of the command itself with few and with
many images, that of the largest process that works for it, and the seconds for each 1,000 images, without what it takes
to begin (from the difference of both runs).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image
from shared import machine

import visgraft

DRAWN, SIDE = 20, 8
IN_A_FOLDER = 50_000
LOOKED_EVERY = 0.2  # seconds


class Taken(NamedTuple):
    """What a run took: peaks of memory in MB, of the command and of its largest worker, and seconds."""

    command: float
    worker: float
    seconds: float


def draw(folder: Path, count: int) -> Path:
    """Write a few pictures, and link them under so many names."""
    generator, drawn = np.random.default_rng(0), folder.parent / "drawn"
    if not drawn.exists():
        drawn.mkdir()
        for number in range(DRAWN):
            noise = generator.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(drawn / f"{number}.png")
    for number in range(count):
        inner = folder / str(number // IN_A_FOLDER)
        if number % IN_A_FOLDER == 0:
            inner.mkdir(parents=True)
        os.link(drawn / f"{number % DRAWN}.png", inner / f"{number:08}.png")
    return folder


def make_adapter(folder: Path) -> Path:
    """Write an adapter of a tiny backbone, without training."""
    model = visgraft.create_backbone(visgraft.Backbone("test_vit", "none", 32), 3)
    visgraft.attach(model, visgraft.LinearConfig())
    return visgraft.save(model, folder, classes=("a", "b", "c"))


def measure(command: list[str]) -> Taken:
    """Run a command, and look at its memory and that of the processes below it."""
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE)
    seen, ended = {"worker": 0}, threading.Event()

    def look() -> None:
        root = psutil.Process(process.pid)
        while not ended.wait(LOOKED_EVERY):
            try:
                below = [one.memory_info().rss for one in root.children(recursive=True) if is_worker(one)]
            except psutil.Error:
                continue
            seen["worker"] = max(seen["worker"], *below, 0)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    begin = time.perf_counter()
    assert process.stdout is not None
    told = json.loads(process.stdout.read())
    seconds = time.perf_counter() - begin
    ended.set()
    watcher.join()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0 and told["missing"] == 0, told
    return Taken(used.ru_maxrss / 1000, seen["worker"] / 1e6, seconds)


def is_worker(process: psutil.Process) -> bool:
    """Whether a process does what is asked, rather than look after others as Ray's own do."""
    words = " ".join(process.cmdline())
    return "forkserver" in words or "ray::" in words


def main() -> None:
    """Measure, and print a line of JSON for each executor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--part-size", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--on", default="here,processes,ray")
    given = parser.parse_args()
    print(json.dumps({**machine(), **vars(given)}), flush=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        adapter = make_adapter(root / "adapter")
        folders = {count: draw(root / str(count), count) for count in (given.few, given.many)}
        for on in given.on.split(","):
            taken = {}
            for count, folder in folders.items():
                words = ["predict", str(adapter), str(folder), "--out", str(root / f"{on}-{count}"), "--on", on]
                words += ["--part-size", str(given.part_size), "--quiet"]
                words += [] if on == "here" else ["--workers", str(given.workers)]
                taken[count] = measure([sys.executable, "-m", "visgraft", *words])
            few, many = taken[given.few], taken[given.many]
            line = {
                "on": on,
                "command_mb": [round(few.command), round(many.command)],
                "worker_mb": [round(few.worker), round(many.worker)],
                "seconds_per_1000": round(1000 * (many.seconds - few.seconds) / (given.many - given.few), 2),
                "seconds_to_begin": round(few.seconds, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
