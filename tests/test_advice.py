"""No message names an option that the verb which prints it lacks."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from visgraft.cli.app import build

SOURCE = Path(__file__).parents[1] / "src" / "visgraft"
MEASURING = ("eval", "merge", "export", "report", "predict")
TRAINING = ("train", "compare", "bench run")
REACHED = {
    "adapters/blending": ("blend",),
    "algebra/diff": ("diff",),
    "algebra/features": ("diff",),
    "algebra/nearest": ("nearest",),
    "algebra/picture": ("diff",),
    "algebra/truncation": ("rank",),
    "adapters/directory": MEASURING,
    "adapters/publish": ("push",),
    "adapters/record": MEASURING,
    "adapters/reference": ("predict", "push"),
    "adapters/warm_start": ("train",),
    "backbones": (*TRAINING, *MEASURING),
    "bench/ledger": ("bench run",),
    "bench/plot": ("bench plot",),
    "bench/running": ("bench run",),
    "bench/settings": ("bench run",),
    "bench/statistics": ("bench table", "bench plot"),
    "check": ("check",),
    "cli/blend": ("blend",),
    "core/configure": ("bench run",),
    "data/binding": ("train", "compare", "check"),
    "data/label_columns": ("train", "compare", "check", "bench run", "bench check"),
    "data/read": ("train", "compare", "check", "eval", "report"),
    "data/table": ("train", "compare", "check"),
    "data/task_folders": ("train", "compare", "check", "eval", "report"),
    "data/shared_images": ("train", "compare", "check", "eval", "report"),
    "data/task_table": ("train", "compare", "check", "bench run", "bench check"),
    "data/cache": (*TRAINING, "eval", "merge", "export", "report"),
    "executors": ("bench run", "compare", "train", "predict", "serve"),
    "export": ("export",),
    "export/peft_import": ("import",),
    "export/peft_read": ("import",),
    "files": ("train", "compare", "merge", "export", "import", "demo"),
    "measure/measuring": ("eval", "report"),
    "methods/alore": ("train",),
    "protocols": ("bench run", "bench check"),
    "report": ("report",),
    "search": ("compare",),
    "search/blending": ("blend",),
    "serve": ("predict",),
    "serve/store": ("serve",),
    "serve/keeper": ("serve",),
    "serve/on_ray": ("serve",),
    "serve/sockets": ("serve",),
    "training/loop": ("train", "compare"),
    "training/objective": ("train",),
    "training/resume": ("train",),
    "training/run": ("train",),
    "training/slow": ("train",),
    "cli/app": ("visgraft", "demo", *MEASURING),
    "cli/arguments": (*TRAINING[:2], "eval", "report", "check"),
    "cli/bench": ("bench run", "bench check", "bench table"),
    "cli/bench_images": ("bench run", "bench check"),
    "cli/demo": ("demo",),
    "cli/export": ("export",),
    "cli/import_": ("import",),
    "cli/options": ("train",),
    "data/dataset": (),
    "data/decode": (),
    "cli/check": ("check",),
    "cli/compare": ("compare",),
    "cli/nearest": ("nearest",),
    "cli/rank": ("rank",),
    "cli/auto": ("train",),
    "cli/launched": ("bench run",),
    "cli/log": ("train",),
    "cli/predict": ("predict",),
    "cli/predict_images": ("predict",),
    "cli/predict_output": ("predict",),
    "cli/predict_parts": ("predict",),
    "cli/report": ("report",),
    "cli/serve": ("serve",),
    "cli/train": ("train",),
}
"""By file or room: the verbs that can print its messages. A message may send to another verb by name."""
SENT = re.compile(r".*\b(train|run|predict|compare|demo|export)\b[^.;]*$", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
ANYWHERE = {"--help", "--no-deps", "--force-reinstall", "--upgrade"}  # the last three are pip's


@cache
def options() -> dict[str, set[str]]:
    app = typer.main.get_command(build(["train", "export"]))
    found: dict[str, set[str]] = {}

    def look(command: object, name: str) -> None:
        for inner, verb in getattr(command, "commands", {}).items():
            look(verb, f"{name} {inner}".strip())
        found[name] = {text for one in command.params for text in (*one.opts, *one.secondary_opts)}  # type: ignore[attr-defined]

    look(app, "")
    return found


def messages() -> Iterator[tuple[str, str]]:
    """Every text of the package that names an option, docstrings and helps of options left out."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spared: set[int] = set()
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                spared |= {id(s.value) for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)}
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "Option", "Argument", "option", "command_line", "add_argument", "_choice"
            ):  # fmt: skip
                spared |= {id(inner) for inner in ast.walk(node)}
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in spared or id(node) in inside:
                continue
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                text = "".join(p.value if isinstance(p, ast.Constant) else "X" for p in node.values)  # type: ignore[misc]
            if " " in text and OPTION.search(text):
                yield path.relative_to(SOURCE).with_suffix("").as_posix(), text


def verbs_for(place: str) -> tuple[str, ...]:
    parts = place.split("/")
    for count in range(len(parts), 0, -1):
        if "/".join(parts[:count]) in REACHED:
            return REACHED["/".join(parts[:count])]
    return ()


ALL = list(messages())


def test_messages_are_found() -> None:
    assert len(ALL) > 50 and any("--resume" in text for _, text in ALL)
    assert {"--out", "--method", "--no-flip", "--rank"} <= options()["train"] and "--any-size" in options()["bench run"]


@pytest.mark.parametrize(("place", "text"), ALL, ids=[f"{place}-{i}" for i, (place, _) in enumerate(ALL)])
def test_an_option_in_a_message_is_one_of_its_verb(place: str, text: str) -> None:
    for found in OPTION.finditer(text):
        if found[0] in ANYWHERE:
            continue
        sent = SENT.match(text[: found.start()])
        verbs = ("bench run",) if sent and sent[1] == "run" else (sent[1],) if sent else verbs_for(place)
        assert verbs, f"{place} names an option; say in REACHED which verbs print it"
        lacking = [verb for verb in verbs if found[0] not in options()[verb.removeprefix("visgraft")]]
        # What a file of verbs says of its own options, the verb that has them says.
        assert not lacking or (place.startswith("cli/") and len(lacking) < len(verbs)), f"{found[0]}: {lacking}"
