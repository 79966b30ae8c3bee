"""Recognize the model of a weights file by its metadata or its tensors, to explain why it does not fit another one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fat.config import STAGES, VARIANTS, FATConfig
from fat.weights.header import WeightsInfo

_BLOCK = re.compile(r"(?:stages|layers)\.([0-3])\.blocks\.(\d{1,3})\.")  # of this implementation, or the released one
_WIDTH = re.compile(r"(?:stages|layers)\.([0-3])\.blocks\.0\.cpe\.weight")
# Fields on which no tensor's shape depends, or whose difference has its own message.
_IGNORED = ("drop_path", "num_classes")


def check_model(path: Path, info: WeightsInfo, tensors: Mapping[str, Tensor], expected: FATConfig) -> None:
    """Raise a ValueError if the file is recognized as another model than the expected one.

    info: metadata of the file. If it has no config, the widths and depths are read from the tensors.
    """
    if info.config is None and info.model is not None:
        raise ValueError(f"{path}: not this model's weights, but those of {info.model}; create that model instead")
    dimensions = _dimensions(info.config) if info.config else _widths_and_depths(tensors)
    wanted = _dimensions(expected)
    differences = [
        f"{name} {value} instead of {wanted[name]}" for name, value in dimensions.items() if value != wanted[name]
    ]
    if not differences:
        return
    found, model = _variant(dimensions), _variant(wanted)
    owner, remedy = "a FAT model with other dimensions", "create the model with the dimensions of the file"
    if found is not None and found != model:
        owner = found if model is None else f"{found} (the model is {model})"
        remedy = f"use fat.create_model({found!r}), or in training --variant {found.removeprefix('fat_')}"
    raise ValueError(f"{path}: not this model's weights, but those of {owner}: {'; '.join(differences)}; {remedy}")


def _variant(dimensions: Mapping[str, Any]) -> str | None:
    """Return the name of the variant with these dimensions, for any number of input channels; None if there is none."""

    def matches(config: FATConfig) -> bool:
        return all(getattr(config, name) == value for name, value in dimensions.items() if name != "in_chans")

    return next((name for name, config in VARIANTS.items() if matches(config)), None)


def _dimensions(config: FATConfig) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(config) if field.name not in _IGNORED]
    return {name: getattr(config, name) for name in names}


def _widths_and_depths(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `widths` and `depths` of the complete FAT model that has these tensors; {} if there is no such model."""
    widths: dict[int, int] = {}
    blocks: dict[int, set[int]] = {}
    for name, tensor in tensors.items():
        if (match := _WIDTH.fullmatch(name)) and tensor.ndim:
            widths[int(match[1])] = len(tensor)
        if match := _BLOCK.match(name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    if len(widths) < STAGES or any(blocks[stage] != set(range(len(blocks[stage]))) for stage in blocks):
        return {}
    return {"widths": tuple(widths[i] for i in range(STAGES)), "depths": tuple(len(blocks[i]) for i in range(STAGES))}
