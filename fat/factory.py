"""Create a model by name, following timm's conventions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from fat.config import VARIANTS, FATConfig
from fat.model import FAT, FATFeatures, Trunk

OPTIONS = (
    "weights", "replace_head", "features_only", "out_indices", *(field.name for field in dataclasses.fields(FATConfig)),
)  # fmt: skip


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
    out_indices: int | Sequence[int] | None = ...,
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
    out_indices: int | Sequence[int] | None = None,
    **dimensions: Any,
) -> Trunk:
    """Create a FAT model in training mode, with PyTorch's default initialization from its default generator.

    Args:
        name: one of `list_models()`, or a config. The variants have 1000 classes, 3 input channels and the paper's drop
            path rate.
        num_classes: replaces the config's number of classes; 0 creates a model without classifier.
        in_chans, drop_path, dimensions: replace these or any other fields of the config (`FATConfig`).
        weights: file to load weights from (`load_weights`); decisions about its content are issued as warnings.
        replace_head: keep the newly initialized classifier if the file's classifier has another number of classes,
            which is otherwise an error.
        features_only: return the feature maps of the stages instead of logits (`FATFeatures`).
        out_indices: stages whose feature maps `features_only` returns: numbers from 0 to 3 in ascending order, where
            negative ones count from the last, or n for the last n stages. Default: all four.

    Raises:
        ValueError: an option or the weights file is invalid; the message names it and says what is expected.
        TypeError: there is no such option.
    """
    label = name if isinstance(name, str) else type(name).__name__
    check_options(label, dimensions, OPTIONS)
    if isinstance(name, str):
        if name not in VARIANTS:
            raise ValueError(f"{name}: unknown model; expected one of {', '.join(VARIANTS)}")
        name = VARIANTS[name]
    dimensions |= {"num_classes": num_classes, "in_chans": in_chans, "drop_path": drop_path}
    config = dataclasses.replace(name, **{field: value for field, value in dimensions.items() if value is not None})
    if out_indices is not None and not features_only:
        raise ValueError(f"{label}: out_indices selects feature maps and requires features_only=True")
    model: Trunk = FATFeatures(config, out_indices) if features_only else FAT(config)
    if weights is not None:
        from fat.weights.load import load_weights, warn

        warn(weights, load_weights(model, weights, replace_head=replace_head))
    return model


def check_options(name: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a TypeError that names the options of which none is known, and those that are."""
    unknown = [option for option in given if option not in known]
    if unknown:
        raise TypeError(f"{name}: unknown {', '.join(unknown)}; the options of a FAT model are {', '.join(known)}")


def list_models() -> list[str]:
    """Return the names that `create_model` accepts."""
    return list(VARIANTS)
