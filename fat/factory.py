"""Create a model by name, following timm's conventions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, overload

from fat.config import VARIANTS, FATConfig
from fat.model import FAT, FATFeatures, Trunk


@overload
def create_model(
    name: str | FATConfig,
    *,
    num_classes: int | None = ...,
    in_chans: int | None = ...,
    drop_path: float | None = ...,
    weights: str | Path | None = ...,
    replace_head: bool = ...,
    features_only: Literal[False] = False,
    **dimensions: Any,
) -> FAT: ...


@overload
def create_model(
    name: str | FATConfig,
    *,
    in_chans: int | None = ...,
    drop_path: float | None = ...,
    weights: str | Path | None = ...,
    features_only: Literal[True],
    **dimensions: Any,
) -> FATFeatures: ...


def create_model(
    name: str | FATConfig,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_path: float | None = None,
    weights: str | Path | None = None,
    replace_head: bool = False,
    features_only: bool = False,
    **dimensions: Any,
) -> Trunk:
    """Create a FAT model in training mode, with PyTorch's default initialisation from its default generator.

    Args:
        name: one of `list_models()`, or a config. The variants have 1000 classes, 3 input channels and the paper's drop
            path rate.
        num_classes: replaces the config's number of classes; 0 creates a model without classifier.
        in_chans, drop_path, dimensions: replace these or any other fields of the config (`FATConfig`).
        weights: file to load weights from (`load_weights`); decisions about its content are issued as warnings.
        replace_head: keep the newly initialised classifier if the file's classifier has another number of classes,
            which is otherwise an error.
        features_only: return the feature maps of the four stages instead of logits (`FATFeatures`).
    """
    if isinstance(name, str):
        if name not in VARIANTS:
            raise ValueError(f"{name}: unknown model; expected one of {', '.join(VARIANTS)}")
        name = VARIANTS[name]
    dimensions |= {"num_classes": num_classes, "in_chans": in_chans, "drop_path": drop_path}
    config = dataclasses.replace(name, **{field: value for field, value in dimensions.items() if value is not None})
    model: Trunk = FATFeatures(config) if features_only else FAT(config)
    if weights is not None:
        from fat.weights.load import load_weights, warn

        warn(weights, load_weights(model, weights, replace_head=replace_head))
    return model


def list_models() -> list[str]:
    """Return the names that `create_model` accepts."""
    return list(VARIANTS)
