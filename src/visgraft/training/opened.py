"""A backbone and images as a job names them, and as each process that does such jobs opens them once."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from time import monotonic, time_ns
from typing import Any, Self

from visgraft.backbones.creation import Backbone
from visgraft.data.dataset import Dataset, Example
from visgraft.data.images import Images, Loading
from visgraft.data.mirror import Mirror
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
    root: Path = field(compare=False)
    mirror: Mirror | None = field(compare=False)
    """What `root`, from which the examples' paths start, is a copy of; another machine makes its own."""

    @classmethod
    def of(
        cls, dataset: Dataset, title: str, backbone: Backbone, parts: tuple[Sequence[Example], ...], loading: Loading
    ) -> Self:
        """Return those of a data set, or of some parts of it, which no others are taken for."""
        key = f"{title} {dataset.fingerprint} {time_ns()}"
        return cls(key, backbone, len(dataset.classes), parts, loading, dataset.root, dataset.mirror)

    def here(self, part: Sequence[Example]) -> Sequence[Example]:
        """Return examples with their paths on this machine."""
        root = self.root if self.mirror is None else self.mirror.local()
        if root == self.root:
            return part
        return [example._replace(path=root / example.path.relative_to(self.root)) for example in part]


@lru_cache(maxsize=1)
def opened(what: Ingredients) -> tuple[Bench, tuple[Images, ...]]:
    """Return the backbone, created, and the decoded images of each part; asked again, the same ones."""
    bench = Bench(what.backbone, what.classes)
    return bench, tuple(bench.load(what.here(part), **asdict(what.loading)) for part in what.parts)


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
