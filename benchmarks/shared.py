"""What the scripts on speed share: facts of the machine, rounds in turned order, quartiles, tables and JSON files."""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from visgraft.files import new_file

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring and knows `--json` and `--rounds`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    parser.add_argument("--rounds", type=int, default=15)
    return parser


def machine() -> dict[str, Any]:
    """Return what the figures depend on: CPUs, threads, the instructions that matter, the libraries' versions."""
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    known = set(told.split())
    named = re.search(r"^model name\s*: (.+)$", told, flags=re.M | re.I) or re.search(
        r"^Model\s*: (.+)$", told, flags=re.M
    )
    return {
        "cpu": named[1] if named else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in FLAGS if flag in known],
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def in_turns(parts: Mapping[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """Call every part once per round, each round beginning with another one, after one call that does not count."""
    for part in parts.values():
        part()
    names, found = list(parts), []
    for number in range(rounds):
        first = number % len(names)
        found.append({name: parts[name]() for name in names[first:] + names[:first]})
    return found


def seconds_of(
    act: Callable[[], object],
    device: torch.device,
    times: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], float]:
    """Return a function that calls `act` so many times and returns the seconds of one; on a GPU by its own events."""

    def on_cpu() -> float:
        start = clock()
        for _ in range(times):
            act()
        return (clock() - start) / times

    def on_gpu() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            act()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times

    return on_gpu if device.type == "cuda" else on_cpu


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def ratios(rounds: Sequence[Mapping[str, float]], name: str, bound: str) -> list[float]:
    """Return the quartiles of one part's time divided by another's of the same round, rounded to 3 decimals."""
    return [round(value, 3) for value in quartiles([one[name] / one[bound] for one in rounds])]


def shown(low: float, middle: float, high: float, digits: int = 3) -> str:
    """Write a median with its quartiles behind it."""
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first two are aligned to the right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "| " + " | ".join("-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)) + " |"
    return "\n".join([padded[0], rule, *padded[1:]])


def report(asked: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Print the machine's facts, and write all to the file of `--json`."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine().items()))
    write(asked, results)


def write(asked: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Write the machine's facts, the options and what was measured to the file of `--json`, if one was named."""
    if asked.json:
        options = {name: value for name, value in vars(asked).items() if name != "json"}
        text = json.dumps({"machine": machine(), "options": options, **results}, indent=1, default=str)
        with new_file(asked.json) as file:
            file.write(text.encode() + b"\n")
