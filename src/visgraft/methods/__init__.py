"""The methods that ship with visgraft, one file each; importing this package registers them."""

from visgraft.methods.sct import SCT, SCTConfig  # isort: skip
from visgraft.methods.alore import ALoRE, ALoREConfig  # isort: skip
from visgraft.methods.lora import LoRA, LoRAConfig  # isort: skip
from visgraft.methods.linear import Linear, LinearConfig  # isort: skip
from visgraft.methods.full import Full, FullConfig  # isort: skip

__all__ = [
    "SCT",
    "ALoRE",
    "ALoREConfig",
    "Full",
    "FullConfig",
    "Linear",
    "LinearConfig",
    "LoRA",
    "LoRAConfig",
    "SCTConfig",
]
