"""The benchmark of the bank: its lines make the tables of docs/bank.md, and what misses its goal is told."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("bank_page")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_shows_what_the_lines_say(page: ModuleType) -> None:
    found = page.page(page.blocks(page.read_lines()))
    assert found == page.PAGE.read_text(encoding="utf-8"), "run: python benchmarks/bank_page.py"


def batch(method: str, ratio: float) -> dict[str, Any]:
    return {"kind": "batch", "backbone": "vit_small_patch16_224:112", "method": method, "precision": "bf16",
            "images": 16, "mixed ÷ merged": [ratio - 0.1, ratio, ratio + 0.1]}  # fmt: skip


def test_the_last_line_of_one_thing_counts_and_what_is_above_its_goal_is_bold(page: ModuleType, tmp_path: Path) -> None:
    lines = [batch("alore", 1.5), batch("ssf", 1.149), batch("alore", 1.061), batch("lora", 1.054)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = page.read_lines(tmp_path / "lines.jsonl")
    row = page.ratio_table(read, "mixed ÷ merged", page.GOALS).splitlines()[-1]
    assert row == "| ViT-S/16, 112 px | 16 | bf16 | **1.06** |  | 1.05 | 1.15 |  |  |  |"


def test_goals_of_a_bank_are_shown_beside_its_figures(page: ModuleType) -> None:
    times = {"swap ms": [1, 2.5, 3], "file ms": [1, 3.2, 4], "checked ms": [40, 50, 60]}
    vit = "vit_small_patch16_224:112"
    lines = [
        {"kind": "bank", "backbone": vit, "adapters": n, **times, "MiB": 303.0, "held ÷ stored": 1.25}
        for n in (1024, 1025)
    ]
    goal, row, above = page.bank_table(lines).splitlines()[-3:]
    assert goal == "| goal | to 1,024 | 2 | 5 |  |  | 1.1 |"
    assert row == "| ViT-S/16, 112 px | 1,024 | **2.50** | 3.20 | 50.00 | 303.0 | **1.250** |"
    assert above == "| ViT-S/16, 112 px | 1,025 | 2.50 | 3.20 | 50.00 | 303.0 | **1.250** |"
