"""The layouts of published weights files: names and shapes, from their authors' architectures, and how they are saved.

Each `*_shapes` lists what the file of a model of a given size holds, so that full-size files can be made without data;
each `to_*` gives a live timm model's tensors that layout, so that the numbers can be compared.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *weight: int) -> Shapes:
    """The weight and the bias of one layer, whose outputs are the weight's first axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def jax_vit_shapes(width: int, depth: int, heads: int, patch: int, grid: int) -> Shapes:
    """A ViT pretrained on ImageNet-21k in Google's layout: with the `pre_logits` layer and a head of 21,843 classes."""
    hidden, per_head = 4 * width, width // heads
    shapes: Shapes = {
        "cls": (1, 1, width), "embedding/kernel": (patch, patch, 3, width), "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, grid**2 + 1, width),
        "Transformer/encoder_norm/scale": (width,), "Transformer/encoder_norm/bias": (width,),
        "pre_logits/kernel": (width, width), "pre_logits/bias": (width,),
        "head/kernel": (width, 21843), "head/bias": (21843,),
    }  # fmt: skip
    for block in (f"Transformer/encoderblock_{i}" for i in range(depth)):
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (width, heads, per_head)
            shapes[f"{attention}/{part}/bias"] = (heads, per_head)
        shapes |= {f"{attention}/out/kernel": (heads, per_head, width), f"{attention}/out/bias": (width,)}
        mlp = f"{block}/MlpBlock_3"
        shapes |= {f"{mlp}/Dense_0/kernel": (width, hidden), f"{mlp}/Dense_0/bias": (hidden,)}
        shapes |= {f"{mlp}/Dense_1/kernel": (hidden, width), f"{mlp}/Dense_1/bias": (width,)}
    return shapes


def vit_shapes(width: int, depth: int, patch: int, grid: int, classes: int = 0) -> Shapes:
    """A ViT as MAE (without a head) and MoCo v3 (with one) save it."""
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, grid**2 + 1, width)}
    shapes |= affine("patch_embed.proj", width, 3, patch, patch) | affine("norm", width)
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= affine(f"{block}.norm1", width) | affine(f"{block}.norm2", width)
        shapes |= affine(f"{block}.attn.qkv", 3 * width, width) | affine(f"{block}.attn.proj", width, width)
        shapes |= affine(f"{block}.mlp.fc1", 4 * width, width) | affine(f"{block}.mlp.fc2", width, 4 * width)
    return shapes | (affine("head", classes, width) if classes else {})


def swin_shapes(
    width: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, grid: int, classes: int = 21841
) -> Shapes:
    """Microsoft's Swin: each stage but the last ends in a downsampling; indices and masks are saved as buffers."""
    shapes = affine("patch_embed.proj", width, 3, 4, 4) | affine("patch_embed.norm", width)
    for i, depth in enumerate(depths):
        c, side = width * 2**i, grid // 2**i
        for j, block in enumerate(f"layers.{i}.blocks.{j}" for j in range(depth)):
            shapes |= affine(f"{block}.norm1", c) | affine(f"{block}.norm2", c)
            shapes |= affine(f"{block}.attn.qkv", 3 * c, c) | affine(f"{block}.attn.proj", c, c)
            shapes |= affine(f"{block}.mlp.fc1", 4 * c, c) | affine(f"{block}.mlp.fc2", c, 4 * c)
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[i])
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            if j % 2 and side > window:  # shifted windows
                shapes[f"{block}.attn_mask"] = ((side // window) ** 2, window**2, window**2)
        if i + 1 < len(depths):
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * c, 4 * c)
            shapes |= affine(f"layers.{i}.downsample.norm", 4 * c)
    last = width * 2 ** (len(depths) - 1)
    return shapes | affine("norm", last) | affine("head", classes, last)


def as_mlp_shapes(width: int, depths: tuple[int, ...], classes: int = 1000) -> Shapes:
    """AS-MLP as its authors save it: 1×1 convolutions throughout, and a downsampling at the end of each stage."""
    shapes = affine("patch_embed.proj", width, 3, 4, 4) | affine("patch_embed.norm", width)
    for i, depth in enumerate(depths):
        c = width * 2**i
        for block in (f"layers.{i}.blocks.{j}" for j in range(depth)):
            for norm in ("norm1", "norm2", "axial_shift.norm1", "axial_shift.norm2"):
                shapes |= affine(f"{block}.{norm}", c)
            for convolution in ("conv1", "conv2_1", "conv2_2", "conv3"):
                shapes |= affine(f"{block}.axial_shift.{convolution}", c, c, 1, 1)
            shapes |= affine(f"{block}.mlp.fc1", 4 * c, c, 1, 1) | affine(f"{block}.mlp.fc2", c, 4 * c, 1, 1)
        if i + 1 < len(depths):
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * c, 4 * c, 1, 1)
            shapes |= affine(f"layers.{i}.downsample.norm", 4 * c)
    last = width * 2 ** (len(depths) - 1)
    return shapes | affine("norm", last) | affine("head", classes, last)


def convnext_shapes(widths: tuple[int, ...], depths: tuple[int, ...], classes: int = 21841) -> Shapes:
    """Facebook's ConvNeXt: the stem is the first of four downsampling layers; in the others the norm comes first."""
    shapes = affine("downsample_layers.0.0", widths[0], 3, 4, 4) | affine("downsample_layers.0.1", widths[0])
    for i, c in enumerate(widths):
        if i:
            shapes |= affine(f"downsample_layers.{i}.0", widths[i - 1])
            shapes |= affine(f"downsample_layers.{i}.1", c, widths[i - 1], 2, 2)
        for block in (f"stages.{i}.{j}" for j in range(depths[i])):
            shapes |= {f"{block}.gamma": (c,)} | affine(f"{block}.dwconv", c, 1, 7, 7) | affine(f"{block}.norm", c)
            shapes |= affine(f"{block}.pwconv1", 4 * c, c) | affine(f"{block}.pwconv2", c, 4 * c)
    return shapes | affine("norm", widths[-1]) | affine("head", classes, widths[-1])


def mixer_shapes(width: int, depth: int, patch: int, tokens: int, classes: int = 21843) -> Shapes:
    """MLP-Mixer as timm saves it; its token MLP is half as wide as the stream, its channel MLP four times."""
    shapes = affine("stem.proj", width, 3, patch, patch) | affine("norm", width) | affine("head", classes, width)
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= affine(f"{block}.norm1", width) | affine(f"{block}.norm2", width)
        shapes |= affine(f"{block}.mlp_tokens.fc1", width // 2, tokens)
        shapes |= affine(f"{block}.mlp_tokens.fc2", tokens, width // 2)
        shapes |= affine(f"{block}.mlp_channels.fc1", 4 * width, width)
        shapes |= affine(f"{block}.mlp_channels.fc2", width, 4 * width)
    return shapes


def to_jax(state: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    """The tensors of a plain ViT as Google's JAX code names and shapes them."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    width = arrays["cls_token"].shape[-1]
    out: dict[str, Any] = {
        "cls": arrays["cls_token"],
        "embedding/kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": arrays["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": arrays["pos_embed"],
        "Transformer/encoder_norm/scale": arrays["norm.weight"],
        "Transformer/encoder_norm/bias": arrays["norm.bias"],
    }
    if "head.weight" in arrays:
        out |= {"head/kernel": arrays["head.weight"].T, "head/bias": arrays["head.bias"]}
    for i in range(len([name for name in arrays if name.endswith("attn.qkv.weight")])):
        own, jax = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{jax}/MultiHeadDotProductAttention_1"
        qkv = (arrays[f"{own}.attn.qkv.weight"], arrays[f"{own}.attn.qkv.bias"])
        for part, weight, bias in zip(("query", "key", "value"), *(np.split(array, 3) for array in qkv), strict=True):
            out[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        out[f"{attention}/out/kernel"] = arrays[f"{own}.attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}/out/bias"] = arrays[f"{own}.attn.proj.bias"]
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{jax}/{theirs}/scale"] = arrays[f"{own}.{ours}.weight"]
            out[f"{jax}/{theirs}/bias"] = arrays[f"{own}.{ours}.bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{jax}/MlpBlock_3/{theirs}/kernel"] = arrays[f"{own}.mlp.{ours}.weight"].T
            out[f"{jax}/MlpBlock_3/{theirs}/bias"] = arrays[f"{own}.mlp.{ours}.bias"]
    return out


def to_swin(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of timm's Swin as Microsoft names them, with buffers of another content than the model's own."""
    out = {}
    for name, shape in shapes.items():
        stage, rest = (int(name.split(".")[1]), name.split(".", 2)[2]) if name.startswith("layers.") else (0, "")
        if rest.startswith("downsample"):
            out[name] = state[f"layers.{stage + 1}.{rest}"]
        elif name.endswith(("relative_position_index", "attn_mask")):
            out[name] = torch.full(shape, 7)
        else:
            out[name] = state[name.replace("head.", "head.fc.")]
    return out


def to_convnext(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of timm's ConvNeXt as Facebook names them."""
    swaps = (("dwconv", "conv_dw"), ("pwconv", "mlp.fc"), ("head.", "head.fc."))
    out = {}
    for name in shapes:
        own = name if not name.startswith("norm.") else f"head.{name}"
        part = own.split(".")
        if part[0] == "downsample_layers":
            own = ".".join(["stem", *part[2:]] if part[1] == "0" else ["stages", part[1], "downsample", *part[2:]])
        elif part[0] == "stages":
            own = ".".join([*part[:2], "blocks", *part[2:]])
        for theirs, ours in swaps:
            own = own if own.startswith("head.norm") else own.replace(theirs, ours)
        out[name] = state[own]
    return out


def blank(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes of which torch saves a single number."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def save(state: Mapping[str, Any], path: Path) -> Path:
    """Write tensors the way in which the published file of that name holds them."""
    name = path.name
    if name.endswith(".npz"):
        np.savez(path, **{key: np.asarray(array) for key, array in state.items()})
    elif name.startswith("linear-vit"):  # MoCo v3's linear probe, trained on several GPUs
        momentum = {0: {"momentum_buffer": torch.zeros(3)}, 1: {"momentum_buffer": None}}
        groups = [{"lr": 12.0, "momentum": 0.9, "nesterov": False, "params": [0, 1]}]
        content = {
            "epoch": 90, "arch": "vit_base", "best_acc1": torch.tensor(76.7),
            "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
            "optimizer": {"state": momentum, "param_groups": groups},
        }  # fmt: skip
        torch.save(content, path)
    elif name.startswith("jx_"):
        torch.save(dict(state), path)
    else:
        torch.save({"model": dict(state), "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.95))}, path)
    return path
