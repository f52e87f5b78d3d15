"""The methods that ship with visgraft, one file each; importing a file registers its method, in this order."""

from visgraft.methods.sct import SCTConfig as SCTConfig  # isort: skip
from visgraft.methods.alore import ALoREConfig as ALoREConfig  # isort: skip
from visgraft.methods.lora import LoRAConfig as LoRAConfig  # isort: skip
from visgraft.methods.linear import LinearConfig as LinearConfig  # isort: skip
from visgraft.methods.full import FullConfig as FullConfig  # isort: skip

__all__ = [name for name in dir() if name.endswith("Config")]
