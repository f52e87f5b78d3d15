"""All formats: importing this module registers them, in the order in which they are listed."""

from visgraft.export import onnx, peft_lora, timm_folder
from visgraft.export.format import FORMATS

__all__ = ["FORMATS", "onnx", "peft_lora", "timm_folder"]
