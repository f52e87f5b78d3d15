"""The family table: where the sites of each kind of block are, keyed by the block's class.

A general rule such as "hook whatever is called norm1" sits in the wrong place in post-norm blocks and looks fine, so
a block class without a row is refused by name. A row is proven by a dry run whenever something is attached.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from timm.layers import Attention as ViTAttention
from timm.layers import (
    AttentionRope,
    Format,
    GlobalResponseNormMlp,
    GluMlp,
    LayerNorm2d,
    Mlp,
    PatchEmbed,
    RmsNorm,
    RmsNorm2d,
    SimpleNorm,
    SimpleNorm2d,
    SwiGLU,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.convnext import ConvNeXtBlock
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.mlp_mixer import Affine, MixerBlock, ResBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block as ViTBlock
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from visgraft.backbones.as_mlp import AxialShiftedBlock
from visgraft.core.method import Grid
from visgraft.core.sites import Bias, Neighbour, Site
from visgraft.errors import SiteError

SitesOf = Callable[[Any, str, int, Grid], list[Site]]
"""row(block, its path, its number, how the model's tokens lie) -> the sites of one block."""

CHANNELS_FIRST_NORMS = (LayerNorm2d, RmsNorm2d, SimpleNorm2d)
NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase, RmsNorm, SimpleNorm, Affine, GlobalResponseNorm,
    *CHANNELS_FIRST_NORMS,
)  # fmt: skip
FINAL_NORMS = ("norm", "fc_norm", "head.norm", "norm_pre")
"""Where timm keeps the last norm, the likeliest first; those that a model does not use are no norms in it."""


def norm_parameters(norm: nn.Module) -> tuple[str, str]:
    """Return the names of a norm's factor and of its shift."""
    return ("alpha", "beta") if isinstance(norm, Affine) else ("weight", "bias")


def _norm_site(name: str, norm: nn.Module, path: str, block: int | None, grid: Grid | None) -> list[Site]:
    """The output of a norm that has a factor per channel; none where it has not."""
    factor = getattr(norm, norm_parameters(norm)[0], None) if isinstance(norm, NORMS) else None
    if factor is None:
        return []
    first = isinstance(norm, (*CHANNELS_FIRST_NORMS, nn.GroupNorm))
    by = Neighbour(path)
    return [Site(name, block, factor.numel(), path, "output", produced_by=by, grid=grid, channels_first=first)]


def _enters(path: str, block: int, width: int, grid: Grid, reads: tuple[Neighbour, ...]) -> list[Site]:
    """What enters attention, where that is also what its projections read."""
    return [Site(name, block, width, path, "input", feeds=reads, grid=grid) for name in ("attn.in", "qkv.in")]


def _qkv_sites(
    attn: Any, path: str, block: int, grid: Grid, inner: int, biases: tuple[Bias, ...] | None = None,
    free: tuple[int, int] | None = None,
) -> list[Site]:  # fmt: skip
    """Sites on the output of one projection for query, key and value; with `biases` it adds them apart if told to."""
    qkv = f"{path}.qkv"
    separate = path if biases else None

    def site(name: str, rows: tuple[int, int] | None) -> Site:
        width = rows[1] - rows[0] if rows else 3 * inner
        by = Neighbour(qkv, rows, biases, free)
        return Site(name, block, width, qkv, "output", rows, produced_by=by, grid=grid, separate_bias=separate)

    parts = {"attn.q": (0, inner), "attn.k": (inner, 2 * inner), "attn.v": (2 * inner, 3 * inner)}
    return [site("attn.qkv", None), *(site(name, rows) for name, rows in parts.items())]


def _split_biases(attn: Any, path: str, inner: int) -> tuple[Bias, ...] | None:
    """Where attention keeps the biases of query and value, if it does; its key has none."""
    if attn.q_bias is None:
        return None
    return Bias(f"{path}.q_bias", (0, inner)), Bias(f"{path}.v_bias", (2 * inner, 3 * inner))


def fuse_biases(model: nn.Module, projections: Iterable[Neighbour]) -> None:
    """Give projections, in place, the biases that attention keeps apart for them and adds behind them."""
    for projection in projections:
        layer: Any = model.get_submodule(projection.path)
        bias = layer.weight.new_zeros(len(layer.weight))
        for part in projection.biases or ():
            bias[slice(*part.rows)] = model.get_parameter(part.path).detach()
        layer.bias = nn.Parameter(bias, requires_grad=False)
        attention: Any = model.get_submodule(projection.path.rpartition(".")[0])
        attention.q_bias = None  # without which it calls the projection and adds nothing


def _proj_sites(attn: Any, path: str, block: int, grid: Grid) -> list[Site]:
    """Sites around the output projection of attention, for blocks that keep the tokens in place."""
    proj = Neighbour(f"{path}.proj")
    return [
        Site("attn.context", block, attn.proj.in_features, proj.path, "input", feeds=(proj,), grid=grid),
        Site("proj.out", block, attn.proj.out_features, proj.path, "output", produced_by=proj, grid=grid),
        Site("attn.out", block, attn.proj.out_features, path, "output", produced_by=proj, grid=grid),
    ]


def _vit_attention(attn: Any, path: str, block: int, grid: Grid) -> list[Site]:
    """timm's `Attention`; the optional gate reads the same tensor as qkv."""
    reads = (Neighbour(f"{path}.qkv"), *([Neighbour(f"{path}.gate")] if attn.gate is not None else []))
    return [
        *_enters(path, block, attn.qkv.in_features, grid, reads),
        *_qkv_sites(attn, path, block, grid, attn.attn_dim),
        *_proj_sites(attn, path, block, grid),
    ]


def _beit_attention(attn: Any, path: str, block: int, grid: Grid) -> list[Site]:
    """BEiT: a constant added to all keys cancels in the softmax."""
    inner = attn.proj.in_features
    biases = _split_biases(attn, path, inner)
    free = (inner, 2 * inner) if biases else None
    reads = (Neighbour(f"{path}.qkv", None, biases, free),)
    return [
        *_enters(path, block, attn.qkv.in_features, grid, reads),
        *_qkv_sites(attn, path, block, grid, inner, biases, free),
        *_proj_sites(attn, path, block, grid),
    ]


def _eva_attention(attn: Any, path: str, block: int, grid: Grid) -> list[Site]:
    """EVA-02, DINOv3, PE: one projection or three; rotary positions keep a constant on the keys from cancelling."""
    gate = (Neighbour(f"{path}.gate"),) if attn.gate is not None else ()
    if attn.qkv is None:
        projections = {f"attn.{part}": (f"{path}.{part}_proj", getattr(attn, f"{part}_proj")) for part in "qkv"}
        reads = (*(Neighbour(host) for host, _ in projections.values()), *gate)
        sites = [
            Site(name, block, linear.out_features, host, "output", produced_by=Neighbour(host), grid=grid)
            for name, (host, linear) in projections.items()
        ]
        width = attn.q_proj.in_features
    else:
        inner, biases = attn.qkv.out_features // 3, None
        if hasattr(attn, "q_bias"):
            biases = _split_biases(attn, path, inner)
        reads = (Neighbour(f"{path}.qkv", None, biases), *gate)
        sites, width = _qkv_sites(attn, path, block, grid, inner, biases), attn.qkv.in_features
    return [*_enters(path, block, width, grid, reads), *sites, *_proj_sites(attn, path, block, grid)]


def _mlp_sites(mlp: Any, path: str, block: int, grid: Grid | None) -> list[Site]:
    """timm's MLPs: `Mlp`, `GluMlp` and `GlobalResponseNormMlp` with one first layer, `SwiGLU` with two (no hidden)."""
    if type(mlp) not in MLPS:
        known = ", ".join(cls.__name__ for cls in MLPS)
        raise SiteError(f"no sites are known for {type(mlp).__name__} at {path} (known: {known})")
    layers = {name: layer for name, layer in mlp.named_children() if name in {"fc1", "fc1_g", "fc1_x", "fc2"}}
    firsts = [name for name in layers if name != "fc2"]
    first = isinstance(mlp.fc2, nn.Conv2d)
    shape: dict[str, Any] = {"grid": grid, "channels_first": first}

    def inwards(name: str) -> int:
        return layers[name].in_channels if first else layers[name].in_features

    def outwards(name: str) -> int:
        return layers[name].out_channels if first else layers[name].out_features

    fc2, reads = Neighbour(f"{path}.fc2"), tuple(Neighbour(f"{path}.{name}") for name in firsts)
    sites = [
        Site("mlp.in", block, inwards(firsts[0]), path, "input", feeds=reads, **shape),
        Site("mlp.act", block, inwards("fc2"), fc2.path, "input", feeds=(fc2,), **shape),
        Site("mlp.out", block, outwards("fc2"), path, "output", produced_by=fc2, **shape),
    ]
    if len(firsts) == 1:
        sites.append(Site("mlp.hidden", block, outwards("fc1"), reads[0].path, "output", produced_by=reads[0], **shape))
    return sites


MLPS = (Mlp, GluMlp, SwiGLU, GlobalResponseNormMlp)
ATTENTIONS: dict[type[nn.Module], SitesOf] = {
    ViTAttention: _vit_attention,
    BeitAttention: _beit_attention,
    EvaAttention: _eva_attention,
    AttentionRope: _eva_attention,
}


def _attention_sites(attn: Any, path: str, block: int, grid: Grid) -> list[Site]:
    if type(attn) not in ATTENTIONS:
        known = ", ".join(cls.__name__ for cls in ATTENTIONS)
        raise SiteError(f"no sites are known for {type(attn).__name__} at {path} (known: {known})")
    return ATTENTIONS[type(attn)](attn, path, block, grid)


def _stream_sites(path: str, block: int, width: int, grid: Grid | None, **shape: Any) -> list[Site]:
    """The block's input and output."""
    return [
        Site("stream.in", block, width, path, "input", grid=grid, **shape),
        Site("stream.out", block, width, path, "output", grid=grid, **shape),
    ]


def _behind(sites: list[Site], norms: Mapping[str, tuple[nn.Module, str]]) -> list[Site]:
    """The sites with the norm (and its path) whose output they are; not those of norms with batch statistics.

    Such a norm may answer otherwise when it runs again.
    """
    known = {name: path for name, (norm, path) in norms.items() if isinstance(norm, NORMS)}
    known = {name: path for name, path in known.items() if not isinstance(norms[name][0], _NormBase)}
    return [replace(site, norm=known[site.name]) if site.name in known else site for site in sites]


def _middle(
    path: str, block: int, width: int, grid: Grid | None, next: str, host: str = "drop_path1", calls: int = 1,
    **shape: Any,
) -> Site:  # fmt: skip
    """The stream behind the first residual add; a host that also ends the second branch runs twice."""
    return Site(
        "stream.mid", block, width, f"{path}.{host}", "residual",
        entry=path, next=f"{path}.{next}", calls=calls, grid=grid, **shape,
    )  # fmt: skip


def _open_block(block: Any, path: str, index: int, grid: Grid, counter: str | None = None) -> list[Site]:
    """A pre-norm block of attention and MLP that takes any number of tokens."""
    norm1, norm2 = (block.norm1, f"{path}.norm1"), (block.norm2, f"{path}.norm2")
    sites = _attention_sites(block.attn, f"{path}.attn", index, grid)
    width = sites[0].width
    return [
        *_behind(sites, {"attn.in": norm1, "qkv.in": norm1}),
        *_behind(_mlp_sites(block.mlp, f"{path}.mlp", index, grid), {"mlp.in": norm2}),
        *_norm_site("norm1.out", block.norm1, f"{path}.norm1", index, grid),
        *_norm_site("norm2.out", block.norm2, f"{path}.norm2", index, grid),
        _middle(path, index, width, grid, "norm2"),
        *_stream_sites(path, index, width, grid),
        Site("tokens.in", index, width, path, "input", grid=grid, prefix_counter=counter),
        Site("tokens.out", index, width, path, "output", grid=grid),
    ]


def _eva_block(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
    """EVA-02, DINOv3, PE: rotary positions start behind the prefix tokens, which attention counts."""
    return _open_block(block, path, index, grid, f"{path}.attn")


def _beit_block(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
    """BEiT: its table of relative positions fixes the number of tokens."""
    return [site for site in _open_block(block, path, index, grid) if not site.name.startswith("tokens.")]


def _windows(block: Any) -> tuple[Grid, Grid, bool]:
    """How the tokens of a Swin block lie as a whole and inside a window, and whether the windows are padded."""
    (height, width), (high, wide) = block.input_resolution, block.window_size
    return Grid(height, width, 0), Grid(high, wide, 0), bool(height % high or width % wide)


def _swin_block(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
    """Swin v1, pre-norm: `attn.in` and `attn.out` are whole images, before and after the shift and the windows."""
    whole, window, padded = _windows(block)
    attn, at = block.attn, f"{path}.attn"
    width, proj, reads = attn.qkv.in_features, Neighbour(f"{at}.proj"), (Neighbour(f"{at}.qkv"),)
    return [
        Site("attn.in", index, width, f"{path}.norm1", "output", feeds=reads, grid=whole, padded=padded,
             norm=f"{path}.norm1"),
        Site("qkv.in", index, width, at, "input", feeds=reads, grid=window),
        *_qkv_sites(attn, at, index, window, attn.qkv.out_features // 3),
        Site("attn.context", index, attn.proj.in_features, proj.path, "input", feeds=(proj,), grid=window),
        Site("proj.out", index, width, proj.path, "output", produced_by=proj, grid=window),
        Site("attn.out", index, width, f"{path}.drop_path1", "input", produced_by=proj, grid=whole),
        *_behind(_mlp_sites(block.mlp, f"{path}.mlp", index, whole), {"mlp.in": (block.norm2, f"{path}.norm2")}),
        *_norm_site("norm1.out", block.norm1, f"{path}.norm1", index, whole),
        *_norm_site("norm2.out", block.norm2, f"{path}.norm2", index, whole),
        _middle(path, index, width, whole, "norm2"),
        *_stream_sites(path, index, width, whole),
    ]  # fmt: skip


def _swin_v2_block(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
    """Swin v2, post-norm: what enters attention is the block's input, cut into windows.

    Its cosine attention divides keys by their length, so a constant on the keys does not cancel.
    """
    whole, window, _ = _windows(block)
    attn, at = block.attn, f"{path}.attn"
    width, inner, proj = attn.qkv.in_features, attn.qkv.out_features // 3, Neighbour(f"{at}.proj")
    biases = _split_biases(attn, at, inner)
    reads = (Neighbour(f"{at}.qkv", None, biases),)
    return [
        *_enters(at, index, width, window, reads),
        *_qkv_sites(attn, at, index, window, inner, biases),
        Site("attn.context", index, attn.proj.in_features, proj.path, "input", feeds=(proj,), grid=window),
        Site("proj.out", index, width, proj.path, "output", produced_by=proj, grid=window),
        Site("attn.out", index, width, f"{path}.norm1", "input", produced_by=proj, grid=whole),
        *_mlp_sites(block.mlp, f"{path}.mlp", index, whole),
        *_norm_site("norm1.out", block.norm1, f"{path}.norm1", index, whole),
        *_norm_site("norm2.out", block.norm2, f"{path}.norm2", index, whole),
        _middle(path, index, width, whole, "mlp"),
        *_stream_sites(path, index, width, whole),
    ]


def _convnext_block(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
    """ConvNeXt v1 and v2: no attention and one residual add; a dense map cannot go into the depthwise convolution."""
    width = block.conv_dw.out_channels
    return [
        *_behind(_mlp_sites(block.mlp, f"{path}.mlp", index, None), {"mlp.in": (block.norm, f"{path}.norm")}),
        *_norm_site("norm2.out", block.norm, f"{path}.norm", index, None),
        *_stream_sites(path, index, width, None, channels_first=True),
    ]


def _mixer_block(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
    """MLP-Mixer and ResMLP: the sites of the channel MLP; token mixing reads across tokens, so no channel map folds."""
    sites = _mlp_sites(block.mlp_channels, f"{path}.mlp_channels", index, grid)
    width = sites[0].width
    return [
        *_behind(sites, {"mlp.in": (block.norm2, f"{path}.norm2")}),
        *_norm_site("norm1.out", block.norm1, f"{path}.norm1", index, grid),
        *_norm_site("norm2.out", block.norm2, f"{path}.norm2", index, grid),
        _middle(path, index, width, grid, "norm2", host="drop_path", calls=2),
        *_stream_sites(path, index, width, grid),
    ]


def _axial_block(block: Any, path: str, index: int, grid: Grid) -> list[Site]:
    """AS-MLP: 1×1 convolutions read and make what passes the axial shift, which moves channels apart in between."""
    shift, at = block.axial_shift, f"{path}.axial_shift"
    first: dict[str, Any] = {"channels_first": True}
    width, conv1, conv3 = shift.conv1.in_channels, Neighbour(f"{at}.conv1"), Neighbour(f"{at}.conv3")
    norm1, norm2 = (block.norm1, f"{path}.norm1"), (block.norm2, f"{path}.norm2")
    return [
        *_behind([Site("attn.in", index, width, at, "input", feeds=(conv1,), **first)], {"attn.in": norm1}),
        Site("attn.out", index, shift.conv3.out_channels, at, "output", produced_by=conv3, **first),
        *_behind(_mlp_sites(block.mlp, f"{path}.mlp", index, None), {"mlp.in": norm2}),
        *_norm_site("norm1.out", *norm1, index, None),
        *_norm_site("norm2.out", *norm2, index, None),
        _middle(path, index, width, None, "norm2", **first),
        *_stream_sites(path, index, width, None, **first),
    ]


BLOCKS: dict[type[nn.Module], SitesOf] = {
    ViTBlock: _open_block,
    EvaBlock: _eva_block,
    BeitBlock: _beit_block,
    SwinTransformerBlock: _swin_block,
    SwinTransformerV2Block: _swin_v2_block,
    ConvNeXtBlock: _convnext_block,
    MixerBlock: _mixer_block,
    ResBlock: _mixer_block,
    AxialShiftedBlock: _axial_block,
}


def _patch_site(model: Any, grid: Grid) -> list[Site]:
    """The output of the patch embedding: of its norm where it has one, else of its convolution."""
    grid = Grid(grid.height, grid.width, 0)
    for path in ("patch_embed", "stem"):
        stem = getattr(model, path, None)
        if isinstance(stem, PatchEmbed):
            by = Neighbour(f"{path}.norm" if isinstance(stem.norm, NORMS) else f"{path}.proj")
            first = not stem.flatten and stem.output_fmt == Format.NCHW
            width = stem.proj.out_channels
            return [Site("patch.out", None, width, path, "output", produced_by=by, grid=grid, channels_first=first)]
        if isinstance(stem, nn.Sequential) and isinstance(stem[-1], CHANNELS_FIRST_NORMS):
            return _norm_site("patch.out", stem[-1], f"{path}.{len(stem) - 1}", None, None)
    return []


def outside_sites(model: nn.Module, grid: Grid) -> list[Site]:
    """Return the sites before and behind the blocks."""
    modules = dict(model.named_modules())
    finals = (_norm_site("norm.out", modules[p], p, None, grid) for p in FINAL_NORMS if p in modules)
    return [*_patch_site(model, grid), *next((found for found in finals if found), [])]
