"""Answers that hold the truth as often as is asked: the whole set of classes, with calibrated probabilities."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from visgraft.adapters.calibrated import ONE_LABEL, Calibrated
from visgraft.adapters.record import AdapterRecord
from visgraft.data.tasks import LabelTask
from visgraft.errors import AdapterError, VisgraftError
from visgraft.measure.conformal import CoverageError, bound, check_coverage, class_sets, interval
from visgraft.measure.temperature import recalibrated
from visgraft.serve.naming import Classes, NumberAnswer, TaskAnswers, by_image


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
        for task in (task.name for task in record.tasks) if record.tasks else (ONE_LABEL,):
            _bound(name, record, coverage, task)


def _bound(name: str, record: AdapterRecord, coverage: float, task: str = ONE_LABEL) -> float:
    if not record.calibrated:
        raise AdapterError(
            f"{name} is not calibrated, so it cannot answer with a coverage: it was trained without validation images, "
            "by an earlier version, or changed since; train it anew with a validation part"
        )
    of_task = f", task {task}" if task else ""
    if task not in record.calibrated:
        raise AdapterError(
            f"{name}{of_task} is not calibrated, as no validation image had its label; train anew with some that have"
        )
    try:
        return bound(record.calibrated[task], coverage)
    except CoverageError as error:
        raise CoverageError(f"{name}{of_task}: {error}") from None


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
    names = record.classes or tuple(map(str, range(probabilities.shape[-1])))
    return _sets(names, probabilities, record.multi_label, record.calibrated[ONE_LABEL], highest)


def tasks_covered(record: AdapterRecord, answers: Tensor, coverage: float) -> list[TaskAnswers]:
    """Return, for each image and task, the set of classes or the interval of a number with this coverage.

    The coverage is that of each task by itself.

    Args:
        record: of a calibrated adapter with several tasks.
        answers: what its outputs say, [B, outputs] on the CPU.
        coverage: see `visgraft.measure.conformal`.

    Raises:
        AdapterError, CoverageError: the adapter cannot answer so.
    """

    def of_all(task: LabelTask, own: Tensor) -> Sequence[Classes | NumberAnswer]:
        highest = _bound("the adapter", record, coverage, task.name)
        if task.kind == "number":
            return [NumberAnswer(n, task.unit, *interval(n, highest), task.std) for n in own[:, 0].tolist()]
        return _sets(task.classes, own, task.kind == "several_classes", record.calibrated[task.name], highest)

    return by_image(record.tasks, answers, of_all)


def _sets(
    names: Sequence[str], probabilities: Tensor, several: bool, calibrated: Calibrated, highest: float
) -> list[Classes]:
    logs = recalibrated(probabilities, calibrated.temperature, several)
    inside, order = class_sets(logs, highest, several), logs.argsort(dim=-1, descending=True)
    sure = logs.exp().tolist()
    return [[(names[i], sure[row][i]) for i in best if inside[row, i]] for row, best in enumerate(order.tolist())]
