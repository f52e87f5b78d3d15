"""What tests of protocols share: rows for small roots, and what is found below them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from visgraft.data.dataset import Example
from visgraft.errors import DataError
from visgraft.protocols.opening import open_task
from visgraft.protocols.row import Parts, Protocol, Task


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(path)


def task_of(protocol: Protocol, name: str, **changes: object) -> Task:
    task = protocol.task(name)
    assert task is not None
    return replace(task, **changes)  # type: ignore[arg-type]


def opened(protocol: Protocol, task: Task, root: Path, seed: int = 0) -> Parts:
    return open_task(protocol, task, root, seed, any_size=True)


def refused(protocol: Protocol, task: Task, root: Path, any_size: bool = True) -> str:
    with pytest.raises(DataError) as caught:
        open_task(protocol, task, root, any_size=any_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(examples: Sequence[Example], root: Path) -> list[tuple[str, object]]:
    return [(example.path.relative_to(root).as_posix(), example.label) for example in examples]
