"""Writing files and folders so that nothing is ever lost or half-written: a temporary name first, then a rename."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from visgraft.errors import VisgraftError

HUB_PREFIX = "hf:"
"""What names on the Hugging Face hub begin with where a path may stand too."""
WDS_PREFIX = "wds:"
"""What patterns of WebDataset shards begin with where a path may stand too."""


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file, open for writing, that becomes `path` on success and vanishes on failure."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # so that not even a power cut leaves an empty file under the final name
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8, which JSON can still hold as escapes
        text = json.dumps(value, indent=2).encode()
    with new_file(path) as file:
        file.write(text + b"\n")


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here for this folder, where system and file system have locks.

    The lock is on the folder itself, so that nothing stays behind, not even of a process that is killed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_writable(path: Path, option: str = "--out") -> None:
    """Raise unless something can be written at `path`, whatever is there.

    Raises:
        VisgraftError: it cannot.
    """
    if str(path).startswith(HUB_PREFIX):
        raise VisgraftError(
            f"{path} is a name on the hub, but {option} a folder here; choose one, and publish it with visgraft push"
        )
    if path.name in ("", ".."):
        raise VisgraftError(f"{str(path)!r} is a folder that is there already; give {option} a name in it")
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:  # safetensors opens no such file
        raise VisgraftError(f"the path {path} is not valid UTF-8; choose another {option}") from error
    try:
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        # Permissions alone do not tell; and what is made beside it has a longer name.
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.visgraft.", dir=parent))
    except OSError as error:
        parent = path.absolute().parent
        raise VisgraftError(
            f"{path} cannot be written ({parent}: {error.strerror}); choose another {option}"
        ) from error


def check_target(path: Path, marker: str, option: str = "--out") -> None:
    """Raise unless `path` can be written and is free: absent, an empty folder, or an earlier result holding `marker`.

    `option` is the one by which the command line was given it.

    Raises:
        VisgraftError: it cannot, or is something else.
    """
    check_writable(path, option)
    if path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file()):
        return
    if path.exists():
        raise VisgraftError(
            f"{path} exists and is not an earlier result ({marker} is missing); choose another {option}"
        )


@contextlib.contextmanager
def new_directory(path: Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` on success; an earlier result there is replaced as a whole.

    Raises:
        VisgraftError: `path` holds something else, or cannot be written.
    """
    path = Path(path)
    check_target(path, marker)
    if path.is_symlink():  # the folder it leads to is replaced, and the link stays
        path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise VisgraftError(f"{path} cannot be written ({error.strerror}); choose another --out") from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_dir():
                file.chmod(0o755)
                continue
            file.chmod(0o644)  # some writers leave files that only their owner can read
            with file.open("rb") as written:
                os.fsync(written.fileno())
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
    if _swap(new, path):
        return  # the earlier result now lies under the temporary name, which the caller removes
    prefix = f".{path.name}.old."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as folder:
        old = Path(folder) / "old"
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise


def _swap(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, so that a killed process leaves one of them; False where Linux cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>
    return bool(call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def cache_folder() -> Path:
    """Return where what can be made again is kept: $VISGRAFT_CACHE, or the user's cache folder."""
    if found := os.environ.get("VISGRAFT_CACHE"):
        return Path(found)
    import platformdirs

    return platformdirs.user_cache_path("visgraft")


COPIES, DOWNLOADS = "copies", "downloads"
"""In the cache folder: folders and files of elsewhere. Beside each, a file of JSON says at which address that is."""


def as_given(text: str) -> str:
    """Return a message with the addresses that the user gave in place of where their copies lie in the cache folder.

    Also a process on another machine can do so, for what it takes lies beside the copies.
    """
    for top in {str(cache_folder()), str(cache_folder().absolute())}:
        place = re.compile(re.escape(top) + rf"[/\\](?:{COPIES}|{DOWNLOADS})[/\\][0-9a-f]{{16,32}}(?=[/\\])")
        for copy in set(place.findall(text)):
            url = _url_of(Path(copy))
            if url is not None:
                name = url.rstrip("/").partition("?")[0].rpartition("/")[2]
                text = text.replace(f"{copy}{os.sep}{name}", url.rstrip("/"))
    return text


def _url_of(copy: Path) -> str | None:
    for facts in copy.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(facts.read_text(encoding="utf-8"))["url"])
    return None
