"""The format `web`: a folder for any static server, whose page answers in the browser and swaps adapters there."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageColor
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from visgraft.adapters.directory import Adapted
from visgraft.errors import VisgraftError
from visgraft.export.adapters_folder import (
    ADAPTERS,
    BACKBONE,
    check_name,
    facts_of,
    file_name,
    read_adapters,
    taken_over,
    write_adapters,
)
from visgraft.export.format import ExportError, Format, Subject, register_format
from visgraft.export.graph import INPUTS, OPSET, onnx_model
from visgraft.export.onnx import check_opset, open_session, save_proto
from visgraft.export.onnx_adapter import (
    OnnxAdapter,
    OnnxAdapterOptions,
    about_backbone,
    backbone_proto,
    stored_tensors,
)
from visgraft.export.precision import LEAST_AGREEMENT
from visgraft.export.resizing import resize_plan
from visgraft.export.samples import Samples, feed_of
from visgraft.export.web_runtime import WASM, WEBGPU, write_runtime
from visgraft.options import Options, option

PAGE = ("index.html", "page.js", "answering.js", "computing.js", "loading.js", "style.css")
SUFFIX, CHECK, RUNTIME, RESIZE = ".safetensors", "check.png", "runtime", "resize.onnx"
CHECK_SIZE = (97, 131)
"""Height and width of the picture that the page checks itself with: of odd sides, so that it is resized."""

LARGE = 1024
"""Constants of fewer numbers stay as they are in fp16: they weigh nothing."""


@dataclass(frozen=True)
class WebOptions(Options):
    """Options of the format `web`."""

    base: str | None = option(
        None, "folder of an earlier export with the same backbone and method options, to which the adapter is added"
    )
    name: str | None = option(None, "of the adapter's file; none: that of its folder")
    precision: Literal["fp32", "fp16", "int8"] = option(
        "fp16", "in which the backbone's weights are stored; fp16 computes in fp32"
    )
    opset: int = option(OPSET, "version of ONNX's operators")
    runtime: str | None = option(
        None, "onnxruntime-web as an unpacked npm package or its .tgz; none: downloaded once, then from the cache"
    )
    least_agreement: float | None = option(None, LEAST_AGREEMENT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)

    @property
    def pixels(self) -> str:
        """What goes in: pictures as they are, since the graph resizes as Pillow does and a browser does not."""
        return "any-size"


@register_format("web")
class Web(Format):
    """A folder: a page, onnxruntime-web, the backbone once, and one file per adapter, which the page swaps."""

    Options = WebOptions
    summary = "a page that answers in the browser, from any static server and without internet; swaps adapters"
    packages = OnnxAdapter.packages
    extra = OnnxAdapter.extra
    runtime = OnnxAdapter.runtime

    @classmethod
    def refusal(cls, adapted: Adapted, options: Any) -> str | None:
        try:
            resize_plan(adapted.record.data_config)
        except VisgraftError as error:
            reason = str(error).partition("; leave")[0]  # whose remedy is an option that this format has not
            return f"prepares its images in a way that no page does: {reason}; export it as onnx instead"
        return None

    @classmethod
    def prepares(cls, options: Any) -> bool:
        return True

    @classmethod
    def write(cls, subject: Subject, options: Any, target: Path) -> Mapping[str, Any]:
        check_opset(options.opset)
        # First of all, because it may be lacking, and the graph takes a minute.
        facts = write_runtime(options.runtime, target / RUNTIME, files_for(options.precision))
        tensors = stored_tensors(subject)
        inner = _backbone_options(options)
        about = about_backbone(subject, inner, tensors) | {"format": cls.name, "precision": options.precision}
        name = options.name or file_name(subject.name)
        known: dict[str, Any] = {}
        if options.base is None:
            # onnxruntime-web takes an input that may be left out for none at all.
            proto = backbone_proto(subject, inner, tensors, optional=False)
            save_proto(stored_in_half(proto) if options.precision == "fp16" else proto, target / BACKBONE)
            save_proto(resizing_proto(subject, options.opset), target / RESIZE)
        else:
            _check_base(Path(options.base))
            known = taken_over(Path(options.base), target, about, name, cls.name, (RESIZE, BACKBONE))
        file = target / f"{name}{SUFFIX}"
        save_file({key: np.ascontiguousarray(value.numpy()) for key, value in tensors.items()}, file)
        write_page(target)
        answer = answers_of_folder(target, file)
        known[name] = {
            "file": file.name,
            "bytes": file.stat().st_size,
            **facts_of(subject, options),
            "outputs": subject.adapted.record.outputs,
            "background_rgb": ImageColor.getrgb(subject.adapted.record.background or "white")[:3],
            "check": answer(check_picture()[None]).flatten().tolist(),
        }
        page = {**facts, "backbone_bytes": (target / BACKBONE).stat().st_size}
        write_adapters(target, about, known, page=page)
        return {
            "adapter": name,
            "adapters": list(known),
            "adapter_bytes": file.stat().st_size,
            "backbone_bytes": (target / BACKBONE).stat().st_size,
            "answers_by": "onnxruntime here, not the browser's: the page compares itself with it when it opens",
            **facts,
        }

    @classmethod
    def opened(cls, target: Path, options: Any) -> Callable[[Samples], Tensor]:
        run = answers_of_folder(target, target / list(read_adapters(target)["adapters"].values())[-1]["file"])

        def answer(samples: Samples) -> Tensor:
            feeds = (feed_of(samples, number, options.pixels) for number in range(len(samples)))
            return torch.cat([torch.from_numpy(run(feed)) for feed in feeds])

        return answer

    @classmethod
    def usage(cls, out: Path, options: Any) -> str:
        return f"python -m http.server -d {str(out)!r}, and then http://localhost:8000 in a browser"


def files_for(precision: str) -> tuple[str, ...]:
    """Return which files of onnxruntime-web a page needs: products in int8 have no form on WebGPU."""
    return WASM if precision == "int8" else (*WASM, *WEBGPU)


def _backbone_options(options: WebOptions) -> OnnxAdapterOptions:
    """Return as what the backbone is exported: of pixels that are resized already, since that needs float64."""
    return OnnxAdapterOptions(precision="int8" if options.precision == "int8" else "fp32", opset=options.opset)


def resizing_proto(subject: Subject, opset: int) -> Any:
    """Return the graph from `picture`, uint8 [B, H, W, 3] of any size, to `pixels`, normalised [B, 3, h, w]."""
    return onnx_model(nn.Identity(), subject.adapted.record.data_config, "any-size", opset, INPUTS["float"])


def _check_base(base: Path) -> None:
    """Raise an ExportError where an earlier export has its resizing in the backbone."""
    if (base / ADAPTERS).is_file() and not (base / RESIZE).is_file():
        raise ExportError(
            f"--base {base} has no {RESIZE}: an earlier visgraft wrote it, or a file is missing; export without --base"
        )


def answers_of_folder(folder: Path, adapter: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return what computes logits [B, classes] of pictures uint8 [B, H, W, 3], as the page does: by plain inputs."""
    resize, backbone, tensors = open_session(folder / RESIZE), open_session(folder / BACKBONE), load_file(adapter)

    def run(picture: np.ndarray) -> np.ndarray:
        (pixels,) = resize.run(None, {INPUTS["any-size"]: picture})
        (logits,) = backbone.run(None, {INPUTS["float"]: pixels, **tensors})
        return np.asarray(logits)

    return run


def check_picture() -> np.ndarray:
    """Return the picture by which a page finds out whether its runtime answers as here: uint8 [97, 131, 3]."""
    height, width = CHECK_SIZE
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + y / 19), np.cos(x / 23 - y / 5), np.sin((x + y) / 11)]
    return np.stack([np.rint(127.5 + 127.5 * wave) for wave in waves], axis=2).astype(np.uint8)


def write_page(target: Path) -> None:
    """Write the page and its picture."""
    static = resources.files("visgraft.export").joinpath("web")
    for name in PAGE:
        with resources.as_file(static.joinpath(name)) as source:
            shutil.copyfile(source, target / name)
    Image.fromarray(check_picture()).save(target / CHECK)


def stored_in_half(proto: Any) -> Any:
    """Return the graph with its large constants in float16, each cast back to float32 where it is used.

    The arithmetic stays in float32: browsers' processors have no float16.

    Raises:
        ExportError: there is none that fits.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph, inputs, casts = proto.graph, {value.name for value in proto.graph.input}, []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in inputs:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < LARGE or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    if not casts:
        raise ExportError("--precision fp16 has no effect: the graph has no large constants; use fp32 instead")
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return proto
