"""Publish an adapter on the Hugging Face hub."""

from pathlib import Path
from typing import Any

import torch

from visgraft.adapters.card import is_made, make_card
from visgraft.adapters.directory import read_record, read_tensors
from visgraft.adapters.hub import (
    CARD,
    CONFIG,
    LIMITS,
    TENSORS,
    UNLIKE,
    HubPlace,
    ask,
    explained,
    parse,
    resolve,
    settled,
)
from visgraft.adapters.record import AdapterRecord
from visgraft.adapters.reference import read_reference
from visgraft.errors import AdapterError
from visgraft.files import HUB_PREFIX

EXPECTED_BESIDE = {".gitattributes"}  # what the hub puts into a new repository by itself


@settled()
def push(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Publish an adapter as a repository of the Hugging Face hub, in one commit; `load("hf:USER/NAME")` reads it.

    The adapter's files are uploaded, nothing else. A card that nobody has changed is written anew, so that it says by
    which name the adapter loads.

    Args:
        path: the adapter's directory.
        repository: USER/NAME, or ORGANISATION/NAME; it is created where it does not exist.
        private: create a repository that only its owner sees; one that others see already is refused.
        revision: the branch, which is created where it does not exist; None: the main one.
        message: of the commit; None: the method and the backbone.

    Returns:
        The address of the repository, or of the branch in it.

    Raises:
        AdapterError: the adapter is damaged or too large, the name is none, the repository holds something else or is
            public, nobody is logged in or may not write there, or the hub cannot be reached.
    """
    place = _target(repository, revision)
    path, record = Path(path), read_record(path)
    _check_tensors(path, record)
    if record.unlike is not None:
        read_reference(path, record)
    card = _card(path, record, place)
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if get_token() is None:
        raise AdapterError(
            "nobody is logged in to the hub; run hf auth login, or set HF_TOKEN to a token that may write"
        )
    folder = resolve(path)
    names = (CONFIG, TENSORS) if record.unlike is None else (CONFIG, TENSORS, UNLIKE)
    parts: list[tuple[str, Any]] = [*((name, folder / name) for name in names), (CARD, card)]
    try:
        api = HfApi()
        _prepare(api, place, private)
        if revision is not None:
            api.create_branch(place.name, branch=revision, exist_ok=True)
        done = api.create_commit(
            place.name,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in parts],
            commit_message=message or f"{record.method.method} adapter for {record.backbone.name}",
            revision=revision,
        )
        _check_arrived(HubPlace(place.name, done.oid), {name: _size(content) for name, content in parts})
    except Exception as error:
        raise explained(error, place) from error
    return f"{constants.ENDPOINT}/{place.name}{'' if revision is None else f'/tree/{revision}'}"


def _target(repository: str, revision: str | None) -> HubPlace:
    """Return where to publish.

    Raises:
        AdapterError: the name or the branch is none.
    """
    name = str(repository).removeprefix(HUB_PREFIX)
    if "@" in name:
        raise AdapterError(f"{repository} names a revision; leave it out, and name the branch by revision (--revision)")
    return parse(f"{HUB_PREFIX}{name}{'' if revision is None else f'@{revision}'}")


def _check_tensors(path: Path, record: AdapterRecord) -> None:
    """Raise an AdapterError unless the tensors are there, finite, and not too large to be loaded from the hub."""
    for name, limit in LIMITS.items():
        file = resolve(path) / name
        if file.is_file() and file.stat().st_size > limit:
            raise AdapterError(
                f"{path / name} is larger than the {limit:,} bytes that are loaded from the hub; shorten it"
            )
    tensors = read_tensors(path)
    if not tensors and record.parameters.get("head"):
        raise AdapterError(f"{path / TENSORS} holds nothing; restore it or train again")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path / TENSORS} is damaged: {name} is not finite; restore it or train again")


def _card(path: Path, record: AdapterRecord, place: HubPlace) -> bytes:
    """Return the folder's card where somebody wrote one, or else one that says where the adapter is published."""
    file = resolve(path) / CARD
    try:
        own = file.read_bytes() if file.is_file() else b""
        text = own.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path / CARD} cannot be read ({error}); repair or remove it") from error
    return make_card(record, str(place)).encode() if not text or is_made(text) else own


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _prepare(api: Any, place: HubPlace, private: bool) -> None:
    """Create the repository, or check that the one there is an adapter's, and private where that is asked for.

    Raises:
        AdapterError: it is something else, or public.
        Exception: whatever the hub's client raises.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    main = HubPlace(place.name)
    try:
        found = ask(main)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(place.name, private=private, exist_ok=True)
        found = ask(main)
    names = {one.rfilename for one in found.siblings or ()} - EXPECTED_BESIDE
    if names and CONFIG not in names:
        raise AdapterError(
            f"{main} holds something else, such as {min(names)}, and no {CONFIG}; choose another name or empty it"
        )
    if private and not found.private:
        raise AdapterError(f"{main} is public; make it private in its settings, or leave private (--private) out")


def _check_arrived(place: HubPlace, sizes: dict[str, int]) -> None:
    """Raise an AdapterError unless a commit holds the files as they were sent."""
    found = {one.rfilename: one.size for one in ask(place).siblings or ()}
    lacking = [name for name, size in sizes.items() if found.get(name) != size]
    if lacking:
        raise AdapterError(
            f"{place} lacks {', '.join(lacking)} as sent, for which a .gitignore there may be the reason; repair the "
            "repository and push again"
        )
