"""Put what benchmarks/bank.py measured into docs/bank.md, between its marks.

    OMP_NUM_THREADS=1 python benchmarks/bank.py --rounds 5 --lines benchmarks/bank_measured.jsonl
    python benchmarks/bank_page.py

Of several measurements of one thing the last counts. A test compares the page with the lines.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bank import METHODS, TIMES
from scale_page import table

ROOT = Path(__file__).parents[1]
PAGE, LINES = ROOT / "docs" / "bank.md", ROOT / "benchmarks" / "bank_measured.jsonl"
GOALS = {"alore": 1.05, "sct": 1.05, "lora": 1.05, "ssf": 1.15, "bitfit": 1.15, "adaptformer": 1.15, "vpt_deep": 1.15}
BANK_GOALS = {"swap ms": 2.0, "file ms": 5.0, "held ÷ stored": 1.1}
SWAPPED_FLAT = 1024
"""Up to so many adapters a swap is to take no longer than its goal."""
NAMES = {
    "vit_small_patch16_224:112": "ViT-S/16, 112 px",
    "vit_small_patch16_224:224": "ViT-S/16, 224 px",
    "swin_tiny_patch4_window7_224:224": "Swin-T, 224 px",
}
Line = Mapping[str, Any]


def read_lines(path: Path = LINES) -> list[Line]:
    """Return what was measured, of one thing the last."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    what = ("kind", "backbone", "method", "precision", "images", "adapters")
    return list({tuple(line.get(name) for name in what): line for line in lines}.values())


def machine(lines: Sequence[Line]) -> str:
    """Return what was measured on."""
    told = set()
    for line in lines:
        m = line["machine"]
        threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
        told.add(f"{m['cpu']} ({', '.join(m['flags'])}), {threads}, torch {m['torch']}, timm {m['timm']}")
    return "; ".join(sorted(told))


def ratio_table(lines: Sequence[Line], name: str, goals: Mapping[str, float]) -> str:
    """Return one ratio of every method; what is above its goal is in bold."""
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    for line in lines:
        if line["kind"] == "batch":
            key = line["backbone"], line["images"], line["precision"]
            found.setdefault(key, {})[line["method"]] = line[name][1]
    methods = METHODS.split(",")
    rows = [["goal", "", "", *(f"{goals[method]:.2f}" for method in methods)]] if goals else []
    for (backbone, images, precision), of_method in found.items():
        cells = [_cell(of_method.get(method), goals.get(method)) for method in methods]
        rows.append([NAMES.get(backbone, backbone), str(images), precision, *cells])
    return table(["backbone", "images", "precision", *methods], rows, 3)


def _cell(value: float | None, goal: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return f"**{text}**" if goal is not None and float(text) > goal else text


def peft_table(lines: Sequence[Line]) -> str:
    """Return what a mixed batch of `lora` takes in the bank and in huggingface/peft, where that takes the backbone."""
    rows = []
    for line in lines:
        if "peft ÷ merged" in line:
            ours, theirs = line["mixed ÷ merged"][1], line["peft ÷ merged"][1]
            told = NAMES.get(line["backbone"], line["backbone"]), str(line["images"]), line["precision"]
            rows.append([*told, _cell(ours, theirs), f"{theirs:.2f}"])
    return table(["backbone", "images", "precision", "bank", "peft"], rows, 3)


def bank_table(lines: Sequence[Line]) -> str:
    """Return what swapping and loading take in banks of several sizes, and the memory."""
    goals = (f"{BANK_GOALS[name]:g}" if name in BANK_GOALS else "" for name in (*TIMES, "MiB", "held ÷ stored"))
    rows = [["goal", f"to {SWAPPED_FLAT:,}", *goals]]
    for line in lines:
        if line["kind"] == "bank":
            judged = BANK_GOALS if line["adapters"] <= SWAPPED_FLAT else {}
            times = [_cell(line[name][1], judged.get(name)) for name in TIMES]
            share = _cell(line["held ÷ stored"], BANK_GOALS["held ÷ stored"], 3)
            backbone = NAMES.get(line["backbone"], line["backbone"])
            rows.append([backbone, f"{line['adapters']:,}", *times, f"{line['MiB']:,.1f}", share])
    head = ["backbone", "adapters", "swap, ms", "file, ms", "file with its picture, ms", "MiB", "÷ what the files take"]
    return table(head, rows)


def blocks(lines: Sequence[Line]) -> dict[str, str]:
    """Return the tables of the page by their names."""
    return {
        "machine": machine(lines),
        "mixed": ratio_table(lines, "mixed ÷ merged", GOALS),
        "attached": ratio_table(lines, "attached ÷ merged", {}),
        "one": ratio_table(lines, "one ÷ attached", {}),
        "peft": peft_table(lines),
        "sizes": bank_table(lines),
    }


def page(tables: Mapping[str, str]) -> str:
    """Return the page with these tables between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, one in tables.items():
        mark = f"<!-- {name}: benchmarks/bank_page.py -->\n"
        before, rest = text.split(mark)
        after = rest.split("<!-- to here -->\n", 1)[1]
        text = f"{before}{mark}\n{one}\n\n<!-- to here -->\n{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(blocks(read_lines())), encoding="utf-8")
