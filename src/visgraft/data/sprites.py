"""Drawn structured tasks (to come)."""

from pathlib import Path
from typing import Any

TASKS: dict[str, int] = {}


def draw_sprites(task: str, root: Path, **counts: Any) -> Path:
    """Draw a task's folder."""
    raise NotImplementedError
