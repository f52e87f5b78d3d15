"""A folder of drawn pictures, there whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visgraft.errors import DataError


@contextmanager
def new_folder(root: Path) -> Iterator[Path]:
    """Yield a folder that becomes `root` when all went well.

    Raises:
        DataError: `root` exists and is not an empty folder.
    """
    target = root.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DataError(f"{root} already exists and is not an empty folder; remove it or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        # A folder inside the scratch folder, because the scratch folder itself is readable by its owner only.
        drawn = Path(scratch) / "drawn"
        drawn.mkdir()
        yield drawn
        if target.exists():
            target.rmdir()
        drawn.rename(target)
