"""Where a timm model keeps its classifier."""

from typing import Any

from torch import nn


def classifier_paths(model: nn.Module) -> tuple[str, ...]:
    """Return where the classifier is, or would be with `num_classes=0`: ("head",), ("head.fc",), ("head", "head_dist").

    Only the classifier itself, found by identity: ConvNeXt's final norm, `head.norm`, belongs to the backbone.
    """
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    wanted = {id(module) for module in (found if isinstance(found, tuple | list) else (found,))}
    return tuple(path for path, module in model.named_modules() if id(module) in wanted)


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the classifier's layers that have parameters; empty for `num_classes=0`."""
    return tuple(p for p in classifier_paths(model) if next(model.get_submodule(p).parameters(), None) is not None)
