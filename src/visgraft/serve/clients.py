"""Protocols that clients speak already: huggingface_hub's image classification, and the Open Inference Protocol v2."""

import base64
import binascii
import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request, Response

from visgraft.data.tasks import class_outputs, output_slices, written
from visgraft.errors import VisgraftError
from visgraft.serve.answering import SaidOf, SentPicture
from visgraft.serve.bodies import CLASSIFY, INFER
from visgraft.serve.layout import joined
from visgraft.serve.naming import THRESHOLD, Classes, NumberAnswer, answers_to_tasks
from visgraft.serve.replies import AsciiJson, ClassScore, answer_to, ranked, task_facts
from visgraft.serve.server import Server
from visgraft.version import __version__

LOG = logging.getLogger(__name__)
FUNCTIONS = {"softmax": torch.nn.functional.softmax, "sigmoid": lambda x, dim: x.sigmoid(), "none": lambda x, dim: x}
JSON_LENGTH = "inference-header-content-length"
IMAGE, PIXELS = "image", "pixels"
OUTPUTS = PROBABILITIES, LOGITS, LABEL = "probabilities", "logits", "label"
LARGEST_SIDE = 4096
MOST_SIDES, MOST_DIGITS = 8, 10
"""Of a shape and of a length: a product of millions of sides, or a number of thousands of digits, takes minutes."""


def add_clients(app: FastAPI, server: Server) -> None:
    """Add the routes of both."""
    _add_hugging_face(app, server)
    _add_health(app, server)
    _add_models(app, server)


def _add_hugging_face(app: FastAPI, server: Server) -> None:
    @app.post("/models/{name:path}", response_model=list[ClassScore], openapi_extra=CLASSIFY)
    async def classify(name: str, request: Request) -> Any:
        """Answer as huggingface_hub's `InferenceClient(model=URL).image_classification` expects it."""
        content = await request.body()
        top, function = 5, None
        if request.headers.get("content-type", "").lower().startswith("application/json"):
            content, top, function = _inputs(content)
        found, _ = await server.answer(request, [SentPicture("the picture", content)], [name])
        if found[0].adapter is None:
            raise HTTPException(422, found[0].error)
        record, scores = found[0].adapter.record, found[0].probabilities
        if record.tasks and not class_outputs(record.tasks):
            raise HTTPException(422, f"{name!r:.40} answers numbers only, which are no classes; send it to /predict")
        if function is not None:
            places = output_slices(record.tasks) or [slice(None)]
            scores = torch.cat([FUNCTIONS[function](found[0].logits[place], -1) for place in places])
        return AsciiJson([one.model_dump() for one in ranked(record, scores, top)])


def _inputs(body: bytes) -> tuple[bytes, int, str | None]:
    """Return the picture, how many classes to name, and what makes scores of logits."""
    asked = _object(body)
    options = asked.get("parameters") or {}
    top, function = (options.get("top_k"), options.get("function_to_apply")) if isinstance(options, dict) else (0, 0)
    top = 5 if top is None else top
    if not isinstance(top, int) or isinstance(top, bool) or not 1 <= top <= 1000:
        raise HTTPException(422, "parameters.top_k must be a whole number from 1 to 1000")
    if function is not None and (not isinstance(function, str) or function not in FUNCTIONS):
        raise HTTPException(422, f"parameters.function_to_apply must be one of {', '.join(FUNCTIONS)}")
    return _from_base64(asked.get("inputs"), "inputs"), top, function


def _add_health(app: FastAPI, server: Server) -> None:
    @app.get("/v2/health/live")
    async def live() -> Any:
        """Tell whether the process answers."""
        return AsciiJson({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> Any:
        """Tell whether pictures go through the whole way."""
        try:
            await server.check()
        except VisgraftError as error:
            return AsciiJson({"ready": False, "error": str(error)}, 503)
        except Exception:
            LOG.exception("a seeded picture got no answer")
            return AsciiJson({"ready": False, "error": "the model gives no answer; the server's log says why"}, 503)
        return AsciiJson({"ready": True})

    @app.get("/v2")
    async def about() -> Any:
        """Tell what this server is."""
        return {"name": "visgraft", "version": __version__, "extensions": ["classification", "binary_tensor_data"]}


def _add_models(app: FastAPI, server: Server) -> None:
    # Routes with an ending come first, as a name may itself hold a slash.
    @app.get("/v2/models/{name:path}/ready")
    async def model_ready(name: str) -> Any:
        """Tell whether an adapter answers."""
        (await server.current()).get(name)
        return AsciiJson({"name": name, "ready": True})

    @app.post("/v2/models/{name:path}/infer", openapi_extra=INFER)
    async def infer(name: str, request: Request) -> Any:
        """Answer encoded pictures (input `image`, BYTES) or prepared ones (input `pixels`, FP32 [n, 3, H, W])."""
        header, rest = _split(await request.body(), request.headers.get(JSON_LENGTH))
        tensors = _tensors(header, rest)
        (await server.current()).get(name)
        if set(tensors) == {IMAGE}:
            sent = _pictures(tensors[IMAGE], server.config.max_images)
            pictures = [SentPicture(f"picture {n}", one) for n, one in enumerate(sent, 1)]
            found, _ = await server.answer(request, pictures, [name])
            broken = [one.error for one in found if one.adapter is None]
            if broken:
                raise HTTPException(422, broken[0])
        elif set(tensors) == {PIXELS}:
            found = await server.answer_prepared(request, _pixels(tensors[PIXELS]), name)
        else:
            raise HTTPException(422, f"inputs must be {IMAGE} or {PIXELS}, not {', '.join(tensors) or 'none'}")
        return _reply(name, header, found)

    @app.get("/v2/models/{name:path}")
    async def model(name: str) -> Any:
        """Tell what an adapter takes and answers."""
        record = (await server.current()).get(name).record
        size = list(record.data_config["input_size"])
        told = {"parameters": {"tasks": task_facts(record)}} if record.tasks else {}
        labels = [-1, len(record.tasks)] if record.tasks else [-1]
        return AsciiJson(
            {
                "name": name,
                "versions": [],
                "platform": "visgraft",
                "inputs": [
                    {"name": IMAGE, "datatype": "BYTES", "shape": [-1]},
                    {"name": PIXELS, "datatype": "FP32", "shape": [-1, *size]},
                ],
                "outputs": [
                    {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, record.outputs]},
                    {"name": LOGITS, "datatype": "FP32", "shape": [-1, record.outputs]},
                    {"name": LABEL, "datatype": "BYTES", "shape": labels},
                ],
                **told,
            }
        )


class InputTensor(NamedTuple):
    """A tensor that was sent: its kind and shape, and its bytes or, as JSON, its values."""

    kind: str
    shape: list[int]
    data: Any


def _split(body: bytes, length: str | None) -> tuple[dict[str, Any], bytes]:
    """Return the JSON at the head of a body, and the binary data behind it."""
    if length is not None and (not length.isdecimal() or len(length) > MOST_DIGITS or int(length) > len(body)):
        raise HTTPException(400, f"{JSON_LENGTH} is {length!r:.20}, but the body has {len(body)} bytes")
    end = len(body) if length is None else int(length)
    return _object(body[:end]), body[end:]


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return found


def _tensors(header: Mapping[str, Any], rest: bytes) -> dict[str, InputTensor]:
    found, begin = dict[str, InputTensor](), 0
    inputs = header.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(one, dict) for one in inputs):
        raise HTTPException(422, "inputs must be a list of tensors")
    for one in inputs:
        name, kind, shape = one.get("name"), one.get("datatype"), one.get("shape")
        whole = isinstance(shape, list) and all(type(side) is int and 0 <= side <= 2**31 for side in shape)
        if not (isinstance(name, str) and isinstance(kind, str) and whole and 0 < len(shape) <= MOST_SIDES):
            raise HTTPException(
                422, f"every input needs a name, a datatype and a shape of whole numbers, at most {MOST_SIDES}"
            )
        if name in found:
            raise HTTPException(422, f"there are two inputs {name!r:.40}; put their images into one")
        options = one.get("parameters") or {}
        size = options.get("binary_data_size") if isinstance(options, dict) else None
        if size is None:
            found[name] = InputTensor(kind, shape, one.get("data"))
        elif type(size) is int and 0 <= size <= len(rest) - begin:
            found[name], begin = InputTensor(kind, shape, rest[begin : begin + size]), begin + size
        else:
            raise HTTPException(422, f"input {name!r:.40}: binary_data_size does not fit the body")
    return found


def _pictures(tensor: InputTensor, most: int) -> list[bytes]:
    """Return encoded pictures, one more at most than the shape says: base64 in JSON, else each behind its length."""
    count = math.prod(tensor.shape)
    if count > most:
        raise HTTPException(413, f"{count} pictures are more than the {most} of one request")
    if tensor.kind != "BYTES":
        raise HTTPException(422, f"input {IMAGE} must be of datatype BYTES")
    if isinstance(tensor.data, bytes):
        found = list(islice(_behind_lengths(tensor.data), count + 1))
    else:
        values = tensor.data if isinstance(tensor.data, list) else []
        flat = (one for value in values for one in (value if isinstance(value, list) else [value]))
        found = [_from_base64(value, IMAGE) for value in islice(flat, count + 1)]
    if len(found) != count:
        raise HTTPException(422, f"input {IMAGE} has {len(found)} pictures, but the shape {tensor.shape}")
    return found


def _behind_lengths(data: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<I", data, place) if len(data) - place >= 4 else (len(data),)
        place += 4 + length
        if place > len(data):
            raise HTTPException(422, f"input {IMAGE} ends within a picture")
        yield data[place - length : place]


def _from_base64(value: Any, name: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise HTTPException(422, f"{name} must be a picture in base64") from None


def _pixels(tensor: InputTensor) -> torch.Tensor:
    if tensor.kind != "FP32" or len(tensor.shape) != 4 or max(tensor.shape) > LARGEST_SIDE or not tensor.shape[0]:
        raise HTTPException(422, f"input {PIXELS} must be FP32 of shape [images, channels, height, width]")
    try:
        if isinstance(tensor.data, bytes):
            values = np.frombuffer(tensor.data, "<f4").astype(np.float32)
        else:
            values = np.asarray(tensor.data, np.float32)
        x = torch.from_numpy(values.reshape(tensor.shape))
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise HTTPException(422, f"input {PIXELS} does not hold {math.prod(tensor.shape)} numbers") from None
    if not bool(x.isfinite().all()):
        raise HTTPException(422, f"input {PIXELS} holds numbers that are not finite")
    return x


def _reply(name: str, header: Mapping[str, Any], found: Sequence[SaidOf]) -> Response:
    """Return the outputs that were asked for, in JSON or behind it."""
    options = header.get("parameters") if isinstance(header.get("parameters"), dict) else {}
    binary = bool((options or {}).get("binary_data_output", False))
    outputs = header.get("outputs") or [{"name": PROBABILITIES}, {"name": LABEL}]
    told: list[dict[str, Any]] = []
    behind = []
    if (
        not isinstance(outputs, list)
        or len(outputs) > len(OUTPUTS)
        or not all(isinstance(one, dict) for one in outputs)
    ):
        raise HTTPException(422, f"outputs must be a list of at most {len(OUTPUTS)} objects with a name")
    for output in outputs:
        own = output.get("parameters") if isinstance(output.get("parameters"), dict) else {}
        kind, shape, values = _output(output.get("name"), (own or {}).get("classification", 0), found)
        one: dict[str, Any] = {"name": output["name"], "datatype": kind, "shape": shape}
        if (own or {}).get("binary_data", binary):
            data = _encoded(kind, values)
            behind.append(data)
            one["parameters"] = {"binary_data_size": len(data)}
        else:
            one["data"] = values
        told.append(one)
    reply: dict[str, Any] = {"model_name": name, "model_version": "1", "outputs": told}
    reply["parameters"] = {"digest": found[0].adapter.digest} if found and found[0].adapter else {}
    if isinstance(header.get("id"), str):
        reply["id"] = header["id"]
    text = AsciiJson(reply)
    if not behind:
        return text
    head = {JSON_LENGTH: str(len(text.body))}
    return Response(bytes(text.body) + b"".join(behind), headers=head, media_type="application/octet-stream")


def _output(name: Any, most: Any, found: Sequence[SaidOf]) -> tuple[str, list[int], list[Any]]:
    """Return datatype, shape and values of an output; `most` asks for its highest values with their classes."""
    if name not in OUTPUTS:
        raise HTTPException(422, f"output {name!r:.40} is none of {', '.join(OUTPUTS)}")
    record = found[0].adapter.record if found[0].adapter else None
    tasks = record.tasks if record else ()
    if name == LABEL and tasks:
        answers = answers_to_tasks(tasks, torch.stack([one.probabilities for one in found]), None, THRESHOLD)
        return "BYTES", [len(found), len(tasks)], [_as_label(each) for one in answers for each in one.values()]
    if name == LABEL:
        return "BYTES", [len(found)], [(answer_to(one, 1).classes or [])[0].label for one in found]
    rows = torch.stack([one.logits if name == LOGITS else one.probabilities for one in found])
    if most:
        if type(most) is not int or not 1 <= most <= 1000:
            raise HTTPException(422, "parameters.classification must be a whole number from 1 to 1000")
        classes = record.classes if record else ()
        if numbers := sorted({*range(rows.shape[1])} - {*class_outputs(tasks)}) if tasks else []:
            rows = rows.index_fill(1, torch.tensor(numbers), -torch.inf)
        best = rows.topk(min(most, rows.shape[1] - len(numbers)))
        texts = [
            f"{value:f}:{index}" + (f":{classes[index]}" if classes else "")
            for value, index in zip(best.values.flatten().tolist(), best.indices.flatten().tolist(), strict=True)
        ]
        return "BYTES", list(best.values.shape), texts
    return "FP32", list(rows.shape), rows.flatten().tolist()


def _as_label(answer: Classes | NumberAnswer) -> str:
    """Return an answer to one task as a table of labels has it."""
    if isinstance(answer, NumberAnswer):
        return written(answer.value, answer.spread, 6)
    return str(joined([name for name, _ in answer]))


def _encoded(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "FP32":
        return np.asarray(values, "<f4").tobytes()
    texts = [value.encode("utf-8", "replace") for value in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
