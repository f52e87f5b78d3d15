"""Weights of an ONNX graph in 8 bits, by onnxruntime's own quantiser."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visgraft.export.format import ExportError, Subject
from visgraft.export.graph import INPUTS, tracing
from visgraft.export.samples import TRAINING, feed_of

OPERATORS = ["MatMul", "Gemm"]
"""Convolutions stay as they are: on CPUs onnxruntime runs them in 8 bits slower than in 32."""

CALIBRATION_IMAGES = 64


LEAST_SHARE = 0.5
"""Of the constants' bytes that must be weights of matrix products, so that int8 is what a user expects of it."""


class _Feeds:
    """What onnxruntime's calibration asks for pictures: one feed after the other, then None."""

    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantized(proto: Any, subject: Subject, options: Any) -> Any:
    """Return the graph with the weights of its matrix products in int8, each output channel with a scale of its own.

    Raises:
        ExportError: most weights are not of products, or there is no training image to calibrate on.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    sizes = {tensor.name: len(tensor.raw_data) for tensor in proto.graph.initializer}
    products = [node for node in proto.graph.node if node.op_type in OPERATORS and node.input[1] in sizes]
    chosen, share = [node.name for node in products], _share({node.input[1] for node in products}, sizes)
    if share < LEAST_SHARE:
        raise ExportError(
            f"--precision int8 would store only {share:.0%} of the weights in 8 bits: those of products, and this "
            "backbone is made of convolutions; use fp16 instead"
        )
    common: dict[str, Any] = {
        "op_types_to_quantize": OPERATORS, "nodes_to_quantize": chosen, "per_channel": True,
        "weight_type": QuantType.QInt8,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tracing():
        before, after = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(proto.SerializeToString())
        if options.quantization == "dynamic":
            quantize_dynamic(before, after, **common)
        else:
            kind = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
            quantize_static(before, after, _Feeds(_feeds(subject, options.pixels)), **kind, **common)
        return onnx.load(str(after))


def _share(chosen: set[str], sizes: Mapping[str, int]) -> float:
    """Return the share of all constants' bytes that the chosen ones have."""
    return sum(sizes[name] for name in chosen) / max(sum(sizes.values()), 1)


def _feeds(subject: Subject, pixels: str) -> Iterator[dict[str, np.ndarray]]:
    """Yield training images in the graph's form, one by one; those that prove the result are others."""
    assert subject.calibration is not None  # int8 is refused without data
    if subject.samples.source == TRAINING:
        raise ExportError(
            "--quantization static would calibrate on the very images that prove the result, because there are only "
            "training images; give --data val or test images too, or leave --quantization out"
        )
    samples = subject.calibration()
    for number in range(min(len(samples), CALIBRATION_IMAGES)):
        yield {INPUTS[pixels]: feed_of(samples, number, pixels)}
