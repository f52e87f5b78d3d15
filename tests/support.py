"""Tiny backbones of every family with live random weights, and the options of every method that the laws try."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import SwiGLU
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visgraft import MethodConfig, list_methods
from visgraft.core.attach import attach

CLASSES = 5
TINY: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": CLASSES
}  # fmt: skip

# Kinds of timm's ViT block.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"init_values": 1e-5},
    "qk_norm": {"qk_norm": True},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "no_qkv_bias": {"qkv_bias": False},
    "drop_path": {"drop_path_rate": 0.2},
    "swiglu": {"mlp_layer": SwiGLU, "init_values": 1e-5},
}

_FLAT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_STAGES: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "window_size": 4}
_MLP: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
_CONV: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}
# Every row of the family table: a timm model that has it, made small.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "deit3": ("deit3_small_patch16_224", _FLAT),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", _FLAT),
    "dinov2": ("vit_small_patch14_dinov2", _FLAT),
    "clip": ("vit_base_patch32_clip_224", _FLAT),
    "siglip": ("vit_base_patch16_siglip_224", _FLAT),
    "dinov3": ("vit_small_patch16_dinov3", _FLAT),
    "beit": ("beit_base_patch16_224", {**_FLAT, "init_values": 0.1}),
    "eva_fused": ("eva02_tiny_patch14_224", {**_FLAT, "embed_dim": 48, "ref_feat_shape": (4, 4)}),
    "eva_unfused": ("eva02_base_patch14_224", {**_FLAT, "embed_dim": 48, "ref_feat_shape": (4, 4)}),
    "pe": ("vit_pe_core_small_patch16_384", {**_FLAT, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {**_STAGES, "img_size": 64, "window_size": 2}),
    "swin_padded": ("swin_tiny_patch4_window7_224", {**_STAGES, "img_size": 48}),
    "swin_v2": ("swinv2_tiny_window8_256", {**_STAGES, "img_size": 64}),
    "convnext": ("convnext_tiny", _CONV),
    "convnext_conv": ("convnext_tiny", {**_CONV, "conv_mlp": True}),
    "convnext_v2": ("convnextv2_tiny", _CONV),
    "mixer": (MlpMixer, _MLP),
    "as_mlp": ("as_mlp_tiny_patch4_shift5_224", {"depths": (1, 1, 2, 1), "embed_dim": 16}),
    "resmlp": (MlpMixer, {**_MLP, "block_layer": ResBlock, "mlp_ratio": 4, "norm_layer": Affine}),
}
CONVOLUTIONAL_SIZE = 32  # of images for families that take any

# Further options to try of the methods that ship; the defaults of every registered method are always among the laws'.
EXTRAS: dict[str, list[dict[str, Any]]] = {
    "sct": [
        {"mode": "mlp", "scale": 0.5},
        {"form": "B", "scale": 0.7},
        {"mode": "mlp", "form": "B", "scale": 1.2},
        {"mode": "qkv", "also_train": "biases+norms"},
    ],
    "alore": [
        {"bank": "per_place", "places": ["attn.in", "attn.out", "mlp.in", "mlp.out"]},
        {"rank": 1, "experts": 2, "also_train": "biases"},
        {"share": "experts", "tasks": [2, 3]},
    ],
    "lora": [{"targets": ["q", "k", "v", "proj", "fc2"], "rank": 2, "scale": 2.0, "dropout": 0.1}],
    "dora": [{"targets": ["q", "k", "v", "proj", "fc2"], "rank": 2, "scale": 2.0}],
    "adapter": [{"activation": "none", "init_std": 0.05, "norms": True}],
    "adaptformer": [{"form": "sequential"}, {"norm": "after", "learn_scale": True}],
    "repadapter": [{"bias": True}],
    "fact": [{"form": "tucker", "rank": 4}, {"targets": ["qkv", "proj"], "proj_reads": "input", "scale": 1.0}],
    "arc": [{"bias": False}],
    "ssf": [{"terms": "scale", "init": "normal"}],
}
CONFIGS: dict[str, MethodConfig] = {
    f"{name}-{i}": kind.Config.from_dict(values)
    for name, kind in list_methods().items()
    for i, values in enumerate([{}, *EXTRAS.get(name, [])])
}
DEFAULTS = [name for name in CONFIGS if name.endswith("-0")]
ALL_FAMILIES = [*VARIANTS, *FAMILIES]
WITH_EXTRAS = ("plain", "no_qkv_bias", "swin", "convnext_conv")  # families on which further options are tried
PAIRS = [(name, family) for name in CONFIGS for family in ALL_FAMILIES if name in DEFAULTS or family in WITH_EXTRAS]

# Two blocks, or stages, for laws that trace: every further one takes as long again and says the same.
_TWO_STAGES: dict[str, Any] = {"depths": (1, 2), "num_heads": (2, 2)}
SHALLOW: dict[str, dict[str, Any]] = {
    **{kind: {"depth": 2} for kind in VARIANTS},
    **{kind: _TWO_STAGES for kind in ("swin", "swin_padded", "swin_v2")},
}


def vit(variant: str = "plain", seed: int = 0, **changes: Any) -> VisionTransformer:
    """A tiny ViT in eval mode whose logits depend on every layer."""
    torch.manual_seed(seed)
    return live(VisionTransformer(**{**TINY, **VARIANTS[variant], **changes}), seed).eval()


def family(name: str, **changes: Any) -> Any:
    """A tiny backbone of a family, or of a variant of the ViT."""
    if changes:
        return _family(name, **changes)
    return copy.deepcopy(_cached_family(name))


def _family(name: str, **changes: Any) -> Any:
    if name in VARIANTS:
        return vit(name, **changes)
    torch.manual_seed(0)
    model, arguments = FAMILIES[name]
    create = functools.partial(timm.create_model, model) if isinstance(model, str) else model
    return live(create(**{"num_classes": CLASSES, **arguments, **changes})).eval()


_cached_family = functools.cache(_family)


def size_of(name: str) -> int:
    """The image size of a tiny backbone."""
    if name in VARIANTS:
        return int(TINY["img_size"])
    return int(FAMILIES[name][1].get("img_size", CONVOLUTIONAL_SIZE))


def live(model: Any, seed: int = 0) -> Any:
    """Redraw all parameters: as created, zero heads and a LayerScale of 1e-5 hide whatever happens inside."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            last = name.rpartition(".")[2]
            if last in ("weight", "table") and parameter.ndim > 1 and "token" not in name and "pos" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif last == "logit_scale":
                continue
            else:
                one_like = last in ("weight", "alpha") or last.startswith("gamma")
                parameter.copy_(float(one_like) + 0.3 * noise)
    return model


def enliven(model: nn.Module, seed: int = 1, strength: float = 0.1) -> nn.Module:
    """Move what an attached method trains off its start, so that it changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(strength * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def images(count: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batches(count: int = 12, seed: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """A task: images with labels, in two batches."""
    x, y = images(count, seed, size=size), torch.arange(count) % CLASSES
    return [(x[: count // 2], y[: count // 2]), (x[count // 2 :], y[count // 2 :])]


def fitted(config: MethodConfig, variant: str = "plain", alive: bool = True, **changes: Any) -> Any:
    """A tiny backbone with a method attached, moved off its start unless `alive` is False."""
    torch.manual_seed(1)
    model = attach(family(variant, **changes), config, batches(size=size_of(variant)))
    return enliven(model).eval() if alive else model


def shallow(name: str, kind: str) -> Any:
    """As `fitted` with the options of a name in CONFIGS, on two blocks, for what traces."""
    return fitted(CONFIGS[name], kind, **SHALLOW.get(kind, {}))


def logits(model: Callable[[Tensor], Tensor], x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(images() if x is None else x)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """What every trained parameter receives, and the logits."""
    model.zero_grad(set_to_none=True)
    answer = run(x)
    answer.square().sum().backward()
    return {"logits": answer.detach(), **{key: p.grad for key, p in model.named_parameters() if p.requires_grad}}


FIXED_TOKENS = (
    "beit", "swin", "swin_padded", "swin_v2", "convnext", "convnext_conv", "convnext_v2", "mixer", "resmlp", "as_mlp"
)  # fmt: skip
REFUSALS: dict[tuple[str, str], str] = {
    **{(name, kind): "needs the site tokens.in" for name in ("vpt_shallow-0", "vpt_deep-0") for kind in FIXED_TOKENS},
    **{(name, "convnext_conv"): "needs the site attn" for name in ("sct-4", "alore-1", "lora-1", "dora-1")},
    ("fact-2", "convnext_conv"): "needs the site attn",
    ("fact-0", "eva_fused"): "cannot cut into squares",
}


def refused(name: str, kind: str) -> str:
    """What the message says where a method with these options cannot be attached to a family; else nothing."""
    return REFUSALS.get((name, kind), "")
