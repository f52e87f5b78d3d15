"""`onnx-adapter` with `mixed`: one graph in which every image of a batch brings its adapter as a row of numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from visgraft.bank.configuration import Configuration
from visgraft.bank.ground import FrozenBackbone, HeadKind
from visgraft.bank.layout import Layout
from visgraft.bank.rows import Span
from visgraft.bank.trees import Forward, HeadSpan, MixedTree
from visgraft.core.attached import get_attached
from visgraft.export.adapters_folder import (
    BACKBONE,
    facts_of,
    file_name,
    read_adapters,
    read_base,
    taken_over,
    write_adapters,
)
from visgraft.export.format import ExportError, Subject
from visgraft.export.graph import INPUTS, example_inputs, onnx_program, sizes_of, with_pixels
from visgraft.export.onnx import open_session, save_proto
from visgraft.export.proof import check_finite, compare_logits
from visgraft.export.samples import Samples, answers_of

ROWS, ROW, SUFFIX = "adapters", "row", ".safetensors"
"""The graph's further input; the one tensor in an adapter's file; and how that ends."""

MOST_CLASSES = 16
"""Outputs of the graph where the user names no number and the first adapter has no more."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """How an image takes its adapter from a row [P]: the method's tensors, then a head for the most classes there are.

    Whole numbers, such as the channels that a method chose, are held as float32 too: `whole` has their types by name.
    """

    ground: FrozenBackbone
    configuration: Configuration
    head: HeadKind
    row: Layout
    whole: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, subject: Subject, most: int) -> "Mixing":
        """Return that of an adapter, in a graph of so many outputs.

        Raises:
            ExportError: its method or head has no form in which images with different ones share a batch.
        """
        record, ground = subject.adapted.record, FrozenBackbone(subject.backbone)
        configuration = Configuration(ground, record.method, record.own)
        if configuration.apart:
            raise _refusal(subject, configuration.apart)
        if configuration.inserts:
            raise _refusal(subject, "inserts tokens, for which there is no form with any number of images")
        heads = ground.head_of(subject.adapted.model, record.outputs).modules
        if not heads or any(type(layer) is not nn.Linear for layer in heads.values()):
            raise _refusal(subject, "is on a model whose head is no linear layer")
        layers = {path: nn.Linear(head.in_features, most, device="meta") for path, head in heads.items()}  # type: ignore[arg-type]
        kinds = {f"{path}.{name}": t for path, layer in layers.items() for name, t in layer.state_dict().items()}
        head = HeadKind(dict(layers), Layout(kinds), most)
        tensors = {**configuration.layout.empty(), **head.layout.empty()}
        row = Layout({name: tensor.float() for name, tensor in tensors.items()})
        whole = {name: tensor.dtype for name, tensor in tensors.items() if not tensor.is_floating_point()}
        return cls(ground, configuration, head, row, whole)

    def flattened(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """Return the row [P] of an adapter's tensors: a class that it has not gets the logit -inf."""
        found = dict(tensors)
        for path in self.head.modules:
            weight, bias = tensors[f"{path}.weight"], tensors.get(f"{path}.bias")
            bias = torch.zeros(len(weight)) if bias is None else bias
            lacking = self.head.outputs - len(weight)
            found[f"{path}.weight"] = nn.functional.pad(weight, (0, 0, 0, lacking))
            found[f"{path}.bias"] = nn.functional.pad(bias, (0, lacking), value=-torch.inf)
        (row,) = self.row.flatten(found, torch.device("cpu"))
        return row.numpy()

    def tensors(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the rows [B, P] by name, each [B, ...]."""
        return {name: tensor.to(self.whole.get(name, tensor.dtype)) for name, tensor in self.row.views((rows,)).items()}


class _MixedBackbone(nn.Module):
    """The backbone in which every image has an adapter of its own: images [B, ...] and rows [B, P] to logits."""

    def __init__(self, mixing: Mixing, subject: Subject, pixels: str) -> None:
        super().__init__()
        self.before = with_pixels(nn.Identity(), subject.adapted.record.data_config, pixels)
        self.mixing, self.tree = mixing, MixedTree(mixing.ground, [mixing.configuration])
        self.model = self.tree.model

    def forward(self, pixels: Tensor, adapters: Tensor) -> Tensor:
        x, images, tensors = self.before(pixels), adapters.shape[0], self.mixing.tensors(adapters)
        spans = {self.mixing.configuration: Span(0, images, tensors)}
        heads = [HeadSpan(0, images, self.mixing.head, tensors)]
        return self.tree.run(x, Forward(images, spans, heads))


def write_mixed(subject: Subject, options: Any, target: Path, form: str) -> dict[str, Any]:
    """Fill the folder; returns facts for the certificate.

    Raises:
        ExportError: the adapter has no such form, the graph cannot be made, it does not fit the earlier export, or an
            image beside it in a batch is answered otherwise than by its own adapter.
    """
    most = _most_classes(subject, options, form)
    mixing = Mixing.of(subject, most)
    about = about_mixed(subject, options, mixing)
    name = options.name or file_name(subject.name)
    known: dict[str, Any] = {}
    if options.base is None:
        save_proto(_mixed_proto(subject, options, mixing), target / BACKBONE)
    else:
        known = taken_over(Path(options.base), target, about, name, form)
    file = target / f"{name}{SUFFIX}"
    save_file({ROW: mixing.flattened(stored(subject))}, file)
    known[name] = {"file": file.name, "outputs": subject.adapted.record.outputs, **facts_of(subject, options)}
    write_adapters(target, about, known)
    return {
        "adapter": name,
        "adapters": list(known),
        "adapter_bytes": file.stat().st_size,
        "most_classes": most,
        "beside": _proven_beside(subject, options, target, mixing),
    }


def stored(subject: Subject) -> dict[str, Tensor]:
    """Return the adapter's tensors by name, on the CPU."""
    return {name: t.detach().cpu() for name, t in get_attached(subject.adapted.model).stored().items()}


def _most_classes(subject: Subject, options: Any, form: str) -> int:
    """Return how many outputs the graph has: as asked, as the earlier export has, or else enough for this adapter."""
    outputs = subject.adapted.record.outputs
    most = options.most_classes or max(MOST_CLASSES, outputs)
    if options.base is not None and options.most_classes is None:
        most = read_base(Path(options.base), form)[1].get("most_classes", most)
    if most < outputs:
        if options.base is not None and options.most_classes is None:
            raise ExportError(
                f"--base {options.base} has room for {most} classes, but {subject.name} has {outputs}; export all of "
                f"them without that --base, the first with --most-classes {outputs} or more"
            )
        raise ExportError(f"--most-classes is {most}, but {subject.name} has {outputs} classes; give at least as many")
    return int(most)


def about_mixed(subject: Subject, options: Any, mixing: Mixing) -> dict[str, Any]:
    """Return what two adapters must have in common to share a graph, and where in a row each tensor begins."""
    record, row = subject.adapted.record, mixing.row
    return {
        "mixed": True,
        "name": record.backbone.name,
        "digest": record.digest,
        "method": record.method.to_dict() | {"method": record.method.method},
        "preprocessing": dict(record.data_config),
        "pixels": options.pixels,
        "opset": options.opset,
        "most_classes": mixing.head.outputs,
        "row": {name: {"start": start, "shape": [*row.shapes[name]]} for name, start in row.starts.items()},
    }


def _mixed_proto(subject: Subject, options: Any, mixing: Mixing) -> Any:
    """Return the graph: images and rows in, logits out.

    Raises:
        ExportError: torch cannot write it with any number of images.
    """
    model = _MixedBackbone(mixing, subject, options.pixels).eval()
    images = example_inputs(subject.adapted.record.data_config, options.pixels)
    rows = torch.from_numpy(mixing.flattened(stored(subject))).repeat(len(images), 1)
    sizes = sizes_of(options.pixels)
    free = (sizes, {0: sizes[0]})
    try:
        return onnx_program(model, (images, rows), free, options.opset, [INPUTS[options.pixels], ROWS])
    except ExportError as error:
        way = f"is computed by {mixing.configuration.way}, which torch cannot write for any number of images"
        raise _refusal(subject, way) from error


def _refusal(subject: Subject, reason: str) -> ExportError:
    method = subject.adapted.record.method.method
    return ExportError(
        f"{subject.name} cannot be exported with --mixed: {method} {reason}; leave out --mixed, so that adapters are "
        "swapped between runs"
    )


def disturbed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return another adapter: every number up to a tenth off, zeros up to 0.02, and whole numbers in another order."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            noise = 2 * torch.rand(tensor.shape, generator=generator) - 1
            found[name] = torch.where(tensor == 0, 0.02 * noise, tensor * (1 + 0.1 * noise))
        else:
            found[name] = tensor.flip(0) if tensor.ndim else tensor
    return found


def _in_turns(target: Path, pixels: str, rows: np.ndarray) -> Callable[[Samples], Tensor]:
    """Return what computes the logits [N, 2, most] of samples by two adapters [2, P], which take turns in a batch."""
    session = open_session(target / BACKBONE)

    def run(feed: np.ndarray) -> np.ndarray:
        given = {INPUTS[pixels]: feed.repeat(2, 0), ROWS: np.tile(rows, (len(feed), 1))}
        return np.asarray(session.run(None, given)[0]).reshape(len(feed), 2, -1)

    return lambda samples: answers_of(run, samples, pixels)


def _rows(subject: Subject, target: Path, mixing: Mixing) -> np.ndarray:
    """Return the row in the file that was written last, and a disturbed one: [2, P]."""
    file = list(read_adapters(target)["adapters"].values())[-1]["file"]
    return np.stack([load_file(target / file)[ROW], mixing.flattened(disturbed(stored(subject)))])


def mixed_answers(subject: Subject, target: Path, options: Any) -> Callable[[Samples], Tensor]:
    """Return what computes the logits [N, classes] of samples, each beside itself with a disturbed adapter."""
    most = read_adapters(target)["backbone"]["most_classes"]
    both = _in_turns(target, options.pixels, _rows(subject, target, Mixing.of(subject, most)))
    outputs = subject.adapted.record.outputs
    return lambda samples: both(samples)[:, 0, :outputs]


def _proven_beside(subject: Subject, options: Any, target: Path, mixing: Mixing) -> str:
    """Hold the answers of the disturbed adapter, which takes turns with the other, against torch; say what was found.

    Raises:
        ExportError: they differ by more than the rounding of float32, or a class that there is not has a logit.
    """
    model, samples, outputs = subject.adapted.model, subject.samples, subject.adapted.record.outputs
    own = {name: tensor.to(next(model.parameters()).device) for name, tensor in disturbed(stored(subject)).items()}
    with torch.inference_mode():
        chunks = [
            torch.func.functional_call(model, own, (samples.normalised(chunk).to(next(model.parameters()).device),))
            for chunk in samples.batches()
        ]
    expected = torch.cat(chunks).float().cpu()
    both = _in_turns(target, options.pixels, _rows(subject, target, mixing))(samples)
    found = both[:, 1, :outputs]
    check_finite(expected, found)
    difference, allowed = compare_logits(expected, found)
    if not difference <= allowed or not bool((both[:, :, outputs:] == -torch.inf).all()):
        raise ExportError(
            f"beside {subject.name}, another adapter in the batch answers otherwise than alone: a logit differs by "
            f"{difference:.2g}, above {allowed:.2g}; nothing was written: leave out --mixed"
        )
    return f"another adapter in turn with it differs by {difference:.1e} at most ({allowed:.1e} allowed)"
