"""Files of data elsewhere, downloaded once into the cache folder, by the library fsspec."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from visgraft.data.urls import in_small
from visgraft.errors import DataError
from visgraft.files import DOWNLOADS, cache_folder, new_file, write_json

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")
PIECE = 2**20  # bytes


def is_remote(name: str) -> bool:
    """Whether a name is a URL rather than a path.

    Raises:
        DataError: it is one of a kind that is not read; webdataset itself would run some of them as commands.
    """
    scheme, colon, rest = name.partition(":")
    scheme = scheme.lower()
    if scheme == "pipe" or ("://" in name and scheme not in SCHEMES):
        raise DataError(f"{name} is of the kind {scheme}:, which is not read; use a path or {', '.join(SCHEMES)}")
    return bool(colon) and rest.startswith("//") and scheme in SCHEMES


def download(url: str) -> Path:
    """Return the copy of a file in the cache folder, made where there is none.

    A copy is kept where its length is what the server announced, with its SHA-256 beside it; one of another length
    is made anew.

    Raises:
        DataError: it cannot be downloaded whole.
    """
    name = hashlib.sha256(url.encode()).hexdigest()[:32]
    file = cache_folder() / DOWNLOADS / name / os.path.basename(url.partition("?")[0])
    facts = file.with_name("facts.json")
    if file.is_file() and facts.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if file.stat().st_size == json.loads(facts.read_text(encoding="utf-8"))["size"]:
                return file
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f"{url} needs the fsspec library; run pip install 'visgraft[webdataset]'") from error
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with fsspec.open(in_small(url), "rb") as source, new_file(file) as target:
            announced, digest, size = getattr(source, "size", None), hashlib.sha256(), 0
            while piece := source.read(PIECE):
                target.write(piece)
                digest.update(piece)
                size += len(piece)
            if announced is not None and size != announced:
                raise DataError(f"{url} ended after {size:,} of {announced:,} bytes; give the command again")
        write_json(facts, {"url": url, "size": size, "sha256": digest.hexdigest()})
    except DataError:
        raise
    except Exception as error:  # what the library raises depends on the kind of URL
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{url} cannot be downloaded ({reason}); check the URL and the network") from error
    return file
