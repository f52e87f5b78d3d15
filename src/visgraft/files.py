"""Writing files and folders so that nothing is ever lost or half-written: a temporary name first, then a rename."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from visgraft.errors import VisgraftError


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def check_target(path: Path, marker: str) -> None:
    """Raise a VisgraftError unless `path` is free: absent, an empty folder, or an earlier result holding `marker`."""
    if path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file()):
        return
    if path.exists():
        raise VisgraftError(f"{path} exists and is not an earlier result ({marker} is missing); choose another --out")


@contextlib.contextmanager
def new_directory(path: Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` on success; an earlier result there is replaced as a whole.

    Raises:
        VisgraftError: `path` holds something else, or cannot be written.
    """
    path = Path(path)
    check_target(path, marker)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise VisgraftError(f"{path} cannot be written ({error.strerror}); choose another --out") from error
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o644)  # some writers leave files that only their owner can read
        if path.is_dir():
            _exchange(path, temporary)
        else:
            os.rename(temporary, path)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise VisgraftError(f"{path} cannot be written ({error}); nothing was changed there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(path: Path, new: Path) -> None:
    """Put the folder `new` in the place of `path` and remove what was there; on failure `path` is as it was."""
    prefix = f".{path.name}.old."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as folder:
        old = Path(folder) / "old"
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
