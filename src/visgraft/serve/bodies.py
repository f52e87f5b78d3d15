"""Bodies of requests as the OpenAPI document shows them, of routes that read theirs by themselves."""

from typing import Any

BINARY = {"type": "string", "format": "binary"}
BASE64 = {"type": "string", "format": "byte"}


def _body(kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in kinds.items()}}}


def _object(required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _list(of: dict[str, Any], **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": of, **limits}


PICTURES = _body({"multipart/form-data": _object(image=_list(BINARY)), "image/*": BINARY})
"""Of `/predict`."""

ADAPTER = _body(
    {
        "multipart/form-data": _object(("config", "tensors"), config=BINARY, tensors=BINARY, unlike=BINARY),
        "application/json": _object(("path",), path={"type": "string"}),
    }
)
"""Of an adapter that is added."""

CLASSIFY = _body(
    {
        "image/*": BINARY,
        "application/json": _object(
            ("inputs",),
            inputs=BASE64,
            parameters=_object(
                top_k={"type": "integer", "minimum": 1, "maximum": 1000},
                function_to_apply={"type": "string", "enum": ["softmax", "sigmoid", "none"]},
            ),
        ),
    }
)
"""Of huggingface_hub's image classification."""

_PARAMETERS = _object(binary_data_size={"type": "integer", "minimum": 0})
_INPUT = _object(
    ("name", "datatype", "shape"),
    name={"type": "string", "enum": ["image", "pixels"]},
    datatype={"type": "string", "enum": ["BYTES", "FP32"]},
    shape=_list({"type": "integer", "minimum": 0}, minItems=1, maxItems=8),
    parameters=_PARAMETERS,
    data={"type": "array", "items": {}},
)
_OUTPUT = _object(
    ("name",),
    name={"type": "string", "enum": ["probabilities", "logits", "label"]},
    parameters=_object(
        binary_data={"type": "boolean"}, classification={"type": "integer", "minimum": 1, "maximum": 1000}
    ),
)
INFER = _body(
    {
        "application/json": _object(
            ("inputs",),
            id={"type": "string"},
            inputs=_list(_INPUT, minItems=1),
            outputs=_list(_OUTPUT, maxItems=3),
            parameters=_object(binary_data_output={"type": "boolean"}),
        ),
        "application/octet-stream": BINARY,
    }
)
"""Of the Open Inference Protocol v2; with binary tensors the JSON stands at the head of the body."""
