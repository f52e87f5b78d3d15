"""The format `timm`: the adapter folded into one plain model, in a folder that timm opens by itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from visgraft.adapters.directory import Adapted
from visgraft.export.format import Format, Subject, register_format
from visgraft.export.merge import why_not_merged
from visgraft.export.plain import reopen_plain, write_plain
from visgraft.export.proof import torch_answers
from visgraft.export.samples import Samples


@register_format("timm")
class TimmFolder(Format):
    """What `visgraft merge` writes: config.json and model.safetensors."""

    summary = "one plain timm model, as the verb merge writes it"
    runtime = "timm"

    @classmethod
    def refusal(cls, adapted: Adapted, options: Any) -> str | None:
        return why_not_merged(adapted.model, adapted.record.method)

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        record = subject.adapted.record
        write_plain(subject.plain(), target, subject.adapted.classes, record.data_config, record.tasks)
        return {}

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        model = reopen_plain(target)
        return lambda samples: torch_answers(model, samples)

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        return f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
