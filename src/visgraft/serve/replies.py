"""What the server sends, as pydantic models, which the OpenAPI document shows."""

import json
import math
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from torch import Tensor

from visgraft.adapters.record import AdapterRecord
from visgraft.data.tasks import class_outputs, output_slices
from visgraft.serve.answering import SaidOf
from visgraft.serve.covering import name_sets, tasks_covered
from visgraft.serve.hosting import HostedAdapter
from visgraft.serve.marking import far_of
from visgraft.serve.naming import Classes, NumberAnswer, answers_to_tasks
from visgraft.serve.unlike import lowest_level


class AsciiJson(JSONResponse):
    """JSON in which every text can be written, also a class name with half of a surrogate pair."""

    def render(self, content: Any) -> bytes:
        """Return the bytes that are sent."""
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


class ErrorReply(BaseModel):
    """What is wrong, in one sentence."""

    error: str


class ClassScore(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class TaskReply(BaseModel):
    """What is answered to one task of several: its classes, most probable first, or a number in its unit.

    With a coverage, the number lies between `low` and `high`.
    """

    classes: list[ClassScore] | None = None
    value: float | None = None
    unit: str | None = None
    low: float | None = None
    high: float | None = None


class AnswerTo(BaseModel):
    """What an adapter says of a picture, most probable first; or why the picture cannot be answered.

    Of an adapter with several tasks, `tasks` stand in place of `classes`. Where it was asked, `as_far` is the share of
    validation images that lie at least as far from the training's, and `unlike` whether that is below the level.
    """

    image: str
    adapter: str | None = None
    digest: str | None = None
    classes: list[ClassScore] | None = None
    tasks: dict[str, TaskReply] | None = None
    as_far: float | None = None
    unlike: bool | None = None
    error: str | None = None


class AnswerList(BaseModel):
    """The answers picture by picture, and for each adapter by adapter; and where the time went."""

    answers: list[AnswerTo]
    milliseconds: dict[str, float]


class OneAdapter(BaseModel):
    """An adapter: `digest` is the sha256 over its files, `figures` what was measured when it was trained.

    `tasks` are what its outputs answer, in their order, where that is not one label. One that is `calibrated` answers
    with a coverage, one with `unlike` marks pictures unlike those of its training, at levels from `unlike_from`.
    """

    name: str
    digest: str
    method: str
    classes: list[str]
    outputs: int
    multi_label: bool
    calibrated: bool
    unlike: bool
    unlike_from: float | None = None
    figures: dict[str, Any]
    pinned: bool
    tasks: list[dict[str, Any]] = []


class Adapters(BaseModel):
    """All adapters, the backbone below them, and what one request may hold."""

    backbone: str | None
    limits: dict[str, int]
    adapters: list[OneAdapter]


def answer_to(one: SaidOf, top: int, coverage: float | None = None, unlike: float | None = None) -> AnswerTo:
    """Return what an adapter says of a picture, as it is sent: `top` classes, or the set with this coverage.

    With `unlike`, it says as well how far the picture lies from the training's, and marks it at this level.

    Raises:
        AdapterError, CoverageError: the adapter cannot answer with the coverage, or mark at this level.
    """
    if one.adapter is None:
        return AnswerTo(image=one.image, error=one.error)
    answer = _answer_to(one, one.adapter, top, coverage)
    if unlike is None or one.features is None:
        return answer
    far = far_of(one.adapter, one.features, unlike)
    return answer.model_copy(update={"as_far": far.as_far, "unlike": far.unlike})


def _answer_to(one: SaidOf, adapter: HostedAdapter, top: int, coverage: float | None) -> AnswerTo:
    record, name, digest = adapter.record, adapter.adapter.name, adapter.digest
    if record.tasks:
        if coverage is None:
            (found,) = answers_to_tasks(record.tasks, one.probabilities[None], top, 0.0)
        else:
            (found,) = tasks_covered(record, one.probabilities[None].cpu(), coverage)
        tasks = {task: _task_reply(answer) for task, answer in found.items()}
        return AnswerTo(image=one.image, adapter=name, digest=digest, tasks=tasks)
    if coverage is None:
        classes = ranked(record, one.probabilities, top)
    else:
        (named,) = name_sets(record, one.probabilities[None].cpu(), coverage)
        classes = [ClassScore(label=label, score=p) for label, p in named]
    return AnswerTo(image=one.image, adapter=name, digest=digest, classes=classes)


def ranked(record: AdapterRecord, scores: Tensor, top: int) -> list[ClassScore]:
    """Return the classes with the highest of an adapter's scores [outputs]; with tasks, those of all, without numbers.

    Those are called as the outputs are, such as colour=red.
    """
    kept = class_outputs(record.tasks) if record.tasks else list(range(len(scores)))
    best = scores[kept].topk(min(top, len(kept)))
    names = record.classes or tuple(map(str, kept))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [ClassScore(label=names[kept[i]], score=p) for p, i in pairs]


def _task_reply(answer: Classes | NumberAnswer) -> TaskReply:
    if isinstance(answer, NumberAnswer):
        return TaskReply(value=answer.value, unit=answer.unit, low=answer.low, high=answer.high)
    return TaskReply(classes=[ClassScore(label=label, score=score) for label, score in answer])


def task_facts(record: AdapterRecord) -> list[dict[str, Any]]:
    """Return what is told of each task, with the first of the outputs that answer it and how many those are."""
    places = zip(record.tasks, output_slices(record.tasks), strict=True)
    return [{**task.to_json(), "first_output": place.start, "outputs": task.outputs} for task, place in places]


def one_adapter(name: str, hosted: HostedAdapter, pinned: bool) -> OneAdapter:
    """Return what is told of an adapter."""
    record = hosted.record
    return OneAdapter(
        name=name,
        digest=hosted.digest,
        method=record.method.method,
        classes=list(record.classes),
        outputs=record.outputs,
        multi_label=record.multi_label,
        calibrated=bool(record.calibrated),
        unlike=hosted.reference is not None,
        unlike_from=lowest_level(hosted.reference.images) if hosted.reference else None,
        figures=_finite(record.figures),
        pinned=pinned,
        tasks=task_facts(record),
    )


def _finite(value: Any) -> Any:
    """Return stored figures with nothing where a number is infinite or none."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
