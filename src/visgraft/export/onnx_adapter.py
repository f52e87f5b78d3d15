"""The format `onnx-adapter`: the backbone once, without a task, and each adapter as a small file that is swapped."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from visgraft.backbones.heads import output_layers
from visgraft.backbones.weights import first_line
from visgraft.core.attached import get_attached
from visgraft.export.adapters_folder import (
    BACKBONE,
    check_name,
    facts_of,
    file_name,
    read_adapters,
    taken_over,
    write_adapters,
)
from visgraft.export.format import ExportError, Format, Subject, register_format
from visgraft.export.graph import INPUTS, OPSET, example_inputs, onnx_program, sizes_of, with_pixels
from visgraft.export.metadata import PIXELS
from visgraft.export.onnx import check_opset, open_session, save_proto, session_answers
from visgraft.export.onnx_mixed import MOST_CLASSES, ROWS, mixed_answers, write_mixed
from visgraft.export.precision import LEAST_AGREEMENT, check_agreement
from visgraft.export.quantize import quantized
from visgraft.export.samples import Samples
from visgraft.options import Options, option

SUFFIX = ".onnx_adapter"


@dataclass(frozen=True)
class OnnxAdapterOptions(Options):
    """Options of the format `onnx-adapter`."""

    base: str | None = option(
        None, "folder of an earlier export with the same backbone and method options, to which the adapter is added"
    )
    name: str | None = option(None, "of the adapter's file; none: that of its folder")
    precision: Literal["fp32", "int8"] = option("fp32", "of the backbone; adapters stay in fp32")
    pixels: Literal["float", "uint8", "any-size"] = option("float", PIXELS)
    mixed: bool = option(
        False, "every image of a batch brings its own adapter, as a row of numbers, in place of one for the whole run"
    )
    most_classes: int | None = option(
        None, f"outputs of a mixed graph; none: as --base has, else {MOST_CLASSES}, or what this adapter has if more"
    )
    opset: int = option(OPSET, "version of ONNX's operators")
    least_agreement: float | None = option(None, LEAST_AGREEMENT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_agreement(self.least_agreement, self.precision)
        check_name(self.name)
        if self.mixed and self.precision != "fp32":
            raise ExportError(f"--precision {self.precision} has no form with --mixed; leave out one of both")
        if self.most_classes is not None and not self.mixed:
            raise ExportError("--most-classes has no effect without --mixed; add that, or leave it out")
        if self.most_classes is not None and self.most_classes < 1:
            raise ExportError(f"--most-classes is {self.most_classes}, but must be at least 1")

    @property
    def quantization(self) -> str:
        """How the backbone comes to int8."""
        return "dynamic"


class _WithInputs(nn.Module):
    """A model whose adapter's tensors are arguments, in the order of their names."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, pixels: Tensor, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        answer: Tensor = torch.func.functional_call(self.model, given, (pixels,))
        return answer


@register_format("onnx-adapter")
class OnnxAdapter(Format):
    """A folder: `backbone.onnx`, one file per adapter, and `adapters.json` on what each answers.

    The file is onnxruntime's `.onnx_adapter`; in a mixed folder a row of numbers in safetensors.
    """

    Options = OnnxAdapterOptions
    summary = "one ONNX backbone for all tasks, a small file per adapter, swapped in under a millisecond"
    packages = MappingProxyType({"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"})
    extra = "onnx"
    runtime = "onnxruntime"

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        check_opset(options.opset)
        if options.mixed:
            return write_mixed(subject, options, target, cls.name)
        tensors = stored_tensors(subject)
        about = about_backbone(subject, options, tensors)
        name = options.name or file_name(subject.name)
        known: dict[str, Any] = {}
        if options.base is None:
            save_proto(backbone_proto(subject, options, tensors), target / BACKBONE)
        else:
            known = taken_over(Path(options.base), target, about, name, cls.name)
        write_adapter({key: value.numpy() for key, value in tensors.items()}, target / f"{name}{SUFFIX}")
        known[name] = {"file": f"{name}{SUFFIX}", **facts_of(subject, options)}
        write_adapters(target, about, known)
        return {
            "adapter": name,
            "adapters": list(known),
            "adapter_bytes": (target / f"{name}{SUFFIX}").stat().st_size,
            "swap_seconds": _swap_seconds(target / f"{name}{SUFFIX}"),
        }

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        import onnxruntime

        name = list(read_adapters(target)["adapters"])[-1]
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(target / f"{name}{SUFFIX}"))
        session = open_session(target / BACKBONE)

        def answer(samples: Samples) -> Tensor:
            run = onnxruntime.RunOptions()
            run.add_active_adapter(adapter)  # which the options do not keep alive
            return session_answers(session, samples, options.pixels, run)

        return answer

    @classmethod
    def opened_onto(cls, subject: Subject, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        return mixed_answers(subject, target, options) if options.mixed else cls.opened(target, options)

    @classmethod
    def images_each(cls, options: Any) -> int:
        return 2 if options.mixed else 1

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        if options.mixed:
            return f"a row per image: {str(out / BACKBONE)!r} takes them as {ROWS!r} (docs/export.md)"
        return f"onnxruntime.LoraAdapter().Load(...), active in a run of {str(out / BACKBONE)!r} (docs/export.md)"


def stored_tensors(subject: Subject) -> dict[str, Tensor]:
    """Return what the adapter holds, by name, on the CPU: the inputs of the graph besides the images."""
    stored = get_attached(subject.adapted.model).stored()
    return {
        name: tensor.detach().float().cpu() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in stored.items()
    }


def about_backbone(subject: Subject, options: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what two adapters must have in common to share a backbone file."""
    record = subject.adapted.record
    bound = _class_bound(subject)
    return {
        "name": record.backbone.name,
        "digest": record.digest,
        "method": record.method.to_dict() | {"method": record.method.method},
        "preprocessing": dict(record.data_config),
        "precision": options.precision,
        "pixels": options.pixels,
        "opset": options.opset,
        "inputs": {name: [*t.shape[1:]] if name in bound else [*t.shape] for name, t in tensors.items()},
    }


def _class_bound(subject: Subject) -> set[str]:
    """Return the names of the tensors that have a row per class."""
    owners = output_layers(subject.adapted.model)
    return {f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")}


def backbone_proto(subject: Subject, options: Any, tensors: Mapping[str, Tensor], optional: bool = True) -> Any:
    """Return the graph, whose further inputs are the adapter's tensors.

    Where they are optional and left out, they are those of no task.

    Raises:
        ExportError: the adapter has one output only, or the graph cannot be made.
    """
    from onnx import numpy_helper

    record, names, bound = subject.adapted.record, tuple(tensors), _class_bound(subject)
    model = _WithInputs(with_pixels(subject.adapted.model, record.data_config, options.pixels), names)
    if options.pixels != "float":  # one level deeper, behind the preprocessing
        model.names = tuple(f"model.{name}" for name in names)
    classes = torch.export.Dim("classes", min=2)
    sizes = (sizes_of(options.pixels), tuple({0: classes} if name in bound else {} for name in names))
    # Of two classes, so that nothing is concluded from how many this adapter has.
    neutral = _neutral(subject, tensors, bound)
    example = (example_inputs(record.data_config, options.pixels), *neutral.values())
    if record.outputs < 2:
        raise ExportError("an adapter with fewer than two outputs has no classes to swap; export it as onnx")
    proto = onnx_program(model, example, sizes, options.opset, [INPUTS[options.pixels], *names])
    if options.precision == "int8":
        proto = quantized(proto, subject, options)
    # Only now: the quantiser takes an input with a default for a constant.
    for name, tensor in neutral.items() if optional else ():
        proto.graph.initializer.append(numpy_helper.from_array(tensor.numpy(), name))
    return proto


def _neutral(subject: Subject, tensors: Mapping[str, Tensor], bound: set[str]) -> dict[str, Tensor]:
    """Return the tensors of no task: the backbone's own as they were, and zeros, of two classes, elsewhere."""
    originals = get_attached(subject.adapted.model).originals
    found = {}
    for name, tensor in tensors.items():
        if name in bound:
            found[name] = torch.zeros(2, *tensor.shape[1:])
        else:
            own = originals.get(name)
            found[name] = torch.zeros_like(tensor) if own is None else own.to(tensor.dtype).cpu()
    return found


def write_adapter(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    """Write tensors in onnxruntime's own format for adapters."""
    import onnxruntime

    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}
    form.set_parameters(values)
    try:
        form.export_adapter(str(file))
    except RuntimeError as error:  # as onnxruntime says that a file cannot be opened or written
        raise ExportError(
            f"{file.name:.80} cannot be written ({first_line(error)}); make room, or give a shorter --name"
        ) from error


def _swap_seconds(file: Path) -> float:
    """Return the median time that onnxruntime takes to load an adapter's file."""
    import onnxruntime

    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        onnxruntime.LoraAdapter().Load(str(file))
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[len(seconds) // 2]
