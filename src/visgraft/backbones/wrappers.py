"""What torch, accelerate and Lightning put around a model, seen through."""

from torch import nn

from visgraft.errors import VisgraftError

INSIDE = ("_orig_mod", "_original_module", "module")
"""Where wrappers keep the model: `torch.compile`; Lightning's Fabric; DataParallel, DDP, FSDP and averaged models."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers; the model itself where it has none."""
    while inner := [model._modules[name] for name in INSIDE if model._modules.get(name) is not None]:
        model = inner[0]  # type: ignore[assignment]
    return model


def refuse_wrapped(model: nn.Module, verb: str) -> None:
    """Raise a VisgraftError where a model is wrapped: what is compiled or spread already would not see the change."""
    if unwrapped(model) is not model:
        where = next(name for name in INSIDE if model._modules.get(name) is not None)
        raise VisgraftError(
            f"this {type(model).__name__} is a wrapper around the model, which would not see the change; {verb} the "
            f"model inside (model.{where}), and wrap it anew"
        )
