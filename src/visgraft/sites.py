"""Sites: the named places of a backbone where a feature tensor passes, from a table keyed by the block's class.

A general rule such as "hook whatever is called norm1" sits in the wrong place in post-norm blocks and looks fine, so
a block class without a row is refused by name.

| site | the tensor |
|---|---|
| `attn.in` | what enters attention |
| `attn.q`, `attn.k`, `attn.v`, `attn.qkv` | the query, key, value rows of the qkv projection's output, or all three |
| `attn.context` | what enters the attention's output projection |
| `attn.out` | the attention branch before LayerScale, drop-path and the add |
| `stream.mid` | the residual stream between the attention add and norm2 |
| `mlp.in`, `mlp.hidden`, `mlp.act` | what enters the MLP, its first layer's output, what enters its last layer |
| `mlp.out` | the MLP branch before LayerScale, drop-path and the add |
| `stream.out` | the block's output |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import nn

from visgraft.errors import SiteError
from visgraft.method import Grid


@dataclass(frozen=True)
class Neighbour:
    """A linear layer beside a site: its path in the model and the rows of its output (None: all)."""

    path: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Site:
    """A place where a tensor [B, N, width] passes.

    `side` says where it is: the first `input` of the module at `host`, its `output` (only `rows` of the last axis
    where set), or the `residual` sum of the input of `entry` and the output of `host`, which the module at `next`
    receives. `feeds` are the linear layers that read the tensor, and nothing else does; `produced_by` is the one
    whose output it is.
    """

    name: str
    block: int
    width: int
    host: str
    side: Literal["input", "output", "residual"]
    rows: tuple[int, int] | None = None
    entry: str | None = None
    next: str | None = None
    feeds: tuple[Neighbour, ...] = ()
    produced_by: Neighbour | None = None


Row = Callable[[Any, str, int], list[Site]]


def _attention(attn: Any, path: str, block: int) -> list[Site]:
    """Sites of timm's `Attention`; the optional gate reads the same tensor as qkv."""
    qkv, inner = f"{path}.qkv", attn.attn_dim
    reads = (Neighbour(qkv), Neighbour(f"{path}.gate")) if attn.gate is not None else (Neighbour(qkv),)
    parts = {"attn.q": (0, inner), "attn.k": (inner, 2 * inner), "attn.v": (2 * inner, 3 * inner)}
    proj = Neighbour(f"{path}.proj")
    return [
        Site("attn.in", block, attn.qkv.in_features, path, "input", feeds=reads),
        Site("attn.qkv", block, 3 * inner, qkv, "output", produced_by=Neighbour(qkv)),
        *(Site(n, block, inner, qkv, "output", rows=r, produced_by=Neighbour(qkv, r)) for n, r in parts.items()),
        Site("attn.context", block, attn.proj.in_features, proj.path, "input", feeds=(proj,)),
        Site("attn.out", block, attn.proj.out_features, path, "output", produced_by=proj),
    ]


def _mlp(mlp: Any, path: str, block: int) -> list[Site]:
    """Sites of timm's `Mlp`, `GluMlp` (one first layer) and `SwiGLU` (two, so no `mlp.hidden`)."""
    first = [f"{path}.{name}" for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]
    layers = dict(mlp.named_children())
    width_in, fc2 = layers[first[0].rsplit(".", 1)[1]].in_features, Neighbour(f"{path}.fc2")
    sites = [
        Site("mlp.in", block, width_in, path, "input", feeds=tuple(Neighbour(name) for name in first)),
        Site("mlp.act", block, mlp.fc2.in_features, fc2.path, "input", feeds=(fc2,)),
        Site("mlp.out", block, mlp.fc2.out_features, path, "output", produced_by=fc2),
    ]
    if len(first) == 1:
        hidden = Neighbour(first[0])
        sites.append(Site("mlp.hidden", block, mlp.fc1.out_features, first[0], "output", produced_by=hidden))
    return sites


ATTENTIONS: dict[type[nn.Module], Row] = {Attention: _attention}
MLPS: dict[type[nn.Module], Row] = {Mlp: _mlp, GluMlp: _mlp, SwiGLU: _mlp}


def _vit_block(block: Any, path: str, index: int) -> list[Site]:
    """Sites of timm's pre-norm ViT block, with or without LayerScale, q/k norm and drop-path."""
    sites: list[Site] = []
    for part, table in (("attn", ATTENTIONS), ("mlp", MLPS)):
        module = getattr(block, part)
        if type(module) not in table:
            known = ", ".join(cls.__name__ for cls in table)
            raise SiteError(f"no sites are known for {type(module).__name__} at {path}.{part} (known: {known})")
        sites += table[type(module)](module, f"{path}.{part}", index)
    width = sites[0].width
    middle = Site("stream.mid", index, width, f"{path}.drop_path1", "residual", entry=path, next=f"{path}.norm2")
    return [*sites, middle, Site("stream.out", index, width, path, "output")]


BLOCKS: dict[type[nn.Module], Row] = {Block: _vit_block}


def find_sites(model: nn.Module) -> list[dict[str, Site]]:
    """Return one dictionary of site name -> `Site` per block, in the order in which the blocks stand.

    Raises:
        SiteError: the model has no block of a known class, or mixes one with blocks of an unknown class.
    """
    stacks = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    found: list[dict[str, Site]] = []
    unknown: list[type[nn.Module]] = []
    for path, stack in stacks:
        members = list(stack.named_children())
        if any(type(member) in BLOCKS for _, member in members):
            for name, member in members:
                if type(member) not in BLOCKS:
                    raise SiteError(_refusal(model, [type(member)]))
                sites = BLOCKS[type(member)](member, f"{path}.{name}", len(found))
                found.append({site.name: site for site in sites})
        else:
            unknown += [type(member) for _, member in members if len(list(member.children())) > 1]
    if not found:
        raise SiteError(_refusal(model, unknown))
    return found


def _refusal(model: nn.Module, unknown: list[type[nn.Module]]) -> str:
    names = ", ".join(dict.fromkeys(cls.__name__ for cls in unknown)) or "none that visgraft recognises"
    known = ", ".join(cls.__name__ for cls in BLOCKS)
    return (
        f"{type(model).__name__} has blocks of class {names}, for which no sites are known (known: {known}); "
        "use a backbone of a known class, or a method that needs no site (linear, full)"
    )


def find_grid(model: nn.Module) -> Grid:
    """Return how the tokens of a token model lie, from its patch embedding and its number of prefix tokens.

    Raises:
        SiteError: the model does not say.
    """
    size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if size is None:
        raise SiteError(f"{type(model).__name__} does not say how its patches lie (patch_embed.grid_size)")
    return Grid(size[0], size[1], getattr(model, "num_prefix_tokens", 0))


def find_image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return the shape [channels, height, width] of the images that a token model takes.

    Raises:
        SiteError: the model does not say.
    """
    patches: Any = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is None:
        raise SiteError(f"{type(model).__name__} does not say which image size it takes (patch_embed.img_size)")
    return (patches.proj.in_channels, size[0], size[1])
