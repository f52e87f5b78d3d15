"""The format `executorch`: one program for ExecuTorch's runtime on phones and small computers, computed by XNNPACK."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from visgraft.backbones.weights import first_line
from visgraft.export.format import ExportError, Format, Subject, register_format
from visgraft.export.graph import traced_model, tracing
from visgraft.export.metadata import FIXED_PIXELS, as_json, metadata
from visgraft.export.samples import Samples, answers_of
from visgraft.options import Options, option

METADATA = "metadata"
"""The method of the program, beside `forward`, that answers what a user has to know, as JSON."""


@dataclass(frozen=True)
class ExecuTorchOptions(Options):
    """Options of the format `executorch`."""

    pixels: Literal["float", "uint8"] = option("float", FIXED_PIXELS)
    most_images: int = option(8, "largest number of images at once, for which memory is set aside")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_images < 2:
            raise ExportError(f"--most-images is {self.most_images}, but must be at least 2; leave it out for 8")


@register_format("executorch")
class ExecuTorch(Format):
    """One .pte file: images in, logits [B, classes] out, for any number of images B up to `most_images`."""

    Options = ExecuTorchOptions
    summary = "one program for ExecuTorch on phones and small computers"
    suffix = ".pte"
    packages = MappingProxyType({"executorch": "executorch"})
    extra = "executorch"
    runtime = "executorch"
    cannot = MappingProxyType(
        {
            "pixels": {
                "any-size": "ExecuTorch sets memory aside for the largest picture there can be; use --pixels uint8, or "
                "--format onnx or torch"
            }
        }
    )

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        program = traced_model(subject.model, subject.adapted.record.data_config, options.pixels, options.most_images)
        with tracing(), _silent():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            try:
                constants = {METADATA: as_json(metadata(subject, options))}
                lowered = to_edge_transform_and_lower(
                    program, partitioner=[XnnpackPartitioner()], constant_methods=constants
                ).to_executorch()
            except Exception as error:  # whatever ExecuTorch's passes raise
                raise ExportError(
                    f"ExecuTorch cannot write this model ({first_line(error)}); use --format onnx or torch"
                ) from error
        target.write_bytes(lowered.buffer)
        return {"input": options.pixels, "most_images": options.most_images}

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        try:
            with tracing(), _silent():
                from executorch.runtime import Runtime, Verification

                program = Runtime.get().load_program(target, verification=Verification.InternalConsistency)
                forward = program.load_method("forward")
                assert forward is not None
        except Exception as error:
            raise ExportError(
                f"ExecuTorch does not open the exported program ({first_line(error)}); export it again"
            ) from error

        def run(feed: np.ndarray) -> np.ndarray:
            (answer,) = forward.execute([torch.from_numpy(feed.copy())])
            found: np.ndarray = answer.detach().numpy().copy()
            return found

        return lambda samples: answers_of(run, samples, options.pixels, options.most_images)

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        return f"executorch.runtime.Runtime.get().load_program({str(out)!r}).load_method('forward').execute([images])"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what ExecuTorch's C++ writes to standard error about the processor from the user's terminal."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
