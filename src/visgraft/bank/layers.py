"""Layers of the backbone whose vectors (biases, norms) differ from image to image."""

from collections.abc import Callable, Mapping
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft.bank.layout import slots_of, substituted

Own = Mapping[str, Tensor]
"""Tensors of a layer by their name in it, each with a first axis of the images."""


def layer_by_images(layer: Any, own: Own, x: Tensor) -> Tensor:
    """Return the layer's output for x [images · windows, ...], each image with tensors of its own."""
    return LAYERS.get(type(layer), _mapped)(layer, own, x)


def _linear(layer: Any, own: Own, x: Tensor) -> Tensor:
    if own.keys() != {"bias"} or x.ndim < 3:
        return _mapped(layer, own, x)
    out = F.linear(x, layer.weight)
    bias = own["bias"].to(out.dtype)  # a sum of two precisions takes many times as long on a CPU
    out.view(bias.shape[0], -1, out.shape[-1]).add_(bias.unsqueeze(1))  # in place: it is nobody else's
    return out


def _conv(layer: Any, own: Own, x: Tensor) -> Tensor:
    if own.keys() != {"bias"}:
        return _mapped(layer, own, x)
    out = layer._conv_forward(x, layer.weight, None)
    bias = own["bias"].to(out.dtype)
    return out.add_(bias.repeat_interleave(x.shape[0] // bias.shape[0], 0)[..., None, None])


def _layer_norm(layer: Any, own: Own, x: Tensor) -> Tensor:
    weight, bias = own.get("weight", layer.weight), own.get("bias", layer.bias)
    if x.ndim < 3 or weight is None or bias is None or len(layer.normalized_shape) > 1:
        return _mapped(layer, own, x)
    images = next(iter(own.values())).shape[0]
    factor = layer.weight if "weight" not in own else torch.ones_like(layer.weight)
    # With a factor and a shift, even of ones and zeros, as torch takes twice as long on a CPU where one is missing.
    out = F.layer_norm(x, layer.normalized_shape, factor, torch.zeros_like(factor), layer.eps)
    weight, bias = (t.unsqueeze(1) if t.ndim == 2 else t for t in (weight, bias))
    return _rescaled(out, out.view(images, -1, x.shape[-1]), weight if "weight" in own else None, bias)


def _rescaled(out: Tensor, view: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
    """Rewrite `out` in place through a view, as it is nobody else's."""
    if weight is None:
        view.add_(bias)
    else:
        torch.addcmul(bias, view, weight, out=view)
    return out


def _group_norm(layer: Any, own: Own, x: Tensor) -> Tensor:
    weight, bias = own.get("weight", layer.weight), own.get("bias", layer.bias)
    if weight is None or bias is None:
        return _mapped(layer, own, x)
    images = next(iter(own.values())).shape[0]
    factor = layer.weight if "weight" not in own else torch.ones_like(layer.weight)
    out = F.group_norm(x, layer.num_groups, factor, torch.zeros_like(factor), layer.eps)
    weight, bias = (t.view(-1, 1, x.shape[1], *[1] * (x.ndim - 2)) for t in (weight, bias))
    return _rescaled(out, out.unflatten(0, (images, -1)), weight if "weight" in own else None, bias)


def _layer_norm_2d(layer: Any, own: Own, x: Tensor) -> Tensor:
    return _layer_norm(layer, own, x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def _mapped(layer: Any, own: Own, x: Tensor) -> Tensor:
    """The layer's own forward, mapped over the images."""
    slots = slots_of(layer)

    def one(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        with substituted(slots, tensors):
            found: Tensor = type(layer).forward(layer, x)
            return found

    images = next(iter(own.values())).shape[0]
    return torch.vmap(one)(dict(own), x.unflatten(0, (images, -1))).flatten(0, 1)


LAYERS: dict[type[nn.Module], Callable[[Any, Own, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    timm.layers.LayerNorm: _layer_norm,
    timm.layers.LayerNorm2d: _layer_norm_2d,
}
