"""Every page of docs/: its Python blocks run, its commands run on a tiny backbone, its links lead somewhere."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import SMALL, draw, run
from test_docs import ROOT, blocks

from visgraft import list_methods

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
TRAINED = ("linear", "alore")


def is_on_exports(page: str) -> bool:
    """Whether each command and block of a page traces a model, which takes minutes in all."""
    return page.startswith(("docs/export", "docs/edge"))


PYTHON = [
    pytest.param(page, number, marks=[pytest.mark.long] * is_on_exports(page))
    for page in PAGES
    for number in range(len(blocks(page)))
]


def commands(page: str) -> list[list[str]]:
    """The visgraft commands in a page's shell blocks, without those that need a network."""
    text = (ROOT / page).read_text(encoding="utf-8")
    shells = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    lines = "\n".join(shells).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    words = [line for line in words if not any(word.startswith("hf:") for word in line) and "push" not in line]
    return [line[1:] for line in words if line[:1] == ["visgraft"]]


def without(words: list[str], *options: str) -> list[str]:
    """The same command without options and their values."""
    words = list(words)
    for option in options:
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    return words


def small(words: list[str]) -> list[str]:
    """The same command on a tiny backbone, with a single epoch."""
    if words[:2] == ["bench", "run"]:
        return small_benchmark(words)
    words = without(words, "--budget", "--backbone", "--weights", "--image-size")
    if words[0] not in ("train", "compare"):
        return words
    if words[0] == "compare":
        words = [*without(words, "--methods"), "--methods", "linear,alore"]
    extra = [] if "--init-from" in words else list(SMALL)
    extra += [] if "--epochs" in words else ["--epochs", "1"]
    searches = words[0] == "compare" or "auto" in words
    return words + extra + (["--trials", "1"] if searches else [])


def small_benchmark(words: list[str]) -> list[str]:
    """The same benchmark on a tiny backbone, of one task with few images and two settings."""
    words = without(words, "--workers", "--seeds", "--trials", "--tasks")
    extra = ["--set", "epochs=1", "--workers", "0", "--trials", "2", "--precision", "fp32"]
    return words + SMALL + extra + (["--tasks", "digits", "--any-size"] if words[2] == "offline" else [])


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few epochs of a linear probe, folds, shuffles and images of the suite: the subject is that commands run."""
    kind = list_methods()["linear"]
    monkeypatch.setattr(kind, "recipe", replace(kind.recipe, epochs=5, warmup_epochs=1.0))
    monkeypatch.setattr("visgraft.search.budget.DIVISIONS", ((2, 1),))
    monkeypatch.setattr("visgraft.check.shortcuts.PERMUTATIONS", 10)
    for part, count in {"TRAIN": 60, "VAL": 20, "TESTED": 40}.items():
        monkeypatch.setattr(f"visgraft.protocols.offline.{part}", count)


def rarely(page: str) -> Any:
    """A page; with `-m long` those on exports."""
    return pytest.param(page, marks=pytest.mark.long) if is_on_exports(page) else page


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' commands are run on: photos, tables, trained adapters and a folder of them."""
    root = tmp_path_factory.mktemp("pages")
    draw(root / "photos", 20)
    for old, new in (("blue", "cat"), ("green", "dog"), ("red", "rabbit")):
        (root / "photos" / old).rename(root / "photos" / new)
    shutil.copytree(root / "photos" / "cat", root / "new-photos")
    shutil.copytree(root / "photos", root / "photos-winter")
    shutil.copytree(root / "photos", root / "textile" / "images")
    with (root / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "label"])
        rows.writerows([path, path.parent.name] for path in sorted((root / "photos").rglob("*.png")))
    with (root / "shop.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image_path", "product", "tags", "size"])
        for number, path in enumerate(sorted((root / "photos").rglob("*.png"))):
            rows.writerow([path, path.parent.name, "new|sale" if number % 2 else "new", number / 2])
    for method in TRAINED:
        out = root / f"photos-{method}"
        code, _, err = run("train", root / "photos", "--out", out, "--method", method, "--epochs", 1, *SMALL)
        assert code == 0, err
    shutil.copytree(root / "photos-linear", root / "zoo" / "cats")
    shutil.copytree(root / "photos-alore", root / "zoo" / "weather" / "clouds")
    (root / "tokens").write_text("a-token\n")
    pictures = sorted(path.relative_to(root) for path in (root / "new-photos").iterdir())
    (root / "work.csv").write_text(f"image,adapter\n{pictures[0]},cats\n{pictures[1]},weather/clouds\n")
    return root


@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_python_blocks_run(page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page)[number], f"{page}, block {number}", "exec", dont_inherit=True), {"__name__": "page"})


@pytest.mark.parametrize("page", [rarely(page) for page in ["README.md", *PAGES] if commands(page)])
def test_commands_run(page: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(photos, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("visgraft.serve.run.serve", lambda *what: None)  # which would not end
    for words in commands(page):
        code, out, err = run(*small(words))
        problems = words[0] == "check" and "error" in out  # found in the images, not in the command
        assert code == 0 or problems, f"{page}: {shlex.join(words)}: {err}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(mkdocs, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "ja" / "quickstart" / "index.html").read_text(encoding="utf-8")
    assert "クイックスタート" in page


def test_there_is_something_to_run() -> None:
    assert len(PYTHON) >= 5 and sum(len(commands(page)) for page in PAGES) >= 15


def test_all_pages_are_in_the_navigation_and_link_to_files_that_exist() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"- {page.removeprefix('docs/')}\n" in navigation, page
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
