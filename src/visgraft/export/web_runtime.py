"""onnxruntime-web for a folder that is served without internet: from a path, the cache, or once from npm's registry."""

import base64
import hashlib
import json
import tarfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from visgraft.export.format import ExportError
from visgraft.files import cache_folder, new_file

VERSION = "1.30.0"
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of that file, as the registry publishes it."""

WASM = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
# The builds for WebGPU lack float64, in which the places of pixels are found, so that they do not replace the other.
# Of the two this is the smaller by 10 MB; it needs a browser in which WebAssembly waits for promises (JSPI).
WEBGPU = ("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm")
LICENSE = "LICENSE"
TIMEOUT = 60
"""Seconds without an answer after which a download has failed."""


def write_runtime(source: str | None, folder: Path, wanted: Sequence[str] = (*WASM, *WEBGPU)) -> dict[str, Any]:
    """Copy what a page needs of onnxruntime-web into a new folder; returns its version, files and bytes.

    Args:
        source: an unpacked npm package or its .tgz; None: the cache, or npm's registry.
        folder: where to.
        wanted: which files of its `dist`.

    Raises:
        ExportError: it is not to be had, or is not onnxruntime-web.
    """
    given = Path(source) if source is not None else _cached()
    with _opened(given) as files:
        package = _package_json(files.get("package.json"), given)
        if lacking := [name for name in wanted if f"dist/{name}" not in files]:
            raise ExportError(
                f"{given} is onnxruntime-web {package.get('version')} without {', '.join(lacking)}, which the page "
                f"needs; take version {VERSION}, or leave --runtime out"
            )
        folder.mkdir()
        for name in wanted:
            (folder / name).write_bytes(files[f"dist/{name}"].read())
        # The npm package holds no copy of its licence, which asks to go along.
        own = files.get(LICENSE)
        (folder / LICENSE).write_bytes(own.read() if own else _licence())
    return {
        "onnxruntime_web": package.get("version"),
        "runtime_files": list(wanted),
        "runtime_bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def _licence() -> bytes:
    return resources.files("visgraft.export").joinpath("web", "onnxruntime-LICENSE.txt").read_bytes()


class _Member:
    """A file of the package, on disk or in the archive."""

    def __init__(self, path: Path | None, archive: tarfile.TarFile | None = None, info: Any = None) -> None:
        self.path, self.archive, self.info = path, archive, info

    def read(self) -> bytes:
        if self.path is not None:
            return self.path.read_bytes()
        assert self.archive is not None
        found = self.archive.extractfile(self.info)
        assert found is not None  # only plain files are listed
        return found.read()


@contextmanager
def _opened(source: Path) -> Iterator[Mapping[str, _Member]]:
    """Yield the package's files by their names in it.

    Raises:
        ExportError: there is no such folder or archive, or it is damaged.
    """
    try:
        if source.is_dir():
            names = ("package.json", LICENSE, *(f"dist/{name}" for name in (*WASM, *WEBGPU)))
            yield {name: _Member(source / name) for name in names if (source / name).is_file()}
            return
        with tarfile.open(source, "r:gz") as archive:
            # An archive of npm has all its files in one folder, mostly called `package`.
            yield {
                PurePosixPath(*PurePosixPath(info.name).parts[1:]).as_posix(): _Member(None, archive, info)
                for info in archive.getmembers()
                if info.isfile()
            }
    except (OSError, tarfile.TarError, EOFError) as error:
        told = getattr(error, "strerror", None) or error
        raise ExportError(
            f"{source} cannot be read as the npm package onnxruntime-web ({told}); name an unpacked package or its "
            ".tgz by --runtime, or leave that out"
        ) from error


def _package_json(found: _Member | None, source: Path) -> dict[str, Any]:
    try:
        package: dict[str, Any] = json.loads(found.read()) if found else {}
    except ValueError:
        package = {}
    if not isinstance(package, dict) or package.get("name") != "onnxruntime-web":
        raise ExportError(
            f"{source} is not the npm package onnxruntime-web: its package.json does not say so; name an unpacked "
            "package or its .tgz by --runtime, or leave that out"
        )
    return package


def _cached() -> Path:
    """Return the archive in the cache, downloaded if it is not there.

    Raises:
        ExportError: it cannot be downloaded or kept, or is not the one published.
    """
    kept = cache_folder() / f"onnxruntime-web-{VERSION}.tgz"
    if kept.is_file() and _digest(kept.read_bytes()) == SHA512:
        return kept
    try:
        with urllib.request.urlopen(ADDRESS, timeout=TIMEOUT) as answer:
            content = answer.read()
    except OSError as error:  # urllib's errors are of this kind
        raise ExportError(
            f"onnxruntime-web {VERSION} is not in {kept.parent} and cannot be downloaded ({error}); connect, or get "
            f"it by npm pack onnxruntime-web@{VERSION} elsewhere and name the file by --runtime"
        ) from error
    if _digest(content) != SHA512:
        raise ExportError(
            f"{ADDRESS} is not the file that was published: its sha512 is another; download it elsewhere and name it "
            "by --runtime"
        )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with new_file(kept) as file:
            file.write(content)
    except OSError as error:
        raise ExportError(
            f"{kept} cannot be written ({error.strerror or error}); set VISGRAFT_CACHE to a folder that can"
        ) from error
    return kept


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha512(content).digest()).decode()
