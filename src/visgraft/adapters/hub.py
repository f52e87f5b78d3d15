"""Adapters on the Hugging Face hub: `hf:USER/NAME` stands for a folder that the hub's own client keeps in its cache.

The client decides where that cache lies, which server is asked, with which token, and whether it may be asked at all
(HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). Of a repository only the files of an adapter are ever fetched.
"""

import contextlib
import hashlib
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visgraft.errors import AdapterError, VisgraftError, warn_user
from visgraft.files import HUB_PREFIX

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
UNLIKE = "adapter_unlike.safetensors"
FILES = (TENSORS, UNLIKE, CARD, CONFIG)
LIMITS = {CONFIG: 10 * 10**6, CARD: 10 * 10**6, UNLIKE: 100 * 10**6, TENSORS: 5 * 10**9}
"""Most bytes of each file; an adapter of the method `full` is as large as its backbone."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[\w-]{1,128}", re.ASCII)
_REVISION = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))[\w#+][\w#+./-]{0,200}(?<![./])")
"""Names that git allows, as the cache makes folders of them: none leads out of it."""
_LOGIN = "run hf auth login or set HF_TOKEN"
_ROUNDS = 3  # looks at a repository that changes while it is fetched
_SETTLED: ContextVar[dict[str, Path] | None] = ContextVar("settled", default=None)


@dataclass(frozen=True)
class HubPlace:
    """A repository of the hub, `name` being USER/NAME, and a branch, tag or commit of it; None: its main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.name}{'' if self.revision is None else f'@{self.revision}'}"


def on_hub(path: str | Path) -> bool:
    """Whether a path means a repository of the hub; a folder of that very name is reached by its absolute path.

    `hf://` is the address of a file.
    """
    return str(path).startswith(HUB_PREFIX) and not str(path).startswith(f"{HUB_PREFIX}//")


def parse(path: str | Path) -> HubPlace:
    """Return what `hf:USER/NAME` or `hf:USER/NAME@REVISION` names.

    Raises:
        AdapterError: it is no name that the hub allows.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    text = (path.as_posix() if isinstance(path, Path) else path).removeprefix(HUB_PREFIX)
    text = text if text.isprintable() else repr(text)[1:-1]  # no such character is allowed anyway
    name, at, revision = text.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise AdapterError(
            f"{HUB_PREFIX}{text}: {_line(error)} Use {HUB_PREFIX}USER/NAME or {HUB_PREFIX}USER/NAME@REVISION"
        ) from None
    if name.count("/") != 1:
        raise AdapterError(f"{HUB_PREFIX}{text} does not name a repository of the hub; use {HUB_PREFIX}USER/NAME")
    if at and not _REVISION.fullmatch(revision):
        raise AdapterError(
            f"{HUB_PREFIX}{text}: {revision!r} is no revision; name a branch, a tag or a commit after the @"
        )
    return HubPlace(name, revision if at else None)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Let every name on the hub stand for one and the same commit as long as this lasts.

    Whoever reads a record first and tensors later must not get those of two versions; and the hub is asked only once.
    """
    if _SETTLED.get() is not None:
        yield
        return
    token = _SETTLED.set({})
    try:
        yield
    finally:
        _SETTLED.reset(token)


def resolve(path: str | Path) -> Path:
    """Return the folder of an adapter: the path itself, or where the files of `hf:USER/NAME[@REVISION]` lie.

    Raises:
        AdapterError: there is no such repository or revision, it is no adapter or too large, it may not be read, the
            hub cannot be reached and nothing is in the cache, or what came is damaged.
    """
    if not on_hub(path):
        return Path(path)
    place, found = parse(path), _SETTLED.get()
    if found is None:
        return _fetch(place)
    if str(place) not in found:
        found[str(place)] = _fetch(place)
    return found[str(place)]


def _fetch(place: HubPlace) -> Path:
    """Return the folder of a repository's files, downloading what the cache lacks."""
    from huggingface_hub import constants

    kept = _in_cache(place)
    if kept is not None and COMMIT.fullmatch(place.revision or ""):
        return kept  # a commit never changes
    if constants.HF_HUB_OFFLINE:
        if kept is None:
            raise AdapterError(
                f"{place} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it, or load "
                "the adapter once with a connection"
            )
        return kept
    for _ in range(_ROUNDS):
        try:
            info = ask(place)
        except Exception as error:
            if kept is None or not is_unreachable(error):
                raise explained(error, place) from error
            warn_user(
                f"{place}: {constants.ENDPOINT} cannot be reached ({reason(error)}), so what the cache holds is used, "
                f"commit {kept.name[:12]}, which may not be the newest"
            )
            return kept
        if kept is not None and kept.name == info.sha:
            return kept
        folder = _download(place, info)
        if folder.name == info.sha:
            return folder
    raise AdapterError(f"{place} changes while it is being fetched; try again")


def ask(place: HubPlace) -> Any:
    """Return what the hub says of a repository: commit, privacy, and its files with sizes and digests.

    Raises:
        AdapterError: the answer is none.
        Exception: whatever the hub's client raises.
    """
    from huggingface_hub import HfApi, constants

    found = HfApi().model_info(
        place.name, revision=place.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    if not COMMIT.fullmatch(found.sha or ""):
        raise AdapterError(f"{place}: {constants.ENDPOINT} names no commit; check HF_ENDPOINT")
    return found


def _in_cache(place: HubPlace) -> Path | None:
    """Return the folder of an adapter that is complete in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.name, CONFIG, revision=place.revision)
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and (folder / TENSORS).is_file() else None


def _download(place: HubPlace, info: Any) -> Path:
    """Fetch the files of a commit and check each against what the hub says of it.

    The configuration comes last and by the name of the revision: only then does the cache say that the name stands for
    this commit, so that an interrupted download leaves the earlier version for those who are offline.
    """
    from huggingface_hub import hf_hub_download

    stated = _stated(place, info)
    folder = Path()
    for name in (name for name in FILES if name in stated):
        revision = place.revision if name == CONFIG else info.sha
        try:
            _check_header(place, name, revision)
            file = Path(
                hf_hub_download(place.name, name, revision=revision, **_bounded(place, name, stated[name].size))
            )
            folder = file.parent
            if folder.name == info.sha:
                _check(place, file, stated[name])
        except Exception as error:
            raise explained(error, place, name) from error
    return folder


def _stated(place: HubPlace, info: Any) -> dict[str, Any]:
    """Return what the hub says of the adapter's files, by name.

    Raises:
        AdapterError: one is missing, too large, or of unknown size.
    """
    found = {one.rfilename: one for one in info.siblings or () if one.rfilename in LIMITS}
    for name in (CONFIG, TENSORS):
        if name not in found:
            raise AdapterError(f"{place} is not an adapter: {name} is missing; name a repository of `visgraft push`")
    for name, one in found.items():
        if not isinstance(one.size, int) or one.size < 0:
            raise AdapterError(f"{place}: the hub does not say how large {name} is; check HF_ENDPOINT")
        if one.size > LIMITS[name]:
            raise AdapterError(
                f"{name} of {place} has {one.size:,} bytes, more than the {LIMITS[name]:,} fetched unasked; if you "
                f"trust it, run hf download {place.name} and pass the folder that this prints"
            )
    return found


def _check_header(place: HubPlace, name: str, revision: str | None) -> None:
    """Raise an AdapterError where a server names a file so that the client would write it outside its cache.

    The client makes a file name of whatever the server sends as digest.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(place.name, name, revision=revision)
    found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if not _DIGEST.fullmatch(found.etag or "") or not COMMIT.fullmatch(found.commit_hash or ""):
        raise AdapterError(f"{place}: {constants.ENDPOINT} gives {name} no proper digest and commit; check HF_ENDPOINT")


def _bounded(place: HubPlace, name: str, size: int) -> dict[str, Any]:
    """Return the argument that ends a download which is far longer than announced, where the client takes it.

    The client writes to the disk whatever is sent, and compares the sizes afterwards; a progress bar sees every chunk.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    most = 2 * size + 10**6  # protocols that send pieces of files may send more than the file

    class Bounded(tqdm):
        received = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > most:
                raise AdapterError(
                    f"{place}: {name} is longer than the {size:,} bytes announced; nothing was kept of it"
                )
            return super().update(n)

    return {"tqdm_class": Bounded} if "tqdm_class" in inspect.signature(hf_hub_download).parameters else {}


def _check(place: HubPlace, file: Path, stated: Any) -> None:
    """Raise, and remove the file from the cache, unless its size and digest are what the hub says.

    Raises:
        AdapterError: they are not.
    """
    from huggingface_hub import constants

    size = file.stat().st_size
    large = getattr(stated.lfs, "sha256", None)
    if large is None and stated.blob_id is None:
        right = size == stated.size
    else:  # of small files the hub knows git's digest
        with file.open("rb") as opened:
            start = hashlib.sha256() if large else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
            digest = hashlib.file_digest(opened, lambda: start).hexdigest()
        right = size == stated.size and digest == (large or stated.blob_id)
    if not right:
        whole = Path(os.path.realpath(file))  # the file in the snapshot is a link to it
        if whole.is_relative_to(os.path.realpath(constants.HF_HUB_CACHE)):
            whole.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        raise AdapterError(f"{file.name} of {place} arrived damaged and was removed from the cache; try again")


def remedy(path: str | Path) -> str:
    """Return what to do about an adapter whose files are damaged."""
    if on_hub(path):
        return f"remove {resolve(path).parents[1]} to have it fetched anew, or ask who published it"
    return "restore it or train again"


def _line(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300)


def reason(error: BaseException) -> str:
    """Return in one line why a request failed: what the server says, else what the client says."""
    status = _status(error)
    told = getattr(error, "server_message", None)
    return f"{status} {textwrap.shorten(told, 200)}".strip() if status and told else f"{status or _line(error)}"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def is_unreachable(error: BaseException) -> bool:
    """Whether no hub answered, or one that is out of order; not whether it refused."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    library = type(error).__module__.partition(".")[0]  # httpx, httpx2 or requests, by the client's version
    return isinstance(error, ConnectionError | TimeoutError) or library.startswith(("httpx", "httpcore", "requests"))


def explained(error: Exception, place: HubPlace, what: str = "the repository") -> VisgraftError:
    """Return an error of the hub's client, or of the disk under it, as one line with its remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # those two only say that something failed
    if isinstance(error, VisgraftError):
        return error
    where, status = constants.ENDPOINT, _status(error)
    told = _refusal(error, place, what)
    if told is None and status in (401, 403):
        told = f"{where} refuses access ({reason(error)}); {_LOGIN}, with a token that may do this"
    elif told is None and is_unreachable(error):
        told = f"{where} cannot be reached ({reason(error)}); check the connection and HF_ENDPOINT"
    elif told is None and isinstance(error, OSError) and error.errno is not None and status is None:
        told = (
            f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); make room, or set HF_HOME to "
            "another folder"
        )
    elif told is None:
        told = f"{where} gave no proper answer for {what} ({reason(error)}); try again, and check HF_ENDPOINT"
    return AdapterError(f"{place}: {told}")


def _refusal(error: Exception, place: HubPlace, what: str) -> str | None:
    """Return what is said of a refusal that the hub's client knows by name; None for another error."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{place.name}"
    known: list[tuple[type[Exception], str]] = [
        (errors.OfflineModeIsEnabled, "the hub cannot be asked while HF_HUB_OFFLINE is set; unset it"),
        (errors.GatedRepoError, f"it is open to some only; ask for access on {page}, and {_LOGIN}"),
        (
            errors.RepositoryNotFoundError,
            f"there is no such repository on {constants.ENDPOINT}, or it is private; check the name, or {_LOGIN}",
        ),
        (errors.RevisionNotFoundError, f"there is no revision {place.revision or 'main'}; {page}/tree/main lists them"),
        (errors.EntryNotFoundError, f"{what} is no longer there; try again"),
    ]
    return next((told for kind, told in known if isinstance(error, kind)), None)
