"""The FAT family (Fully Adaptive Transformer, arXiv 2306.00396): `fat.create_model("fat_b0")`."""

from fat.config import FATConfig
from fat.factory import create_model, list_models
from fat.model import FAT

__all__ = ["FAT", "FATConfig", "create_model", "list_models"]
