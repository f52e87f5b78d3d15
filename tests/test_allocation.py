"""Freed memory is kept between steps, where nobody set up the allocator otherwise, and given back afterwards."""

import ctypes
import platform
import resource
from typing import Any

import pytest
import torch
from torch import nn

from visgraft.training.allocation import OWN_WAYS, freed_memory_kept

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


@GLIBC
def test_memory_that_is_freed_and_needed_again_is_not_mapped_anew() -> None:
    def faults_of_ten_uses() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.empty(10_000_000).fill_(1)  # over 32 MB, so that glibc never learns to keep it by itself
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with freed_memory_kept(nn.Linear(1, 1)):
        # A freed block is too short for the same size by what aligning it may take, so that it takes some uses until
        # there are places between which they alternate.
        faults_of_ten_uses()
        faults = faults_of_ten_uses()
    assert faults < 40_000_000 / resource.getpagesize(), "more pages than a single use takes"


@GLIBC
def test_settings_come_and_go_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Libc:
        def mallopt(self, *what: int) -> None:
            calls.append(what)

        def malloc_trim(self, pad: int) -> None:
            calls.append("trim")

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc())
    with pytest.raises(KeyboardInterrupt), freed_memory_kept(nn.Linear(1, 1)):
        assert calls == [(-1, -1), (-4, 0)]
        raise KeyboardInterrupt
    assert calls[2:] == [(-4, 65536), (-1, 64 * 2**20), "trim"]


@pytest.mark.parametrize("name", [*(f"{way}X" if way.endswith("_") else way for way in OWN_WAYS), None])
def test_other_devices_and_other_set_ups_are_left_alone(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(ctypes, "CDLL", opened.append)
    if name is not None:
        monkeypatch.setenv(name, "1")
    with freed_memory_kept(nn.Linear(1, 1, device="cpu" if name else "meta")):
        assert not opened, "the allocator was touched"
    assert not opened
