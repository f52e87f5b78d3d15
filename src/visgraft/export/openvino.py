"""The format `openvino`: model.xml and model.bin in one folder, with preprocessing and class names inside."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from visgraft.backbones.weights import first_line
from visgraft.export.format import ExportError, Format, Subject, register_format
from visgraft.export.graph import OPSET, onnx_model
from visgraft.export.metadata import FIXED_PIXELS, metadata
from visgraft.export.precision import LEAST_AGREEMENT, check_agreement
from visgraft.export.samples import Samples, answers_of
from visgraft.options import Options, option

MODEL = "model.xml"
FLOAT32 = MappingProxyType({"INFERENCE_PRECISION_HINT": "f32"})
"""On processors that are quicker in bfloat16, OpenVINO computes in that unless it is told otherwise."""


@dataclass(frozen=True)
class OpenVinoOptions(Options):
    """Options of the format `openvino`."""

    precision: Literal["fp32", "fp16"] = option("fp32", "of the stored weights; computed is in float32")
    pixels: Literal["float", "uint8"] = option("float", FIXED_PIXELS)
    least_agreement: float | None = option(None, LEAST_AGREEMENT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_agreement(self.least_agreement, self.precision)


@register_format("openvino")
class OpenVino(Format):
    """A folder with model.xml and model.bin: `pixels` in, `logits` [B, classes] out, for any number of images B."""

    Options = OpenVinoOptions
    summary = "model.xml and model.bin for OpenVINO, on Intel's processors"
    packages = MappingProxyType({"openvino": "openvino", "onnx": "onnx", "onnxscript": "onnxscript"})
    extra = "openvino"
    runtime = "openvino"
    cannot = MappingProxyType(
        {
            "pixels": {
                "any-size": "OpenVINO computes float64 in float32, so that resized pictures would not be those of "
                "training; use --pixels uint8, or --format onnx or torch"
            }
        }
    )

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        proto = onnx_model(subject.model, subject.adapted.record.data_config, options.pixels, OPSET)
        openvino = imported()
        try:
            model = openvino.Core().read_model(proto.SerializeToString())
            for key, value in metadata(subject, options).items():
                model.set_rt_info(value, ["visgraft", key])
        except Exception as error:  # OpenVINO raises RuntimeError of whatever it does not like
            raise ExportError(
                f"OpenVINO cannot write this model ({first_line(error)}); use --format onnx or torch"
            ) from error
        try:
            openvino.save_model(model, target / MODEL, compress_to_fp16=options.precision == "fp16")
        except RuntimeError as error:
            raise ExportError(
                f"{MODEL} cannot be written ({first_line(error)}); make room, or choose another --out"
            ) from error
        return {"input": options.pixels, "operators": len(model.get_ops()), "inference_precision": "f32"}

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        openvino = imported()
        core = openvino.Core()
        # What is mapped into memory could not be renamed on Windows.
        core.set_property({"ENABLE_MMAP": False})
        try:
            config = {**FLOAT32, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            compiled = core.compile_model(core.read_model(target / MODEL), "CPU", config)
        except Exception as error:
            raise ExportError(
                f"OpenVINO does not open the exported model ({first_line(error)}); export it again"
            ) from error
        return lambda samples: answers_of(lambda feed: compiled(feed)[0], samples, options.pixels)

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        return f"openvino.compile_model({str(out / MODEL)!r}, 'CPU', {dict(FLOAT32)})"


def imported() -> Any:
    """Return the module `openvino`.

    Importing it counts as its use in the statistics of its maker, over the network and unasked, unless the package
    that sends them cannot be imported; so this import does not find it.
    """
    with _hidden("openvino_telemetry"):
        import openvino
    return openvino


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let a module that is not imported yet seem not installed for a while."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
