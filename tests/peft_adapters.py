"""Adapters of tiny models of every family on disk, as the exports read them: by a name that timm knows."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from support import CLASSES, batches, enliven, family, live, size_of
from timm.models import load_pretrained, register_model

from visgraft import Backbone, MethodConfig, attach, create_backbone, save

FACTS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "crop_pct": 1.0}


@functools.cache
def known_to_timm(kind: str) -> str:
    """Register a tiny family under a name of its own with timm; returns the name."""

    def make(pretrained: bool = False, num_classes: int = CLASSES, pretrained_cfg: Any = None, **others: Any) -> Any:
        model = family(kind, num_classes=num_classes)
        size = size_of(kind)
        model.pretrained_cfg = {
            **(getattr(model, "pretrained_cfg", None) or {}),
            **FACTS,
            "architecture": make.__name__,
            "input_size": (3, size, size),
        }
        if pretrained:  # from a folder, as timm's own models are opened
            load_pretrained(model, {**model.pretrained_cfg, **pretrained_cfg}, num_classes)
        return model

    make.__name__, make.__module__ = f"tiny_{kind}", __name__
    if not timm.is_model(make.__name__):
        register_model(make)
    return make.__name__


def written(
    config: MethodConfig,
    folder: Path,
    kind: str = "plain",
    classes: Sequence[str] = tuple("abcde"),
    unfrozen: Sequence[str] = (),
    **record: Any,
) -> tuple[Path, Path]:
    """Write an adapter that changes the answers of a tiny family; returns its folder and the backbone's weights.

    `unfrozen` begin the names of tensors of the backbone that train besides.
    """
    weights = folder / "backbone.safetensors"
    model: Any = create_backbone(Backbone(known_to_timm(kind), "none"), len(classes))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(live(model).state_dict(), weights)
    model = create_backbone(Backbone(known_to_timm(kind), str(weights)), len(classes))
    torch.manual_seed(1)
    attach(model, config, batches(size=size_of(kind)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.startswith(tuple(unfrozen)))
    save(enliven(model).eval(), folder / "adapter", classes=classes, record=record or None)
    return folder / "adapter", weights
