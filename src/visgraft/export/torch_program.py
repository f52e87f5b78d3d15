"""The format `torch`: a `torch.export` program, which torch alone runs, with preprocessing and class names inside."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from visgraft.adapters.directory import Adapted
from visgraft.backbones.weights import first_line
from visgraft.export.format import ExportError, Format, Subject, register_format
from visgraft.export.graph import traced_model, tracing
from visgraft.export.metadata import PIXELS, as_json, metadata
from visgraft.export.precision import LEAST_AGREEMENT, InHalf, check_agreement
from visgraft.export.resizing import why_not_resized
from visgraft.export.samples import Samples, answers_of
from visgraft.options import Options, option

METADATA = "metadata.json"
"""The file inside the archive that says what a user has to know."""

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TorchOptions(Options):
    """Options of the format `torch`."""

    precision: Literal["fp32", "fp16", "bf16"] = option("fp32", "of the weights, and of what is computed with them")
    pixels: Literal["float", "uint8", "any-size"] = option("float", PIXELS)
    least_agreement: float | None = option(None, LEAST_AGREEMENT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_agreement(self.least_agreement, self.precision)


@register_format("torch")
class TorchProgram(Format):
    """One .pt2 file: images in, logits [B, classes] out, for any number of images B."""

    Options = TorchOptions
    summary = "one torch.export program, for torch without timm or visgraft"
    suffix = ".pt2"

    @classmethod
    def refusal(cls, adapted: Adapted, options: Any) -> str | None:
        return why_not_resized(adapted.record.data_config) if options.pixels == "any-size" else None

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        half = HALVES.get(options.precision)
        model = subject.model if half is None else InHalf(subject.model, half)
        program = traced_model(model, subject.adapted.record.data_config, options.pixels)
        program.example_inputs = None  # the images it was traced with say nothing to anybody
        # By way of memory: where a disk is full, torch's own writer ends the whole process.
        written = io.BytesIO()
        with tracing():
            torch.export.save(program, written, extra_files={METADATA: as_json(metadata(subject, options))})
        target.write_bytes(written.getbuffer())
        return {"input": options.pixels, "operators": len(program.graph.nodes)}

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        try:
            with tracing():
                module = torch.export.load(target).module()
        except Exception as error:  # of many classes, as whatever is damaged is noticed
            raise ExportError(
                f"torch does not open the exported program ({first_line(error)}); export it again"
            ) from error

        def run(feed: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                answer: np.ndarray = module(torch.from_numpy(feed.copy())).numpy()
            return answer

        return lambda samples: answers_of(run, samples, options.pixels)

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        return f"torch.export.load({str(out)!r}).module()(images)"
