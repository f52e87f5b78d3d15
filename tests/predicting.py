"""Adapters on a tiny backbone, pictures, and the verb `predict` called in this process."""

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from support import enliven, images

from visgraft import Backbone, create_backbone, save
from visgraft.cli import predict as verb
from visgraft.cli.show import progress_console
from visgraft.core.attach import attach
from visgraft.core.registry import get_method
from visgraft.data.tasks import LabelTask, outputs_of
from visgraft.errors import VisgraftError

BACKBONE = Backbone("test_vit", "none", image_size=32)
CLASSES = {"linear": "abc", "sct": "abc", "alore": "abc", "lora": "xyz", "full": "abc"}


TASKS = (
    LabelTask("colour", "one_class", ("red", "green", "blue")),
    LabelTask("size", "number", unit="cm", mean=40.0, std=10.0, low=20.0, high=60.0),
    LabelTask("tags", "several_classes", ("ring", "dot")),
)


def make(
    folder: Path,
    method: str,
    backbone: Backbone = BACKBONE,
    seed: int = 1,
    classes: Sequence[str] = "",
    **record: Any,
) -> Path:
    """Write an adapter that has been moved off its start."""
    classes = classes or CLASSES[method]
    torch.manual_seed(seed)  # of the head and of the backbone
    model = create_backbone(backbone, len(classes))
    size = backbone.image_size or 160
    task = [(images(8, size=size), torch.arange(8) % len(classes))]
    enliven(attach(model, get_method(method).Config(), task), seed)
    return save(model, folder, classes=tuple(classes), record=record)


def make_tasks(folder: Path, tasks: Sequence[LabelTask] = TASKS, method: str = "lora", seed: int = 1) -> Path:
    """Write an adapter that answers several tasks."""
    data = {"tasks": [task.to_json() for task in tasks]}
    return make(folder, method, seed=seed, classes=outputs_of(tasks), data=data)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("shop") / "shop")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {method: make(root / method, method, seed=number) for number, method in enumerate(CLASSES)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(10):
        name = f"{number:02}.png"
        Image.fromarray(generator.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(folder / name)
    return sorted(folder.iterdir())


def run(*arguments: object, stdin: Any = "") -> tuple[int, str, str]:
    """Call the verb in this process; returns exit code, standard output and standard error."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    app = typer.Typer()
    app.command()(verb.predict)
    with (
        patch.object(sys, "argv", ["predict", *map(str, arguments)]),
        patch.object(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            app(standalone_mode=False)
        except VisgraftError as error:
            code = 1
            print(f"error: {error}", file=sys.stderr)
        finally:
            progress_console.quiet = False
    return code, out.getvalue(), err.getvalue()


def rows_of(*arguments: object, stdin: str = "") -> list[dict[str, Any]]:
    status, out, err = run(*arguments, "--json", stdin=stdin)
    told = [line for line in err.splitlines() if ": passed over " not in line]
    assert (status, told) == (0, [])
    assert out.count("\n") == 1
    return json.loads(out)


def refused(*arguments: object, stdin: str = "") -> str:
    status, out, err = run(*arguments, stdin=stdin)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    return err


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
