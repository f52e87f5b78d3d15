"""The format `onnx`: one graph for onnxruntime and all that read ONNX, with preprocessing and class names inside."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from visgraft.adapters.directory import Adapted
from visgraft.export.format import ExportError, Format, Subject, register_format
from visgraft.export.graph import INPUTS, LEAST_OPSET, OPSET, onnx_model
from visgraft.export.metadata import PIXELS, metadata
from visgraft.export.precision import LEAST_AGREEMENT, InHalf, check_agreement
from visgraft.export.quantize import quantized
from visgraft.export.resizing import why_not_resized
from visgraft.export.samples import Samples, answers_of
from visgraft.options import Options, option


@dataclass(frozen=True)
class OnnxOptions(Options):
    """Options of the format `onnx`."""

    precision: Literal["fp32", "fp16", "int8"] = option("fp32", "of the weights")
    pixels: Literal["float", "uint8", "any-size"] = option("float", PIXELS)
    opset: int = option(OPSET, "version of ONNX's operators")
    quantization: Literal["dynamic", "static"] = option(
        "dynamic", "of int8: ranges of activations found at each run, or once on training images"
    )
    least_agreement: float | None = option(None, LEAST_AGREEMENT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization != "dynamic" and self.precision != "int8":
            raise ExportError("--quantization has no effect without --precision int8; add that, or leave it out")
        check_agreement(self.least_agreement, self.precision)


@register_format("onnx")
class Onnx(Format):
    """One .onnx file: `pixels` or `picture` in, `logits` [B, classes] out, for any number of images B."""

    Options = OnnxOptions
    summary = "one graph for onnxruntime, TensorRT, OpenVINO and others"
    suffix = ".onnx"
    packages = MappingProxyType({"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"})
    extra = "onnx"
    runtime = "onnxruntime"

    @classmethod
    def refusal(cls, adapted: Adapted, options: Any) -> str | None:
        return why_not_resized(adapted.record.data_config) if options.pixels == "any-size" else None

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        check_opset(options.opset)
        model = InHalf(subject.model, torch.float16) if options.precision == "fp16" else subject.model
        record = subject.adapted.record
        proto = onnx_model(model, record.data_config, options.pixels, options.opset)
        if options.precision == "int8":
            proto = quantized(proto, subject, options)
        for key, value in metadata(subject, options).items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value
        save_proto(proto, target)
        return {"opset": options.opset, "input": INPUTS[options.pixels], "operators": len(proto.graph.node)}

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        session = open_session(target)
        return lambda samples: session_answers(session, samples, options.pixels)

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        return f"onnxruntime.InferenceSession({str(out)!r}).run(None, {{{INPUTS[options.pixels]!r}: array}})"


def check_opset(opset: int) -> None:
    """Raise an ExportError where this version of the operators is too old, or newer than onnx knows."""
    import onnx

    if opset < LEAST_OPSET:
        raise ExportError(f"--opset is {opset}, but must be at least {LEAST_OPSET}; leave it out for {OPSET}")
    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise ExportError(f"--opset is {opset}, but onnx {onnx.__version__} knows versions up to {newest}; use {OPSET}")


def save_proto(proto: Any, target: Path) -> None:
    """Write a graph to a file.

    Raises:
        ExportError: it is larger than one ONNX file can be.
    """
    if proto.ByteSize() >= 2**31:
        raise ExportError("the model is larger than 2 GiB, which one ONNX file cannot hold; add --precision fp16")
    target.write_bytes(proto.SerializeToString())


def open_session(source: Path | bytes, threads: int | None = None) -> Any:
    """Return an onnxruntime session on the CPU with as many threads as torch has, or so many.

    Raises:
        ExportError: onnxruntime does not take the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised; the rest is about its insides
    try:
        given = source if isinstance(source, bytes) else str(source)
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each kind of failure
        told = " ".join(str(error).split())[:300]
        raise ExportError(f"onnxruntime does not open the exported file ({told}); try another --opset") from error


def session_answers(session: Any, samples: Samples, pixels: str, run: Any = None) -> Tensor:
    """Return the logits [N, classes] that a session computes for samples in the form `pixels`, by these run options."""
    return answers_of(lambda feed: session.run(None, {INPUTS[pixels]: feed}, run)[0], samples, pixels)
