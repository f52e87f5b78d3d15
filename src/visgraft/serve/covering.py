"""Answers that hold the truth as often as is asked: the whole set of classes, with calibrated probabilities."""

from collections.abc import Iterable

from torch import Tensor

from visgraft.adapters.record import AdapterRecord
from visgraft.errors import AdapterError, VisgraftError
from visgraft.measure.conformal import CoverageError, bound, check_coverage, class_sets
from visgraft.measure.temperature import recalibrated


def check_covering(
    coverage: float | None,
    adapters: Iterable[tuple[str, AdapterRecord]],
    *,
    top: int | None = None,
    threshold: float | None = None,
    ensemble: bool = False,
) -> None:
    """Raise unless each of these adapters, by name, can answer with this coverage; None: any can.

    Raises:
        AdapterError: one is not calibrated.
        CoverageError: one had too few validation images, or the coverage is none.
        VisgraftError: another option decides which classes are named.
    """
    if coverage is None:
        return
    check_coverage(coverage)
    others = (("top", "--top", top), ("threshold", "--threshold", threshold), ("ensemble", "--ensemble", ensemble))
    for name, option, given in others:
        if given is not None and given is not False:
            what = "the mean of adapters is not calibrated" if ensemble else "the set holds what the coverage takes"
            raise VisgraftError(f"{name} ({option}) does not go with coverage: {what}; leave one of them out")
    for name, record in adapters:
        _bound(name, record, coverage)


def _bound(name: str, record: AdapterRecord, coverage: float) -> float:
    if record.calibrated is None:
        raise AdapterError(
            f"{name} is not calibrated, so it cannot answer with a coverage: it was trained without validation images, "
            "by an earlier version, or changed since; train it anew with a validation part"
        )
    try:
        return bound(record.calibrated, coverage)
    except CoverageError as error:
        raise CoverageError(f"{name}: {error}") from None


def name_sets(record: AdapterRecord, probabilities: Tensor, coverage: float) -> list[list[tuple[str, float]]]:
    """Name, for each image, the classes that hold the truth with this coverage, most probable first.

    Args:
        record: of a calibrated adapter.
        probabilities: as the model gives them, [B, classes] on the CPU; those returned are calibrated.
        coverage: see `visgraft.measure.conformal`.

    Raises:
        AdapterError, CoverageError: the adapter cannot answer so.
    """
    highest = _bound("the adapter", record, coverage)
    assert record.calibrated is not None
    logs = recalibrated(probabilities, record.calibrated.temperature, record.multi_label)
    inside, order = class_sets(logs, highest, record.multi_label), logs.argsort(dim=-1, descending=True)
    names, sure = record.classes or tuple(map(str, range(logs.shape[-1]))), logs.exp().tolist()
    return [[(names[i], sure[row][i]) for i in best if inside[row, i]] for row, best in enumerate(order.tolist())]
