"""AS-MLP, an axial shifted MLP, as models of timm's registry.

Source: Lian et al., "AS-MLP: An Axial Shifted MLP Architecture for Vision", arXiv:2107.08391. Tensors have the names
and shapes of the authors' files (svip-lab/AS-MLP), so that those load. Features are [B, C, H, W] throughout; every norm
is over all channels and places of an image (a group norm of one group), so images of any size go in.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, PatchEmbed, SelectAdaptivePool2d, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models import named_apply as apply_by_name
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AsMlp"]


make_norm = partial(nn.GroupNorm, 1)
"""A norm over all channels and places of an image [B, C, H, W], with a factor and a shift per channel."""


def shift_groups(x: Tensor, groups: int, dim: int) -> Tensor:
    """Move each of `groups` equal parts of the channels of [B, C, H, W] by its own number of places along `dim`.

    Part i moves by i - groups // 2 places, and zeros enter at the border (section 3.2; the paper's zero padding). Of C
    channels that `groups` does not divide, the last part has fewer.
    """
    most, length = groups // 2, x.shape[dim]
    padded = F.pad(x, (most, most) if dim == 3 else (0, 0, most, most))
    parts = padded.chunk(groups, 1)
    return torch.cat([part.narrow(dim, 2 * most - i, length) for i, part in enumerate(parts)], 1)


class AxialShift(nn.Module):
    """The axial shift of figure 2: a channel projection, shifts along both axes, one for each, their sum, and another.

    Args:
        dim: channels C.
        shift_size: groups of channels, moved by -(shift_size // 2) to shift_size // 2 places.
    """

    def __init__(self, dim: int, shift_size: int) -> None:
        super().__init__()
        self.shift_size = shift_size
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv2_1 = nn.Conv2d(dim, dim, 1)
        self.conv2_2 = nn.Conv2d(dim, dim, 1)
        self.conv3 = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.norm1 = make_norm(dim)
        self.norm2 = make_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.act(self.norm1(self.conv1(x)))
        across = self.act(self.conv2_1(shift_groups(x, self.shift_size, 3)))
        down = self.act(self.conv2_2(shift_groups(x, self.shift_size, 2)))
        projected: Tensor = self.conv3(self.norm2(across + down))
        return projected


class AxialShiftedBlock(nn.Module):
    """The block of figure 2: axial shift and channel MLP, each behind a norm and beside a residual connection."""

    def __init__(self, dim: int, shift_size: int, mlp_ratio: float, proj_drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = make_norm(dim)
        self.axial_shift = AxialShift(dim, shift_size)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = make_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, use_conv=True)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x + self.drop_path1(self.axial_shift(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class PatchMerging(nn.Module):
    """Four neighbouring places become one of twice the channels; an odd side is padded with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.norm = make_norm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2 C, ceil(H / 2), ceil(W / 2)]."""
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, 1)))
        return merged


class Stage(nn.Module):
    """Blocks of one resolution, and, but for the last stage, the merging that follows them."""

    def __init__(self, blocks: Sequence[AxialShiftedBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W], or [B, 2 C, H / 2, W / 2]."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class AsMlp(nn.Module):
    """AS-MLP (arXiv:2107.08391).

    Args:
        patch_size: pixels of a patch's side.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0: none.
        global_pool: how the places become one: avg, max, avgmax or catavgmax, in timm's words.
        embed_dim: channels of the first stage; each further one has twice as many.
        depths: blocks of each stage.
        shift_size: groups of channels in a shift.
        mlp_ratio: hidden channels of the channel MLP for each of its inputs.
        drop_rate: dropout in front of the head.
        proj_drop_rate: dropout in the channel MLPs.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        shift_size: int = 5,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, make_norm, flatten=False, strict_img_size=False, dynamic_img_pad=True
        )
        stages, self.feature_info = [], list[dict[str, Any]]()
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            dim, last = embed_dim * 2**i, i == len(depths) - 1
            blocks = [AxialShiftedBlock(dim, shift_size, mlp_ratio, proj_drop_rate, rate) for rate in rates]
            stages.append(Stage(blocks, None if last else PatchMerging(dim)))
            facts = {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"layers.{i}.blocks"}
            self.feature_info.append(facts)
        self.layers = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.norm = make_norm(self.num_features)
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes)
        apply_by_name(_initialise, self)

    def _make_head(self, num_classes: int) -> nn.Module:
        width = self.num_features * self.global_pool.feat_mult()
        return nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name the tensors of each layer, for learning rates that differ between layers."""
        behind = (r"^norm", (99999,))
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), behind]}
        merging = (r"^layers\.(\d+)\.downsample", (99998,))
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)\.\w+\.(\d+)", None), merging, behind]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block anew in the backward pass, instead of keeping what it computed."""
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put another head in the place of this one, and perhaps another pooling."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.head = self._make_head(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> normalised features [B, C, H / 32, W / 32]."""
        features: Tensor = self.norm(self.layers(self.patch_embed(x)))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C, H, W] -> logits [B, classes], or what enters the head [B, C]."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        return self.forward_head(self.forward_features(x))


def _initialise(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _create(variant: str, pretrained: bool, **arguments: Any) -> AsMlp:
    features = {"out_indices": (0, 1, 2, 3), "feature_cls": "hook"}
    model: AsMlp = build_model_with_cfg(AsMlp, variant, pretrained, feature_cfg=features, **arguments)
    return model


default_cfgs = generate_default_cfgs(
    {
        f"as_mlp_{size}_patch4_shift5_224.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
            "paper_ids": "arXiv:2107.08391",
        }
        for size in ("tiny", "small", "base")
    }
)


@register_model
def as_mlp_tiny_patch4_shift5_224(pretrained: bool = False, **arguments: Any) -> AsMlp:
    """AS-MLP-T of table 1: 28 million parameters."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 6, 2)}
    return _create("as_mlp_tiny_patch4_shift5_224", pretrained, **{**sizes, **arguments})


@register_model
def as_mlp_small_patch4_shift5_224(pretrained: bool = False, **arguments: Any) -> AsMlp:
    """AS-MLP-S of table 1: 50 million parameters."""
    sizes = {"embed_dim": 96, "depths": (2, 2, 18, 2)}
    return _create("as_mlp_small_patch4_shift5_224", pretrained, **{**sizes, **arguments})


@register_model
def as_mlp_base_patch4_shift5_224(pretrained: bool = False, **arguments: Any) -> AsMlp:
    """AS-MLP-B of table 1: 88 million parameters."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2)}
    return _create("as_mlp_base_patch4_shift5_224", pretrained, **{**sizes, **arguments})
