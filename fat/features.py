"""Describe a model's feature maps and its input with the names and values that timm uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from fat.config import STAGES, FATConfig

# How images are prepared for evaluation, by default: timm's values for ImageNet, and those of this project's training.
SIZE = 224
CROP_PCT = 0.875
INTERPOLATION = "bicubic"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class FeatureInfo(list[dict[str, Any]]):
    """Description of the feature maps, one per stage, with the methods of timm's class of this name.

    The list has one entry for each stage, with the keys `num_chs`, `reduction` (the stride), `module` and `index`. The
    methods describe the selected feature maps, or those of the stages `idx`.
    """

    def __init__(self, widths: Sequence[int], out_indices: Iterable[int] = range(STAGES)) -> None:
        super().__init__(
            {"num_chs": width, "reduction": 4 << index, "module": f"stages.{index}", "index": index}
            for index, width in enumerate(widths)
        )
        self.out_indices = tuple(out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return the value of a key: a list for the selected feature maps or several stages, or one stage's value."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[index][key] for index in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Return entries of the list, reduced to some keys."""
        if isinstance(idx, int):
            return {key: self[idx][key] for key in (keys or self[idx])}
        return [self.get_dicts(keys, index) for index in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the number of channels of each feature map."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the stride of each feature map."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the name of the module that computes each feature map."""
        return self.get("module", idx)

    def from_other(self, out_indices: int | Sequence[int]) -> FeatureInfo:
        """Return a copy in which other feature maps are selected."""
        other = deepcopy(self)
        other.out_indices = tuple(stage_indices(out_indices, len(self)))
        return other


def stage_indices(indices: int | Sequence[int] | None, stages: int = STAGES, option: str = "indices") -> list[int]:
    """Return the numbers of the selected stages, in the given order.

    indices: numbers of stages, where negative ones count from the last; or n for the last n stages; None for all.
    Raises ValueError that names the option if there is no such stage.
    """
    expected = f"expected numbers of stages from 0 to {stages - 1} (-1: the last), or how many of the last stages"
    if indices is None:
        return list(range(stages))
    if isinstance(indices, int):
        if not 0 < indices <= stages:
            raise ValueError(f"{option}: {expected} (1 to {stages}), got {indices}")
        return list(range(stages - indices, stages))
    if not indices or not all(isinstance(index, int) and -stages <= index < stages for index in indices):
        raise ValueError(f"{option}: {expected}, got {indices!r}")
    return [index % stages for index in indices]


def default_cfg(config: FATConfig, *, classifier: bool = True) -> dict[str, Any]:
    """Return timm's `pretrained_cfg`: how to prepare images, and the names of the first and the last layer.

    classifier: whether the model has one. As in timm, the description of a feature extractor does not mention it.
    """
    cfg: dict[str, Any] = {
        "input_size": (config.in_chans, SIZE, SIZE),
        "min_input_size": (config.in_chans, 32, 32),
        "fixed_input_size": False,
        "interpolation": INTERPOLATION,
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
        "mean": MEAN,
        "std": STD,
        "pool_size": (SIZE // 32, SIZE // 32),
        "first_conv": "stem.convs.0.conv",
    }
    return cfg | {"num_classes": config.num_classes, "classifier": "head"} if classifier else cfg


def with_preprocessing(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `pretrained_cfg` with the image size, crop and normalization for which weights were trained.

    facts: `size`, `crop_pct`, `interpolation`, `mean` and `std`; those that are missing or None are unknown.
    """
    changes = {name: facts.get(name) for name in ("crop_pct", "interpolation", "mean", "std")}
    if size := facts.get("size"):
        changes |= {"input_size": (cfg["input_size"][0], size, size), "pool_size": (-(-size // 32),) * 2}
    return {**cfg, **{name: value for name, value in changes.items() if value is not None}}
