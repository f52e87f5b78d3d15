"""A backbone and images as a job names them, and as each process that does such jobs opens them once."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from time import monotonic
from typing import Any

from visgraft.backbones.creation import Backbone
from visgraft.data.dataset import Example
from visgraft.data.images import Images, Loading
from visgraft.training.crossval import Bench

SECONDS_BETWEEN_STEPS = 0.5


@dataclass(frozen=True)
class Ingredients:
    """What trainings on the same images need: a backbone, the number of classes and the examples of each part.

    Two with the same `key` are taken for the same.
    """

    key: str
    backbone: Backbone = field(compare=False)
    classes: int = field(compare=False)
    parts: tuple[Sequence[Example], ...] = field(compare=False)
    loading: Loading = field(compare=False)


@lru_cache(maxsize=1)
def opened(what: Ingredients) -> tuple[Bench, tuple[Images, ...]]:
    """Return the backbone, created, and the decoded images of each part; asked again, the same ones."""
    bench = Bench(what.backbone, what.classes)
    return bench, tuple(bench.load(part, **asdict(what.loading)) for part in what.parts)


def seldom(note: Callable[[Any], None], always: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Return a callback that passes on what `always` is true of, and of the rest a value now and then."""
    last = 0.0

    def tell(value: Any) -> None:
        nonlocal last
        now = monotonic()
        if always(value) or now - last >= SECONDS_BETWEEN_STEPS:
            last = now
            note(value)

    return tell
