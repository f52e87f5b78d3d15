"""Marks pictures unlike any of an adapter's training in what the server answers, by what the engine has looked at."""

from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

from visgraft.adapters.hub import UNLIKE
from visgraft.adapters.reference import check_kept, parse_reference
from visgraft.errors import AdapterError
from visgraft.serve.hosting import HostedAdapter, KeptReference
from visgraft.serve.unlike import Far, check_level, check_share, shares_as_far

MOST_PARSED = 64
"""References that are kept in double precision; others lie as files are, in a quarter of the memory or less."""
_parsed = lru_cache(maxsize=MOST_PARSED)(parse_reference)


def check_marking(level: float | None, adapters: Iterable[tuple[str, HostedAdapter]]) -> None:
    """Raise unless each of these adapters, by name, can mark unlike pictures at a level; None: any can.

    Raises:
        AdapterError: one keeps no reference, or had too few validation images for this level.
        VisgraftError: the level is none.
    """
    if level is not None:
        check_share(level)
        for name, hosted in adapters:
            check_level(level, name, _kept(name, hosted).images)


def far_of(hosted: HostedAdapter, features: Tensor, level: float) -> Far:
    """Return how far a picture lies, of the plain backbone's features [F], and whether it is marked at a level.

    Raises:
        AdapterError: see `check_marking`, and `shares_as_far`.
    """
    name = hosted.adapter.name
    check_marking(level, [(name, hosted)])  # one may have taken the other's name meanwhile
    (share,) = shares_as_far(name, _parsed(_kept(name, hosted).content), features.double().numpy()[None])
    return Far(share, share <= level)


def _kept(name: str, hosted: HostedAdapter) -> KeptReference:
    check_kept(name, hosted.record.unlike is not None)
    if hosted.reference is None:
        raise AdapterError(
            f"{name} cannot tell unlike pictures: its {UNLIKE} is missing or damaged; add the adapter again with it"
        )
    return hosted.reference
