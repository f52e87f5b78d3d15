"""Tiny backbones with live random weights, and the options of every registered method that the laws are tried with."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visgraft import MethodConfig, methods
from visgraft.attach import attach

CLASSES = 5
TINY: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": CLASSES
}  # fmt: skip

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

# Further options to try of the methods that ship; the defaults of every registered method are always among the laws'.
EXTRAS: dict[str, list[dict[str, Any]]] = {
    "sct": [
        {"mode": "mlp", "scale": 0.5},
        {"form": "B", "scale": 0.7},
        {"mode": "mlp", "form": "B", "scale": 1.2},
        {"mode": "qkv"},
    ],
    "alore": [{"bank": "per_place", "places": ["attn.in", "attn.out", "mlp.in", "mlp.out"]}, {"rank": 1, "experts": 2}],
    "lora": [{"targets": ["q", "k", "v", "proj", "fc2"], "rank": 2, "scale": 2.0, "dropout": 0.1}],
}
CONFIGS: dict[str, MethodConfig] = {
    f"{name}-{i}": kind.Config.from_dict(values)
    for name, kind in methods().items()
    for i, values in enumerate([{}, *EXTRAS.get(name, [])])
}


def vit(variant: str = "plain", seed: int = 0, **changes: Any) -> VisionTransformer:
    """A tiny ViT in eval mode whose logits depend on every layer."""
    torch.manual_seed(seed)
    return live(VisionTransformer(**{**TINY, **VARIANTS[variant], **changes}), seed).eval()


def live(model: Any, seed: int = 0) -> Any:
    """Redraw all parameters: as created, zero heads and a LayerScale of 1e-5 hide whatever happens inside."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1 and "token" not in name and "pos" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                one_like = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma"))
                parameter.copy_(float(one_like) + 0.3 * noise)
    return model


def enliven(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move what an attached method trains off its start, so that it changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def images(count: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batches(count: int = 12, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    """A task: images with labels, in two batches."""
    x, y = images(count, seed), torch.arange(count) % CLASSES
    return [(x[: count // 2], y[: count // 2]), (x[count // 2 :], y[count // 2 :])]


def fitted(config: MethodConfig, variant: str = "plain", alive: bool = True, **changes: Any) -> Any:
    """A tiny ViT with a method attached, moved off its start unless `alive` is False."""
    model = attach(vit(variant, **changes), config, batches())
    return enliven(model).eval() if alive else model


def logits(model: Callable[[Tensor], Tensor], x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(images() if x is None else x)
