"""The FAT family (Fully Adaptive Transformer, arXiv 2306.00396): `fat.create_model("fat_b0")`.

Importing it requires only torch. After `fat.register_with_timm()`, `timm.create_model("fat_b0")` works too.
"""

from fat.account.cost import Cost, count
from fat.config import FATConfig
from fat.export import export_onnx, export_program
from fat.factory import create_model, list_models
from fat.fusion import fuse
from fat.model import FAT, FATFeatures
from fat.timm_registry import register_with_timm
from fat.weights.classes import ClassList
from fat.weights.header import WeightsInfo
from fat.weights.load import load_model, load_weights, read_info
from fat.weights.save import save_weights

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
    "register_with_timm",
    "save_weights",
]
