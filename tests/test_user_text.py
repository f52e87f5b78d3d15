"""Names of the user are text, whatever they hold: shown in full, never obeyed, and right in every printed command."""

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import SMALL, run, succeed

from visgraft.cli.text import command_line, path_argument, visible

FOLDER = 'my [new] photos\' "x" $(touch pwned) `a` 😀 שלום \x1b[31m & é'
CLASSES = ("cat [old]", "cat [new]", ":smile: שלום\u202e\x1b]0;x\x07", "[bold] $a$ 'q' | é")
WORDS = (
    "plain", "",
    "two words", "it's", 'a "b"', "$HOME `x` $(y) !z", "a\\b", "-x", "*?[a]", "a\nb\tc", "\x1b[31m", "😀 é",
    "\u202eabc", "\udcff\udcfe", "~", "#a", ";&|<>", "'\x07'",
)  # fmt: skip


def pasted(command: str, folder: Path) -> list[list[str]]:
    """The words of each `visgraft` command when bash runs these lines in a folder."""
    script = f"visgraft() {{ printf '%s\\0' \"$@\" $'\\n'; }}\n{command}"
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd=folder, env=environment)
    return [os.fsdecode(line).split("\0")[:-1] for line in done.stdout.split(b"\n\0")[:-1]]


def test_a_command_means_the_same_when_it_is_pasted(tmp_path: Path) -> None:
    command = command_line("visgraft", *WORDS)
    assert command == visible(command), "it acts on the terminal"
    # The line feed inside a word is what the words of several commands are told apart by here, and bash's printf.
    script = f"visgraft() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, check=True, cwd=tmp_path, env={"LC_ALL": "C.UTF-8"}
    )
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == list(WORDS)
    assert path_argument("-photos") == "./-photos" and path_argument("a/-b") == "a/-b"


def test_control_characters_are_shown_and_letters_of_any_script_stay() -> None:
    assert visible("a\x1b[31mb\x07\u202ec\r") == "a\\x1b[31mb\\x07\\u202ec\\r"
    kept = "é שלום 😀 👨‍👩‍👧 क्षि\nnext line [bold] :smile:"
    assert visible(kept) == kept


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes, a table of the same images and an adapter, all under odd names."""
    base = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    rows = [("image_path", "label")]
    for number, name in enumerate(CLASSES):
        folder = base / FOLDER / name
        folder.mkdir(parents=True)
        for i in range(8):
            file = folder / f"[{i}] 'x' \x1b[1m.png"
            pixels = rng.normal(60 * number, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file)
            rows.append((f"{name}/{file.name}", name))
    with (base / FOLDER / "table [1].csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    shutil.copytree(base / FOLDER, base / "empty", ignore=shutil.ignore_patterns("*.png"))
    succeed("train", base / FOLDER, "--method", "alore", "--epochs", 2, "--out", base / f"{FOLDER} adapter", *SMALL)
    return base


def verbs(odd: Path) -> dict[str, list[object]]:
    data, adapter = odd / FOLDER, odd / f"{FOLDER} adapter"
    return {
        "check": ["check", data],
        "check a table": ["check", "--csv", data / "table [1].csv"],
        "compare": ["compare", data, "--methods", "linear,sct", "--trials", 1, "--epochs", 1, *SMALL],
        "train": ["train", data, "--method", "linear", "--epochs", 1, "--out", odd / "[again]", *SMALL],
        "train a table": ["train", data, "--csv", data / "table [1].csv", "--method", "lora", "--epochs", 1,
                          "--out", odd / "[third]", *SMALL],
        "forecast": ["train", data, "--method", "lora", "--epochs", 1, "--out", odd / "[none]", "--dry-run", *SMALL],
        "eval": ["eval", adapter, data],
        "report": ["report", adapter, "--data", data, "--out", odd / "[page].html"],
        "predict": ["predict", adapter, data],
        "predict to a file": ["predict", adapter, data, "--out", odd / "[rows].csv"],
        "merge": ["merge", adapter, "--data", data, "--out", odd / "[plain] 'x'"],
        "info": ["info", adapter],
        "bench check": ["bench", "check", "folder", "--root", data],
        "bench run": ["bench", "run", "folder", "--root", data, "--methods", "linear", "--recipe", "default",
                      "--set", "epochs=1", "--workers", 0, "--out", odd / "[results] 'x'", *SMALL],
        "no such folder": ["train", odd / f"{FOLDER} 2", "--out", odd / "[none]", *SMALL],
    }  # fmt: skip


@pytest.mark.parametrize("name", verbs(Path()))
def test_every_verb_shows_names_as_they_are(name: str, odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(odd)
    code, out, err = run(*verbs(odd)[name])
    text = out + err
    assert code in ((1,) if name == "no such folder" else (0, 1) if name.startswith("check") else (0,)), err
    assert "Traceback" not in text and not (odd / "pwned").exists()
    assert not any(character in text for character in "\x1b\x07\u202e"), "a name acted on the terminal"
    if name.startswith(("check", "predict", "info")) and "file" not in name:
        for shown in CLASSES:
            assert visible(shown).split()[0] in text
        assert "cat [old]" in text and "cat [new]" in text
    if FOLDER.split(maxsplit=1)[0] in text:
        assert "my [new] photos" in text
    for words in [words for line in out.splitlines() if line.startswith("  visgraft ") for words in pasted(line, odd)]:
        assert str(odd / FOLDER) in words and words[0] == "train", words
        code, _, err = run(*words[: words.index("--out")], "--epochs", "1", "--out", odd / "[pasted]")
        assert code == 0, err
        assert (odd / "[pasted]").is_dir()


def test_compare_prints_the_command_for_the_weights_that_were_given(odd: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from visgraft import Backbone, create_backbone

    weights = tmp_path / "my models" / "w [1].safetensors"
    weights.parent.mkdir()
    save_file(create_backbone(Backbone("test_vit", "none", 32), 0).state_dict(), weights)
    options = ["--methods", "linear", "--trials", 1, "--backbone", "test_vit", "--image-size", 32, "--weights", weights]
    found = succeed("compare", odd / FOLDER, *options, "--crop-mode", "border")
    (words,) = pasted(found["command"], tmp_path)
    assert words[words.index("--weights") + 1] == str(weights)
    assert words[words.index("--crop-mode") + 1] == "border"
    code, _, err = run(*words[:-2], "--epochs", 1, "--out", tmp_path / "out")
    assert code == 0, err


def test_the_bench_says_how_to_read_its_results(odd: Path) -> None:
    code, out, _ = run(*verbs(odd)["bench run"])
    line = next(line for line in out.splitlines() if line.startswith("read them with: "))
    (words,) = pasted(line.removeprefix("read them with: "), odd)
    code, out, err = run(*words)
    assert code == 0 and "linear" in out and not any(character in out for character in "\x1b\x07\u202e"), err


def test_the_merged_model_opens_as_printed(odd: Path, tmp_path: Path) -> None:
    import timm

    found = succeed("merge", odd / f"{FOLDER} adapter", "--data", odd / FOLDER, "--out", tmp_path / "a 'b' \"c\" \\d")
    assert eval(found["open_with"], {"timm": timm}).num_classes == len(CLASSES)


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    def write(cell: str) -> Path:
        file = tmp_path / "t.csv"
        with file.open("w", newline="", encoding="utf-8") as target:
            csv.writer(target).writerows([("image_path", "label"), (cell, "a"), ("b.png", cell)])
        return file

    return write


@pytest.mark.parametrize(
    "cell", ["[red]x[/red].png", "\x1b[31mx.png", "שלום.png", "a b 'c'.png", ":smile:.png", "{x}.png"]
)
def test_a_cell_of_a_table_is_named_as_it_is(cell: str, table: Callable[[str], Path]) -> None:
    code, out, err = run("check", "--csv", table(cell))
    assert code == 1 and out == "" and visible(cell) in err and "\x1b" not in err


def test_json_holds_the_names_themselves(odd: Path) -> None:
    code, out, _ = run("predict", odd / f"{FOLDER} adapter", odd / FOLDER, "--json")
    assert not any(character in out for character in "\x1b\x07\u202e\x9b"), "it acts on the terminal"
    assert code == 0 and {row["classes"][0]["class"] for row in json.loads(out)} <= set(CLASSES)
