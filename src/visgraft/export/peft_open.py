"""Opening a peft adapter with peft alone, onto a plain timm model or onto transformers' wrapper of one."""

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visgraft.backbones.creation import Backbone, fit_image_size
from visgraft.backbones.weights import first_line
from visgraft.errors import AdapterError
from visgraft.export.proof import torch_answers
from visgraft.export.samples import Samples

Host = Literal["timm", "transformers"]
PREFIXES: dict[str, str] = {"timm": "", "transformers": "timm_model."}
"""Where a timm model's layers are inside what peft is given."""
KEYS = "base_model.model."
"""How peft begins the names of all tensors in a file."""
NAME = "default"
"""How peft calls an adapter that is opened without a name."""
FACTS = "visgraft.json"
"""Where an export keeps what peft has no place for."""


def timm_name(backbone: Backbone) -> str:
    """Return the name by which timm itself creates a backbone."""
    return backbone.name.removeprefix("timm/")  # as the hub shows it


def timm_arguments(backbone: Backbone) -> dict[str, Any]:
    """Return the arguments of timm's constructor besides name, weights and classes."""
    return {**backbone.arguments, **fit_image_size(backbone)[0]}


def hosted(model: nn.Module, backbone: Backbone, outputs: int, host: Host) -> nn.Module:
    """Return a timm model as peft is given it: itself, or inside transformers' wrapper for classification.

    Args:
        model: the plain timm model.
        backbone: what it was made from.
        outputs: of its head; above 0 for transformers.
        host: which of the two.
    """
    if host == "timm":
        return model
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    arguments = timm_arguments(backbone)
    config = TimmWrapperConfig(architecture=timm_name(backbone), num_labels=outputs, model_args=arguments or None)
    with torch.random.fork_rng():
        wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model = model
    return wrapper


def open_peft(folder: Path, base: nn.Module) -> Any:
    """Return a peft model in eval mode, on the CPU, of an adapter's folder and the model that it is for.

    `base` is changed in place, as peft does it.

    Raises:
        AdapterError: peft does not open it onto this model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is measured
            return PeftModel.from_pretrained(base, str(folder), torch_device="cpu").eval()
    except Exception as error:  # of a wrong option or tensor, peft raises whatever comes
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
        raise AdapterError(f"peft does not open {folder} onto this model ({reason}); check the backbone") from error


class Logits(nn.Module):
    """A model whose answer is a tensor of logits, whatever it is wrapped in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]."""
        answer = self.model(x)
        logits: Tensor = getattr(answer, "logits", answer)
        return logits


def peft_answers(model: nn.Module, samples: Samples) -> Tensor:
    """Return the logits [N, classes] of a peft model."""
    return torch_answers(Logits(model), samples)
