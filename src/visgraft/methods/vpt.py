"""VPT, Visual Prompt Tuning (arXiv:2203.12119): trained tokens beside the image's, in the first or in every block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from visgraft.core.method import Grid, Place, Position, TokenMethod
from visgraft.core.registry import register
from visgraft.options import MethodConfig, TrainConfig, option


@dataclass(frozen=True)
class _PromptConfig(MethodConfig):
    prompts: int = option(10, "number of prompt tokens (p), in VPT-deep for each block")
    dropout: float = option(0.1, "dropout on the prompts while training")

    starts_as_identity = False  # the image's tokens attend to the prompts, whatever those are

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("prompts")
        self.check_rates("dropout")


@dataclass(frozen=True)
class VPTShallowConfig(_PromptConfig):
    """Options of VPT-shallow. The authors chose the number of prompts task by task, from 1 to 200."""


@dataclass(frozen=True)
class VPTDeepConfig(_PromptConfig):
    """Options of VPT-deep. The authors chose the number of prompts task by task, from 1 to 200."""


class _Prompts(TokenMethod):
    """Prompts P [p, C] inserted behind the prefix tokens (class token, registers) and removed again.

    They start uniform within ±√(3 / C). The authors' bound, √(6 / (3 s² + C)) for patches of s × s, is Xavier's for
    the patch embedding; a method knows no patch size, and for the 16 × 16 of ViT-B both are equal, 3 · 16² being 768.
    """

    def __init__(self, config: _PromptConfig, position: Position, shared: Mapping[str, nn.Module]) -> None:
        super().__init__(config, position, shared)
        self.prompts = nn.Parameter(torch.empty(config.prompts, position.reads_width))
        self.dropout = nn.Dropout(config.dropout)
        bound = math.sqrt(3 / position.reads_width)
        nn.init.uniform_(self.prompts, -bound, bound)

    @classmethod
    def placements(cls, config: _PromptConfig) -> tuple[tuple[Place, ...], ...]:
        return ((Place("tokens.in", "tokens.out"),),)

    def tokens(self) -> int:
        return len(self.prompts)

    def insert(self, x: Tensor, grid: Grid) -> Tensor:
        """Return [prefix, prompts, patches]: [B, N, C] -> [B, N + p, C]; dropout differs from image to image."""
        return self._inserted(x, self.dropout(self.prompts.expand(x.shape[0], -1, -1)), grid)

    def insert_by_rows(self, tensors: Mapping[str, Tensor], x: Tensor, grid: Grid) -> Tensor:
        """As `insert`, with prompts [B, p, C] of each image."""
        return self._inserted(x, tensors["prompts"], grid)

    def _inserted(self, x: Tensor, prompts: Tensor, grid: Grid) -> Tensor:
        prefix, patches = x[:, : grid.prefix_tokens], x[:, grid.prefix_tokens :]
        return torch.cat((prefix, prompts.to(x.dtype), patches), dim=1)

    def remove(self, x: Tensor, grid: Grid) -> Tensor:
        """Return [prefix, patches]: [B, N + p, C] -> [B, N, C]."""
        return torch.cat((x[:, : grid.prefix_tokens], x[:, grid.prefix_tokens + self.tokens() :]), dim=1)


@register("vpt_shallow", paper="arXiv:2203.12119")
class VPTShallow(_Prompts):
    """VPT-shallow (section 3.2): prompts enter the first block, pass through all, and leave behind the last.

    The class token or the mean over the patches is read as before; prompts are never pooled.
    """

    Config = VPTShallowConfig
    recipe = TrainConfig(lr=1e-2)
    knobs: ClassVar = {"lr": (1e-3, 5e-3, 1e-2, 5e-2), "prompts": (1, 10, 50, 100)}

    @classmethod
    def spans(cls, config: VPTShallowConfig, stages: Sequence[int]) -> list[tuple[int, int]]:
        return [(0, len(stages) - 1)]


@register("vpt_deep", paper="arXiv:2203.12119")
class VPTDeep(_Prompts):
    """VPT-deep (section 3.2): every block has prompts of its own, and what becomes of them is dropped behind it.

    That is the same as replacing the prompts before every block.
    """

    Config = VPTDeepConfig
    recipe = TrainConfig(lr=1e-2)
    knobs: ClassVar = {"lr": (1e-3, 5e-3, 1e-2, 5e-2), "prompts": (1, 10, 50, 100)}
