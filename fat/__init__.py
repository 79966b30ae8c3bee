"""The FAT family (Fully Adaptive Transformer, arXiv 2306.00396): `fat.create_model("fat_b0")`.

Importing it requires only torch. After `fat.register_with_timm()`, `timm.create_model("fat_b0")` works too.
"""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Python is about to run a command of this package, as in `python -m fat.account.table`. Importing torch takes
    # seconds, in which Ctrl-C would print a long traceback.
    def _exit(number: int, frame: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, _exit)

from fat.account.cost import Cost, count
from fat.config import FATConfig
from fat.export import export_onnx, export_program
from fat.factory import create_model, list_models
from fat.fusion import fuse
from fat.inference.load import LoadedModel, class_names, load
from fat.inference.transform import ImageTransform
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
    "ImageTransform",
    "LoadedModel",
    "WeightsInfo",
    "class_names",
    "count",
    "create_model",
    "export_onnx",
    "export_program",
    "fuse",
    "list_models",
    "load",
    "load_model",
    "load_weights",
    "read_info",
    "register_with_timm",
    "save_weights",
]
