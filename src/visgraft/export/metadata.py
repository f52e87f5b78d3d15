"""What a user of an exported file has to know, in a form that every format can hold: texts by name."""

import json
from typing import Any

from visgraft.adapters.record import AdapterRecord
from visgraft.export.format import Subject

SHAPES = {
    "float": "float32 [B, 3, H, W]",
    "uint8": "uint8 [B, H, W, 3], RGB",
    "any-size": "uint8 [B, H, W, 3], RGB",
}
PIXELS = (
    "what goes in: normalised [B, 3, H, W], uint8 [B, H, W, 3] of the model's size, or uint8 RGB of any height and "
    "width, resized and cropped in the graph as in training"
)
"""Help of the option `pixels` where all three are taken."""

FIXED_PIXELS = "what goes in: normalised [B, 3, H, W], or uint8 [B, H, W, 3] of the model's size"
"""Help of the option `pixels` where pictures have to have the model's size."""


def metadata(subject: Subject, options: Any) -> dict[str, str]:
    """Return what a user of the file has to know, as texts by name: JSON but for single words."""
    record = subject.adapted.record
    facts = {
        "classes": list(record.classes),
        "task": record.task,
        **tasks_of(record),
        "preprocessing": dict(record.data_config),
        "background": record.background,
        "input": f"{SHAPES[options.pixels]}: {options.pixels}",
        "method": record.method.to_dict() | {"method": record.method.method},
        "backbone": record.backbone.name,
        "canary": record.canary.to_json() if record.canary else None,
        "written_by": "visgraft",
    }
    return {key: value if isinstance(value, str) else as_json(value) for key, value in facts.items()}


def tasks_of(record: AdapterRecord) -> dict[str, Any]:
    """Return `tasks` where there are several: what the outputs answer, in their order.

    A class task has an output per class; a number one, and the answer is output * std + mean, in its unit.
    """
    return {"tasks": [task.to_json() for task in record.tasks]} if record.tasks else {}


def as_json(value: Any) -> str:
    """Return JSON that any file can hold: names that are not UTF-8, as folders may have, stand as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
