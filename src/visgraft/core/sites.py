"""Sites: the named places of a backbone where a feature tensor passes.

| site | the tensor |
|---|---|
| `stream.in` | the block's input |
| `norm1.out`, `norm2.out` | what the block's norms return: before the branch or, in post-norm blocks, after it |
| `attn.in` | what enters attention; in Swin v1 before the shift and the windows |
| `qkv.in` | what its projections read: inside the windows where there are any |
| `attn.q`, `attn.k`, `attn.v`, `attn.qkv` | the query, key, value rows of the qkv projection's output, or all three |
| `attn.context` | what enters the attention's output projection |
| `proj.out` | what that projection returns, inside the windows where there are any |
| `attn.out` | the attention branch before LayerScale, drop-path and the add |
| `stream.mid` | the residual stream between the attention (or token-mixing) add and the MLP branch |
| `mlp.in`, `mlp.hidden`, `mlp.act` | what enters the MLP, its first layer's output, what enters its last layer |
| `mlp.out` | the MLP branch before LayerScale, drop-path and the add |
| `stream.out` | the block's output |
| `tokens.in`, `tokens.out` | the block's input and output, where the block takes any number of tokens |
| `patch.out`, `norm.out` | outside the blocks: the patch embedding's output, the final norm's output |

Which of them a backbone has, and where, stands in the family table, `families.py`; `finding.py` looks them up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from visgraft.core.method import Grid, Position

BEFORE_BLOCKS = frozenset({"patch.out"})
"""The sites outside the blocks that images pass before the first block; the others lie behind the last."""


class Bias(NamedTuple):
    """A parameter that holds some rows of a projection's bias: its path in the model, and those rows."""

    path: str
    rows: tuple[int, int]


@dataclass(frozen=True)
class Neighbour:
    """A layer beside a site, linear or a norm: its path in the model and the rows of its output (None: all).

    `biases` says where its bias is kept if not in the layer itself, and in `free` are rows of the output to which a
    constant may be added without any effect (a key's bias cancels in the softmax).
    """

    path: str
    rows: tuple[int, int] | None = None
    biases: tuple[Bias, ...] | None = None
    free: tuple[int, int] | None = None


@dataclass(frozen=True)
class Site:
    """A place where a tensor of `width` channels passes.

    `side` says where it is: the first `input` of the module at `host`, its `output` (only `rows` of the last axis
    where set), or the `residual` sum of the input of `entry` and the output of `host`, which the module at `next`
    receives. `calls` is how often the host runs in one forward; the site is its first run. `feeds` are the linear
    layers that read the tensor, and nothing else does; `produced_by` is the layer whose output it is.

    The tensor is [B, N, width], or [B, H, W, width], or [B, width, H, W] where `channels_first`. `grid` says how N
    tokens lie; None where the tensor's own shape does. `padded`: zeros are added to the tokens before `feeds` read
    them, so that a constant cannot move behind the padding.

    `norm` is a norm whose output the tensor is; it is cheaper to run it again in the backward pass than to keep both
    its input and its output.

    `separate_bias` is an attention that adds the qkv bias apart, and only then calls its qkv, once told to.
    `prefix_counter` is a module that counts the prefix tokens by itself.
    """

    name: str
    block: int | None
    width: int
    host: str
    side: Literal["input", "output", "residual"]
    rows: tuple[int, int] | None = None
    entry: str | None = None
    next: str | None = None
    calls: int = 1
    feeds: tuple[Neighbour, ...] = ()
    produced_by: Neighbour | None = None
    grid: Grid | None = None
    channels_first: bool = False
    padded: bool = False
    norm: str | None = None
    separate_bias: str | None = None
    prefix_counter: str | None = None


@dataclass(frozen=True)
class Sites:
    """All sites of a backbone: by name for each block in order, each block's stage, and those outside the blocks."""

    blocks: tuple[Mapping[str, Site], ...] = ()
    stages: tuple[int, ...] = ()
    outside: Mapping[str, Site] = field(default_factory=dict)

    def at(self, position: Position) -> tuple[Site, Site]:
        """Return the sites where a position reads and where it adds."""
        reads, adds_to = position.place
        if position.block is None:
            return self.outside[reads], self.outside[adds_to]
        last = position.block if position.last is None else position.last
        return self.blocks[position.block][reads], self.blocks[last][adds_to]

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the names that some block lacks."""
        return [name for name in dict.fromkeys(names) if name not in self.everywhere()]

    def everywhere(self) -> set[str]:
        """Return the names of the sites that every block has, and of those outside the blocks."""
        inside = set.intersection(*(set(sites) for sites in self.blocks)) if self.blocks else set()
        return inside | set(self.outside)
