"""All formats: importing this module registers them, in the order in which they are listed."""

from visgraft.export import onnx, onnx_adapter, timm_folder, web
from visgraft.export.format import FORMATS

__all__ = ["FORMATS", "onnx", "onnx_adapter", "timm_folder", "web"]
