"""The FAT family (Fully Adaptive Transformer, arXiv 2306.00396): `fat.create_model("fat_b0")`.

Imports torch alone. Where timm is in use, `timm.create_model("fat_b0")` works too, whichever is imported first.
"""

from fat.account.cost import Cost, count
from fat.config import FATConfig
from fat.export import export_onnx, export_program
from fat.factory import create_model, list_models
from fat.fusion import fuse
from fat.model import FAT, FATFeatures
from fat.timm_registry import register_with_timm, when_imported
from fat.weights.classes import ClassList
from fat.weights.header import WeightsInfo
from fat.weights.load import load_model, load_weights, read_info, save_weights

when_imported("timm", register_with_timm)

__all__ = [
    "FAT",
    "ClassList",
    "Cost",
    "FATConfig",
    "FATFeatures",
    "WeightsInfo",
    "count",
    "create_model",
    "export_onnx",
    "export_program",
    "fuse",
    "list_models",
    "load_model",
    "load_weights",
    "read_info",
    "save_weights",
]
