"""From a model in torch to one ONNX graph: pixels of the wanted form in, logits out, any number of images."""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visgraft.adapters.canary import channel_values
from visgraft.backbones.weights import first_line
from visgraft.export.format import ExportError
from visgraft.export.resizing import AnySize, resize_plan

LEAST_OPSET, OPSET = 18, 20
INPUTS = {"float": "pixels", "uint8": "pixels", "any-size": "picture"}


class FromPixels(nn.Module):
    """A model behind its own preprocessing: uint8 [B, H, W, C] in; resized and cropped first where that is wanted."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, data_config: Mapping[str, Any], any_size: bool) -> None:
        super().__init__()
        self.model = model
        self.resize = AnySize(resize_plan(data_config)) if any_size else None
        for name in ("mean", "std"):
            values = channel_values(data_config, name, data_config["input_size"][0])
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        x = pixels.permute(0, 3, 1, 2).float() if self.resize is None else self.resize(pixels)
        return self.model((x / 255 - self.mean) / self.std)


def example_inputs(data_config: Mapping[str, Any], pixels: str) -> Tensor:
    """Return two images of the form `float`, `uint8` or `any-size`, to trace with."""
    channels, height, width = data_config["input_size"]
    if pixels == "float":
        return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    if pixels == "any-size":  # a size that is neither square nor the model's, so that nothing is taken for constant
        height, width = height + 37, width + 101
    return torch.randint(0, 256, (2, height, width, channels), generator=torch.Generator().manual_seed(0)).byte()


def with_pixels(model: nn.Module, data_config: Mapping[str, Any], pixels: str) -> nn.Module:
    """Return the model as it takes images of this form, in eval mode."""
    return model if pixels == "float" else FromPixels(model, data_config, pixels == "any-size").eval()


def sizes_of(pixels: str, most: int | None = None) -> dict[int, Any]:
    """Return which axes of the input may have any size; of images there may be up to `most`."""
    sizes = {0: torch.export.Dim("batch", min=1, max=most)}
    if pixels == "any-size":
        sizes |= {1: torch.export.Dim("height", min=2, max=30000), 2: torch.export.Dim("width", min=2, max=30000)}
    return sizes


def traced(model: nn.Module, example: tuple[Tensor, ...], sizes: tuple[Any, ...]) -> Any:
    """Return a model as a `torch.export` program; `sizes` has the free axes of each argument, those behind the first
    in one tuple.

    Raises:
        ExportError: torch cannot trace it; the operation is named.
    """
    try:
        with torch.no_grad(), tracing():
            program = torch.export.export(model, example, dynamic_shapes=sizes, strict=False)
    except Exception as error:  # whatever the model's own code and torch's tracer raise
        raise ExportError(
            f"torch cannot trace {_name(model)} with any number of images ({first_line(error)}); keep the adapter in "
            "torch, or merge it"
        ) from error
    _forget_files(program)
    return program


def _forget_files(program: Any) -> None:
    """Take out of a program which lines of which files it was traced from: every format would store those paths."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def traced_model(model: nn.Module, data_config: Mapping[str, Any], pixels: str, most: int | None = None) -> Any:
    """Return a model that takes images of the form `pixels` as a `torch.export` program: any number, or up to `most`.

    Raises:
        ExportError: torch cannot trace it; the operation is named.
    """
    whole, example = with_pixels(model, data_config, pixels), (example_inputs(data_config, pixels),)
    return traced(whole, example, (sizes_of(pixels, most),))


def onnx_model(
    model: nn.Module, data_config: Mapping[str, Any], pixels: str, opset: int, output: str = "logits"
) -> Any:
    """Return an `onnx.ModelProto` with the input `pixels` or `picture` and one output.

    Raises:
        ExportError: the model cannot be traced, or an operation has no form in this opset.
    """
    whole, example = with_pixels(model, data_config, pixels), (example_inputs(data_config, pixels),)
    return onnx_program(whole, example, (sizes_of(pixels),), opset, [INPUTS[pixels]], output)


def onnx_program(
    model: nn.Module,
    example: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    opset: int,
    names: Sequence[str],
    output: str = "logits",
) -> Any:
    """Return an `onnx.ModelProto` whose inputs have these names; free axes are called as their sizes are.

    Raises:
        ExportError: the model cannot be traced, or an operation has no form in this opset.
    """
    program = traced(model, example, sizes)

    def named(axes: dict[int, Any]) -> dict[int, str]:
        return {axis: dim.__name__ for axis, dim in axes.items()}

    free = tuple(named(one) if isinstance(one, dict) else tuple(map(named, one)) for one in sizes)
    try:
        with tracing():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(names),
                output_names=[output],
                dynamic_shapes=free,
                optimize=True,
            )
    except Exception as error:
        raise ExportError(
            f"{_name(model)} cannot be written in ONNX with opset {opset} ({first_line(error)}); try another --opset "
            "or another format"
        ) from error
    assert made is not None
    return made.model_proto


def _name(model: nn.Module) -> str:
    """Return the class of the user's model, inside what this package put around it."""
    while inner := getattr(model, "model", None):
        model = inner
    return type(model).__name__


_ONE_AT_A_TIME = threading.RLock()
"""torch's tracer keeps state of its own for the whole process."""


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Keep what exporters print and warn of from the user: it is about their insides, and the proof follows.

    One thread is inside at a time.
    """
    levels = {name: logging.getLogger(name).level for name in ("", "torch.onnx", "onnxscript", "onnx_ir")}
    # A fused attention lays its result out otherwise than what it is decomposed into later, and views of it then fail.
    plain = sdpa_kernel([SDPBackend.MATH])
    with _ONE_AT_A_TIME, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), plain:
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
