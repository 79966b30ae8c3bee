"""From a name to a model, by timm's conventions."""

from __future__ import annotations

import dataclasses
from typing import Any

from fat.config import VARIANTS, FATConfig
from fat.model import FAT


def create_model(
    name: str | FATConfig,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path: float | None = None,
    **dimensions: Any,
) -> FAT:
    """A FAT with fresh weights, drawn from torch's default generator by PyTorch's default initialisation.

    name: one of `list_models()`, or a config. num_classes: 0 leaves the classifier out. drop_path: None takes the
    paper's. dimensions: any other field of `FATConfig`.
    """
    if isinstance(name, str):
        if name not in VARIANTS:
            raise ValueError(f"{name}: no such model; there are {', '.join(VARIANTS)}")
        name = VARIANTS[name]
    if drop_path is not None:
        dimensions["drop_path"] = drop_path
    return FAT(dataclasses.replace(name, num_classes=num_classes, in_chans=in_chans, **dimensions))


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(VARIANTS)
