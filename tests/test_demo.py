"""The demo: from drawing to picture, as much of it as a machine takes, and a quick one for the first minute."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_cli import fail, run, succeed
from test_user_text import pasted

from visgraft.cli import demo
from visgraft.cli.demo_size import FULL, SIZES, DemoSize, choose_size, seconds_per_image
from visgraft.training.resume import state_file

TINY = DemoSize(32, 16, 32, 1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and small images, so that only the way is tried."""
    monkeypatch.setattr(demo, "FULL", TINY)
    for size in ("IMAGE_SIZE", "QUICK_SIZE"):
        monkeypatch.setattr(demo, size, 42)
    monkeypatch.setattr(demo, "QUICK_IMAGES", {"train": 16, "val": 8, "test": 8, "positions": (0, 8)})
    monkeypatch.setattr(demo, "QUICK_OPTIONS", {"lr": 5e-3, "epochs": 1, "last_blocks": 1})


def test_the_demo_runs_from_drawing_to_picture(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "my demo"
    code, told, err = run("demo", "--full", "--out", out)
    assert code == 0 and "73,792" in told and f"picture: {out}/demo.png" in told, err
    result = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in result["methods"]}
    assert {name: row["params_adapter"] for name, row in rows.items()} == {"linear": 0, "sct": 28224, "alore": 73792}
    assert all((row["images"], row["split"]) == (32, "test") for row in rows.values())
    assert result["certificate"]["merged_error"] <= result["certificate"]["error_tolerance"]
    assert (result["certificate"]["images"], result["reopened_top1_agreement"]) == (16, 1.0)
    assert result["certificate"]["verdict"] in told
    with Image.open(result["picture"]) as picture:
        assert picture.format == "PNG" and min(picture.size) > 1000
    commands = [words for line in err.splitlines() if line.startswith("visgraft ") for words in pasted(line, tmp_path)]
    assert [words[0] for words in commands] == ["train", "eval"] * 3 + ["merge"]
    assert run(*commands[0], "--dry-run")[0] == 0 and run(*commands[1])[0] == 0


def test_the_quick_demo_ends_with_an_adapter_a_page_and_what_to_try(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "[quick]"
    code, told, err = run("demo", "--quick", "--out", out)
    assert code == 0, err
    assert (out / "report.html").read_text(encoding="utf-8").count("<h2>alore-quick") == 1
    (predict,), (merge,), (train,) = (pasted(line, tmp_path) for line in told.splitlines() if line[:2] == "  ")
    assert run(*predict)[0] == 0 and run(*merge)[0] == 0 and train[:2] == ["train", "YOUR_IMAGES"]
    assert (out / "merged" / "model.safetensors").is_file()
    assert len(succeed("demo", "--quick", "--out", out)["next"]) == 3, "again in the same folder"


def test_an_interrupted_demo_says_what_is_true_of_it(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "QUICK_OPTIONS", {"lr": 5e-3, "epochs": 500, "last_blocks": 1})
    monkeypatch.setattr("visgraft.training.keeping.STATE_SECONDS", 0.0)

    def stop() -> None:
        while not state_file(tmp_path / "alore-quick").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)  # SIGINT may be ignored, as in jobs of a script

    threading.Thread(target=stop, daemon=True).start()
    code, _, err = run("demo", "--quick", "--out", tmp_path)
    assert code == 130 and err.splitlines()[-1].endswith("give the same command to begin this method anew")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file; choose another --out" in fail("demo", "--out", tmp_path / "file")
    assert "--quick does not go with --full or --epochs" in fail("demo", "--quick", "--full", "--out", tmp_path)


def test_the_largest_size_that_fits_is_chosen() -> None:
    costs = [size.steps(12) for size in SIZES]
    assert costs == sorted(costs, reverse=True) and SIZES[0] == FULL
    for size, cost in zip(SIZES, costs, strict=True):
        assert choose_size(1.0, cost, 12) == (size, cost)
    assert choose_size(1.0, 1.0, 12)[0] == SIZES[-1]
    # Of half the blocks, a step costs half, once what stands before them is known.
    whole, half = DemoSize(1000, 0, 0, 300), DemoSize(1000, 0, 0, 300, 6)
    assert half.steps(12) / whole.steps(12) == pytest.approx(0.5, rel=0.01)


def test_the_pace_is_that_of_a_training() -> None:
    assert 1e-5 < seconds_per_image(replace(demo.BACKBONE, name="test_vit", weights="none", image_size=32)) < 1
