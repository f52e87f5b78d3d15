"""Which blend of several adapters? Their weights and the scale, chosen on the validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visgraft.adapters.blending import blended, check_alike, checked_tensors
from visgraft.adapters.directory import read_record
from visgraft.adapters.hub import settled
from visgraft.backbones.creation import create_backbone
from visgraft.core.attach import detach
from visgraft.data.images import Images, Loading
from visgraft.data.read import AnySource
from visgraft.errors import DataError
from visgraft.measure.evaluation import evaluate
from visgraft.measure.measuring import adapter_data, load_as_trained

SHARES = (0.25, 0.5, 0.75)
"""Of a further adapter in the blend so far."""
SCALES = (0.9, 0.8, 0.7, 0.6, 0.5)

_DEFAULT_LOADING = Loading()


@dataclass(frozen=True)
class TriedBlend:
    """A blend with its figure on the validation images: top-1, or mean average precision with several classes."""

    weights: tuple[float, ...]
    scale: float
    figure: float


@dataclass(frozen=True)
class BlendSearch:
    """What `search_blend` found: the best, all that was tried in that order, and how many images chose."""

    best: TriedBlend
    tried: tuple[TriedBlend, ...]
    images: int


@settled()
def search_blend(
    adapters: Sequence[str | Path],
    data: AnySource,
    *,
    backbone_weights: str | None = None,
    loading: Loading = _DEFAULT_LOADING,
    on_tried: Callable[[TriedBlend], None] = lambda tried: None,
) -> BlendSearch:
    """Choose weights and scale of a blend on validation images, greedily.

    The best adapter alone is the start. Each other one, the better ones first, joins with the share that helps most, or
    not at all (greedy soups of arXiv:2203.05482); then smaller scales are tried. Only what is better replaces what is
    there, so the figure on these images flatters the choice; test images are not read.

    Raises:
        AdapterError: the adapters do not go together, or cannot be read.
        DataError: the data have no validation images, or not the same ones for all adapters.
    """
    paths = [Path(path) for path in adapters]
    records = [read_record(path) for path in paths]
    check_alike(paths, records)
    images = _validation_images(paths, data, loading)
    plain = create_backbone(records[0].located(paths[0], backbone_weights), records[0].outputs)
    tensors = [checked_tensors(path, plain) for path in paths]
    tried: list[TriedBlend] = []

    def measure(weights: Sequence[float], scale: float = 1.0) -> TriedBlend:
        made = blended(plain, paths, records, tensors, weights, scale)
        found = TriedBlend(tuple(weights), scale, evaluate(made.model, images, records[0].precision).figure)
        detach(plain)
        tried.append(found)
        on_tried(found)
        return found

    alone = [measure(row) for row in np.eye(len(paths)).tolist()]
    order = sorted(range(len(paths)), key=lambda number: -alone[number].figure)
    best = alone[order[0]]
    for number in order[1:]:
        joins = [_with_share(best.weights, number, share) for share in SHARES]
        best = max([best, *map(measure, joins)], key=lambda one: one.figure)
    best = max([best, *(measure(best.weights, scale) for scale in SCALES)], key=lambda one: one.figure)
    return BlendSearch(best, tuple(tried), len(images))


def _with_share(weights: Sequence[float], number: int, share: float) -> list[float]:
    """Return weights with that of one more adapter, the others being reduced alike."""
    return [(1 - share) * weight + share * (other == number) for other, weight in enumerate(weights)]


def _validation_images(paths: Sequence[Path], data: AnySource, loading: Loading) -> Images:
    """Return the validation images that all adapters were trained beside."""
    parts = [adapter_data(path, data) for path in paths]
    first, record = parts[0][0], read_record(paths[0])
    drawn = first.layout == "flat" or first.split is not None
    if drawn and not all(known for _, known in parts):
        raise DataError(
            f"{first.root} is not, or no longer, what all the adapters were trained on, so its validation images "
            "cannot be told from those that they learned; give data with a val folder"
        )
    if any({e.path for e in other.val} != {e.path for e in first.val} for other, _ in parts[1:]):
        raise DataError(
            "the adapters were trained with other validation images each, so some have learned those of others; "
            "train them with one --seed and --val-fraction, or give data with a val folder"
        )
    if not first.val:
        raise DataError(f"{first.root} has no validation images to choose a blend on; add a val folder")
    return load_as_trained(first.val, record, len(first.classes), loading)
