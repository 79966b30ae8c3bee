"""From a name to a model, by timm's conventions."""

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
    """A FAT in training mode; its weights are drawn from torch's default generator by PyTorch's default initialisation.

    name: one of `list_models()`, or a config. num_classes, in_chans, drop_path and `dimensions`, which may be any other
    field of `FATConfig`, replace what that says (the variants: 1000 classes, 3 channels, the paper's drop path);
    num_classes=0 leaves the classifier out. weights: a file to fill the model from, see `load_weights`, whose notes are
    issued as warnings. replace_head: keep the fresh classifier where the file's has another number of classes, which is
    an error otherwise. features_only: the four stages' maps instead of logits, see `FATFeatures`.
    """
    if isinstance(name, str):
        if name not in VARIANTS:
            raise ValueError(f"{name}: no such model; there are {', '.join(VARIANTS)}")
        name = VARIANTS[name]
    dimensions |= {"num_classes": num_classes, "in_chans": in_chans, "drop_path": drop_path}
    config = dataclasses.replace(name, **{field: value for field, value in dimensions.items() if value is not None})
    model: Trunk = FATFeatures(config) if features_only else FAT(config)
    if weights is not None:
        from fat.weights.load import load_weights, warn

        warn(weights, load_weights(model, weights, replace_head=replace_head))
    return model


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(VARIANTS)
