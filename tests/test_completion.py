"""What a shell gets when a word is completed, and that it need not wait for torch where it can be avoided."""

import os
import subprocess
import sys

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
        "bench", "check", "compare", "train", "eval", "report", "predict", "merge", "info", "methods", "demo"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("train", "--method", ""), set(list_methods())),
        (("train", "--ra"), {"--rand-augment", "--rank"}),
        (("train", "--backbone", "vit_small_patch14_d"), {"vit_small_patch14_dinov2"}),
        (("predict", "--skip"), {"--skip-broken"}),
    ],
)
def test_options_and_their_values_are_completed(words: tuple[str, ...], found: set[str]) -> None:
    assert set(complete("visgraft", *words)) == found


def test_a_verb_is_completed_without_torch() -> None:
    code = "import sys, visgraft.cli.app as app; app.build(); print('torch' in sys.modules)"
    environment = {**os.environ, "_VISGRAFT_COMPLETE": "complete_bash", "COMP_WORDS": "visgraft tr"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
