"""What do the names and labels of a million images cost? Seconds and memory before the first image is decoded.

    python benchmarks/large_data.py --images 100000            # a minute on 2 cores
    python benchmarks/large_data.py --images 1000000           # some 10 minutes, 5 GB of disk
    python benchmarks/large_data.py --images 100000 --digests  # reads every file too, as resuming does

Files of one byte in 100 class folders, and tables (.csv and .parquet) that name them, are read as `visgraft train`
does, and taken through the steps that look at every image before training. Every source has a process of its own, whose
memory is told as the growth over what the imports took: its peak in a step, and what is held after it. Ratios are of
seconds that the CPU worked, which other load on the machine changes least.
Bounds have processes of their own too: a walk by `os.scandir` that looks at each file's size, and
pyarrow's reading of the same tables, which looks at no file. The system has the folders in memory, as the files have
just been written.

With `--folder`, files are made there once and stay.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import shared

CLASSES = 100
SOURCES = ("folder", "csv", "parquet")
BOUNDS = ("scandir", "pyarrow csv", "pyarrow parquet")


def make(folder: Path, count: int) -> None:
    """Write so many files and the tables that name them, unless they are there."""
    done = folder / "done"
    if done.is_file() and done.read_text() == str(count):
        return
    names = [f"class_{number % CLASSES:03}/image_{number:07}.jpg" for number in range(count)]
    for label in range(CLASSES):
        (folder / "images" / f"class_{label:03}").mkdir(parents=True, exist_ok=True)
    for name in names:
        descriptor = os.open(folder / "images" / name, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"x")
        os.close(descriptor)
    rows = [(f"images/{name}", name[:9]) for name in names]
    with (folder / "table.csv").open("w") as file:
        file.write("image_path,label\n")
        file.writelines(f"{path},{label}\n" for path, label in rows)
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        paths, labels = zip(*rows, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"image_path": paths, "label": labels}), folder / "table.parquet")
    done.write_text(str(count))


def walk(folder: str) -> int:
    """Look at every file below a folder, and return their number."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                count += walk(entry.path)
            else:
                count += entry.stat().st_size
    return count


class Meter:
    """Times steps, and tells how far memory grew since it was made, in bytes."""

    def __init__(self) -> None:
        self.process, self.rows = psutil.Process(), list[list[Any]]()
        self.before = self.process.memory_info().rss

    def __call__(self, name: str, act: Callable[[], Any]) -> Any:
        """Return what a step returns; one that fails is told as such."""
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        begin, worked = time.perf_counter(), time.process_time()
        try:
            found = act()
        except Exception as error:
            self.rows.append([name, None, " ".join(f"{type(error).__name__}: {error}".split())[:90], None, None])
            return None
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        self.rows.append([name, seconds, worked, peak - self.before, self.process.memory_info().rss - self.before])
        return found


def measure_bound(name: str, folder: Path) -> list[list[Any]]:
    """Return the row of one bound."""
    if name == "scandir":
        meter = Meter()
        meter(name, lambda: walk(str(folder / "images")))
        return meter.rows
    kind = name.split()[1]
    module = importlib.import_module(f"pyarrow.{kind}")
    read = getattr(module, {"csv": "read_csv", "parquet": "read_table"}[kind])
    meter = Meter()
    meter(name, lambda: read(folder / f"table.{kind}"))
    return meter.rows


def measure_source(name: str, folder: Path, digests: bool) -> list[list[Any]]:
    """Return a row for each step before an image is decoded, of one source."""
    from visgraft.backbones.creation import Backbone
    from visgraft.check.quick import quick_check
    from visgraft.data.dataset import Split, divide
    from visgraft.data.identity import content_digests
    from visgraft.data.images import Loading, make_labels
    from visgraft.data.read import read_data
    from visgraft.methods import get_method
    from visgraft.options import TrainConfig
    from visgraft.training.run import _facts, _record

    source = folder / ("images" if name == "folder" else f"table.{name}")
    config, split = TrainConfig(), Split()
    meter = Meter()
    data = meter("read_data", lambda: read_data(source))
    if data is None:
        return meter.rows
    meter("quick_check", lambda: quick_check(data))
    meter("labels", lambda: make_labels(data.train, len(data.classes)))
    meter("divide", lambda: divide(data.train, data.classes, split, "here"))
    meter("record", lambda: _record(data, split, config, "white"))
    if name == "folder" and digests:
        meter("content_digests", lambda: content_digests(data.all))
        method = get_method("lora").Config()
        backbone = Backbone("vit_tiny_patch16_224")
        run = meter("facts", lambda: _facts(data, backbone, method, config, split, Loading()))
        meter("facts as JSON", lambda: json.dumps(run))
    return meter.rows


def in_child(kind: str, name: str, folder: Path, *more: str) -> list[list[Any]]:
    """Measure one thing in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, name, "--folder", str(folder), *more]
    told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    rows: list[list[Any]] = json.loads(told.stdout.splitlines()[-1])
    return rows


def show(rows: list[list[Any]], count: int, bound: float) -> list[list[str]]:
    """Return rows of text: seconds, those of the CPU, these ÷ the bound, bytes per image at the peak and held."""
    shown = []
    for name, seconds, worked, peak, held in rows:
        if seconds is None:
            shown.append([f"{name}: {worked}", *[""] * 5])
            continue
        times, memory = (f"{seconds:.2f}", f"{worked:.2f}", f"{worked / bound:.2f}"), (peak / count, held / count)
        shown.append([name, *times, *(f"{value:.0f}" for value in memory)])
    return shown


def main() -> None:
    parser = shared.arguments(__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the files are made, and stay")
    parser.add_argument("--digests", action="store_true", help="also read every file, as resuming does")
    parser.add_argument("--only", choices=SOURCES, help="one source")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        kind, name = asked.child
        bound = kind == "bound"
        measured = measure_bound(name, asked.folder) if bound else measure_source(name, asked.folder, asked.digests)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = asked.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        make(folder, asked.images)
        walk(str(folder / "images"))
        found = {name: in_child("bound", name, folder) for name in BOUNDS}
        bound = found["scandir"][0][2]
        print(f"{asked.images:,} files of 1 byte in {CLASSES} class folders\n")
        header = ["", "seconds", "of CPU", "÷ scandir", "bytes per image, peak", "held"]
        print(shared.table(header, [row for rows in found.values() for row in show(rows, asked.images, bound)]))
        for name in (asked.only,) if asked.only else SOURCES:
            found[name] = in_child("source", name, folder, *(["--digests"] if asked.digests else []))
            print(f"\n{name}\n\n{shared.table(header, show(found[name], asked.images, bound))}", flush=True)
    shared.report(asked, {"images": asked.images, "classes": CLASSES, "found": found, **shared.machine()})


if __name__ == "__main__":
    main()
