"""What a shell gets when a word is completed, and that it need not wait for torch where it can be avoided."""

import os
import subprocess
import sys
from typing import Any

import pytest
from test_cli import PROGRAM

from visgraft import list_methods


def complete(*words: str) -> list[str]:
    """The completions that bash is given for the last word."""
    asked = {"_VISGRAFT_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([PROGRAM], env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_verbs_are_completed() -> None:
    assert complete("visgraft", "tr") == ["train"]
    assert set(complete("visgraft", "")) == {
        "bench", "check", "compare", "train", "eval", "report", "predict", "serve", "merge", "export", "import", "info",
        "blend", "nearest", "diff", "rank", "push", "methods", "demo",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("train", "--method", ""), {"auto", *list_methods()}),
        (("train", "--ra"), {"--rand-augment", "--rank"}),
        (("train", "--backbone", "vit_small_patch14_d"), {"vit_small_patch14_dinov2"}),
        (("predict", "--skip"), {"--skip-broken"}),
    ],
)
def test_options_and_their_values_are_completed(words: tuple[str, ...], found: set[str]) -> None:
    assert set(complete("visgraft", *words)) == found


def test_a_verb_is_completed_without_torch() -> None:
    asked = {"_VISGRAFT_COMPLETE": "complete_bash", "COMP_WORDS": "visgraft tr", "COMP_CWORD": "1"}
    done = without_torch(env={**os.environ, **asked})
    assert done.split() == ["train"]


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["eval", "--help"], ["bench", "--help"]])
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    done = without_torch(*words)
    assert {"--help": "compare", "--version": "visgraft 0.", "eval": "--split", "bench": "table"}.get(
        words[0] if words else "", "visgraft predict my-adapter new-photos"
    ) in done  # fmt: skip


def without_torch(*words: str, **options: Any) -> str:
    """Run the command line in a process that has no torch, and return what it prints."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'torchvision', 'numpy')))\n"
        f"sys.argv = ['visgraft', *{list(words)!r}]\nfrom visgraft.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
