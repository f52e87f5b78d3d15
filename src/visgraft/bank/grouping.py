"""Which images of a batch share a forward, and whose rows are whose in it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from visgraft.bank.held import BankAdapter
from visgraft.bank.layout import Flats, gathered
from visgraft.bank.rows import Span
from visgraft.bank.trees import Forward, HeadSpan

MOST_ROWS = 256
"""Images times adapters in one forward at most, where every adapter answers every image, so that memory is bounded."""

FEWEST_IMAGES = 16
"""From so many on, adapters that share no block run one by one, as nothing is won by mixing them."""


class Group(NamedTuple):
    """Images that share a forward: their numbers in the batch, in the order of the forward; and their adapters."""

    images: list[int]
    adapters: list[BankAdapter]


def grouped(images: Sequence[Tensor], adapters: Sequence[BankAdapter]) -> list[Group]:
    """Return which images share a forward, each group's sorted by configuration and head."""
    groups: dict[Any, list[int]] = {}
    for number, (image, adapter) in enumerate(zip(images, adapters, strict=True)):
        kind = adapter.configuration
        own: Any = None
        if kind.apart or not adapter.head.outputs:
            own = adapter
        elif kind.inserts:
            own = kind
        groups.setdefault((image.shape, adapter.precision, own), []).append(number)
    found = []
    for numbers in groups.values():
        order: dict[Any, int] = {}
        for number in numbers:
            for key in (adapters[number].configuration, adapters[number].head):
                order.setdefault(key, len(order))
        numbers.sort(key=lambda n: (order[adapters[n].configuration], order[adapters[n].head]))
        found.append(Group(numbers, [adapters[number] for number in numbers]))
    return found


def tiles(adapters: Sequence[BankAdapter], images: int) -> Iterator[tuple[slice, Sequence[BankAdapter]]]:
    """Yield which images run with which adapters of a group, where every adapter answers every image."""
    sharing = [adapter for adapter in adapters if adapter.configuration.shared]
    apart = [adapter for adapter in adapters if not adapter.configuration.shared]
    for members in (sharing, apart):
        if members is apart and images >= FEWEST_IMAGES:
            rows, together = images, 1
        else:
            rows = min(images, max(MOST_ROWS // max(len(members), 1), FEWEST_IMAGES))
            together = max(MOST_ROWS // rows, 1)
        for first in range(0, len(members), together):
            for row in range(0, images, rows):
                yield slice(row, row + rows), members[first : first + together]


def adapter_tensors(adapter: BankAdapter, flats: Flats) -> dict[str, Tensor]:
    """Return the tensors of one adapter by name."""
    split = adapter.held.split
    return {**adapter.configuration.layout.views(flats[:split]), **adapter.head.layout.views(flats[split:])}


def mixed_forward(adapters: Sequence[BankAdapter], flats: dict[BankAdapter, Flats]) -> Forward:
    """Return whose rows are whose, with the tensors of each image."""
    spans, heads = {}, []
    for kind, start, stop in _runs(adapter.configuration for adapter in adapters):
        rows = gathered([flats[a][: a.held.split] for a in adapters[start:stop]])
        spans[kind] = Span(start, stop, kind.layout.views(rows))
    for head, start, stop in _runs(adapter.head for adapter in adapters):
        rows = gathered([flats[a][a.held.split :] for a in adapters[start:stop]])
        heads.append(HeadSpan(start, stop, head, head.layout.views(rows)))
    return Forward(len(adapters), spans, heads)


def _runs(values: Iterable[Any]) -> Iterator[tuple[Any, int, int]]:
    """Yield each run of one value, with where it starts and stops."""
    start, before, number = 0, None, 0
    for number, value in enumerate(values):
        if number and value is not before:
            yield before, start, number
            start = number
        before = value
    yield before, start, number + 1
