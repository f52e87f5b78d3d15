"""The documentation's Python blocks run, and what they promise holds."""

import json
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, logits, vit

import visgraft
from visgraft import count_parameters, list_methods, load, merge, read_folder, save
from visgraft.cli.options import train_flags
from visgraft.core.attach import attach
from visgraft.core.families import BLOCKS
from visgraft.core.registry import METHODS
from visgraft.drawn.gauges import draw_gauges

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what a block registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    known, rows = dict(METHODS), dict(BLOCKS)
    yield tmp_path
    for table, before in ((METHODS, known), (BLOCKS, rows)):
        table.clear()
        table.update(before)


def run(page: str, number: int, shorter: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """Run a block of a page, with `shorter[1]` in place of `shorter[0]`."""
    names: dict[str, Any] = {"__name__": "documentation"}
    assert shorter[0] in blocks(page)[number]
    block = blocks(page)[number].replace(*shorter) if shorter[0] else blocks(page)[number]
    exec(compile(block, f"{page}, block {number}", "exec", dont_inherit=True), names)
    return names


def test_the_worked_example_of_a_method_gets_everything_by_its_registration(scratch: Path) -> None:
    config = run("CONTRIBUTING.md", 0)["ShiftConfig"](strength=0.5)
    assert "shift" in list_methods() and "strength" in {flag.field.name for flag in train_flags()}
    before = logits(vit())
    model = attach(vit(), config)
    assert torch.equal(logits(model), before)
    assert count_parameters(model).adapter == 3 * 32
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("visgraft."):
                parameter.normal_()
    save(model, scratch / "adapter")
    assert torch.equal(logits(load(scratch / "adapter", backbone=vit()).model), logits(model))
    plain, certificate = merge(model, images())
    assert certificate.merged_error <= certificate.error_tolerance
    assert (logits(plain) - before).abs().max() > 1e-2


def test_the_worked_example_of_a_family_attaches(scratch: Path) -> None:
    names = run("CONTRIBUTING.md", 1)
    assert count_parameters(names["model"]).adapter > 0
    assert type(names["model"].blocks[0]) is names["MyBlock"]


def test_the_worked_example_of_a_data_set_reads_back(scratch: Path) -> None:
    folder = run("CONTRIBUTING.md", 2)["folder"]
    assert len(folder.classes) == 10
    assert len(folder.train) + len(folder.val) + len(folder.test) == 200


def test_the_readmes_example_runs(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_gauges(scratch / "gauges", train=32, val=16, test=16)
    assert len(read_folder(scratch / "gauges").classes) == 16
    (example,) = blocks("README.md")
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    names = run("README.md", 0, ("epochs=15", "epochs=1"))
    assert "adapter=73792" in capsys.readouterr().out
    assert names["certificate"].merged_error <= names["certificate"].error_tolerance
    assert (scratch / "gauges-alore" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_the_textile_example_chooses_on_validation_images_and_goes_on_where_it_stopped(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "textile.py"))
    names = example["main"].__globals__
    setting, eval_adapter, measured = example["Setting"], names["eval_adapter"], []
    monkeypatch.setitem(names, "PARTS", {"train": 6, "val": 3, "test": 5})
    monkeypatch.setitem(names, "SETTINGS", (setting("linear", 28), setting("sct", 28), setting("sct", 28, 0.5, True)))
    monkeypatch.setitem(
        names, "eval_adapter", lambda out, data: (measured.append(out.name), eval_adapter(out, data))[1]
    )
    monkeypatch.setattr(sys, "argv", ["textile.py", "--out", "textile", "--epochs", "1"])
    example["main"]()
    rows = json.loads(Path("textile/results-1.json").read_text(encoding="utf-8"))
    assert list(rows) == ["linear-28", "sct-28", "sct-28-scale0.5-flip"]
    assert {row["images"] for row in rows.values()} == {9}
    better = max(("sct-28", "sct-28-scale0.5-flip"), key=lambda name: rows[name]["top1"])
    assert sorted(measured) == ["linear-28", better]
    written = capsys.readouterr().out
    assert written.count("| linear-28 |") == 2
    Path("textile/results-1.json").write_text(json.dumps({k: {**v, "top1": 1.0} for k, v in rows.items()}))
    example["main"]()
    assert "| linear-28 | 100.0 |" in capsys.readouterr().out, "what is measured already is not measured again"


def test_pages_link_only_to_files_that_exist() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
    assert len(pages) >= 6
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_version_is_one_and_the_changelog_knows_it() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert visgraft.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
