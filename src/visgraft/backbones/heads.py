"""Where a timm model keeps its classifier."""

from collections.abc import Collection
from typing import Any

from torch import nn


def classifier_paths(model: nn.Module, before: Collection[str] = ()) -> tuple[str, ...]:
    """Return where the classifier is, or would be with `num_classes=0`: ("head",), ("head.fc",), ("head", "head_dist").

    Only the classifier itself, found by identity: ConvNeXt's final norm, `head.norm`, belongs to the backbone. Where it
    was `before` is looked at first, as a walk through all modules takes most of the time of a swap in a bank.
    """
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    wanted = {id(module) for module in (found if isinstance(found, tuple | list) else (found,))}
    if before and {id(_module_at(model, path)) for path in before} == wanted:
        return tuple(before)
    return tuple(path for path, module in model.named_modules() if id(module) in wanted)


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def head_paths(model: nn.Module, before: Collection[str] = ()) -> tuple[str, ...]:
    """Return the paths of the classifier's layers that have parameters; empty for `num_classes=0`."""
    paths = classifier_paths(model, before)
    return tuple(path for path in paths if next(model.get_submodule(path).parameters(), None) is not None)


def output_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the path of the layer of each head that makes its outputs: its last linear one, or the head itself."""
    found = []
    for path in head_paths(model):
        inside = [
            f"{path}.{name}" if name else path
            for name, layer in model.get_submodule(path).named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        found.append(inside[-1] if inside else path)
    return tuple(found)


def head_outputs(model: nn.Module) -> int | None:
    """Return how many outputs the classifier has, 0 where there is none; None where the model does not say.

    The layer itself is asked: one that was put in by hand leaves timm's `num_classes` as it was.
    """
    named: Any = getattr(model, "num_classes", None)
    if not hasattr(model, "get_classifier"):
        return named
    paths = head_paths(model)
    if not paths:
        return 0
    layers = [layer for layer in model.get_submodule(paths[0]).modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return len(layers[-1].weight) if layers else named
