"""All formats: importing this module registers them, in the order in which they are listed."""

from visgraft.export import onnx, timm_folder
from visgraft.export.format import FORMATS

__all__ = ["FORMATS", "onnx", "timm_folder"]
