"""What the server sends, as pydantic models, which the OpenAPI document shows."""

import json
import math
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from visgraft.serve.answering import SaidOf
from visgraft.serve.covering import name_sets
from visgraft.serve.hosting import HostedAdapter


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


class AnswerTo(BaseModel):
    """What an adapter says of a picture, most probable first; or why the picture cannot be answered."""

    image: str
    adapter: str | None = None
    digest: str | None = None
    classes: list[ClassScore] | None = None
    error: str | None = None


class AnswerList(BaseModel):
    """The answers picture by picture, and for each adapter by adapter; and where the time went."""

    answers: list[AnswerTo]
    milliseconds: dict[str, float]


class OneAdapter(BaseModel):
    """An adapter: `digest` is the sha256 over its two files, `figures` what was measured when it was trained.

    One that is `calibrated` answers with a coverage.
    """

    name: str
    digest: str
    method: str
    classes: list[str]
    outputs: int
    multi_label: bool
    calibrated: bool
    figures: dict[str, Any]
    pinned: bool


class Adapters(BaseModel):
    """All adapters, the backbone below them, and what one request may hold."""

    backbone: str | None
    limits: dict[str, int]
    adapters: list[OneAdapter]


def answer_to(one: SaidOf, top: int, coverage: float | None = None) -> AnswerTo:
    """Return what an adapter says of a picture, as it is sent: `top` classes, or the set with this coverage.

    Raises:
        AdapterError, CoverageError: the adapter cannot answer with the coverage.
    """
    if one.adapter is None:
        return AnswerTo(image=one.image, error=one.error)
    if coverage is not None:
        named = name_sets(one.adapter.record, one.probabilities[None].cpu(), coverage)[0]
    else:
        best = one.probabilities.topk(min(top, len(one.probabilities)))
        names = one.adapter.record.classes or tuple(map(str, range(len(one.probabilities))))
        named = [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    classes = [ClassScore(label=name, score=p) for name, p in named]
    return AnswerTo(image=one.image, adapter=one.adapter.adapter.name, digest=one.adapter.digest, classes=classes)


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
        calibrated=record.calibrated is not None,
        figures=_finite(record.figures),
        pinned=pinned,
    )


def _finite(value: Any) -> Any:
    """Return stored figures with nothing where a number is infinite or none."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
