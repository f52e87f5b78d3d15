"""All formats: importing this module registers them, in the order in which they are listed."""

from visgraft.export import executorch, onnx, onnx_adapter, openvino, peft_lora, timm_folder, torch_program, web
from visgraft.export.format import FORMATS

__all__ = [
    "FORMATS", "executorch", "onnx", "onnx_adapter", "openvino", "peft_lora", "timm_folder", "torch_program", "web"
]  # fmt: skip
