"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from shards.option_help import default
from shards.ranges import Decay, check_ranges

Variant = Literal["b0", "b1", "b2", "b3"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model, initial weights and number of classes."""

    variant: Variant = "b0"
    """FAT variant. Parameters of b0, b1, b2, b3: 4.5, 7.8, 13.5, 29.2 million; ImageNet top-1 accuracy in the paper:
    77.6, 80.1, 81.9, 83.6 %."""
    drop_path: Annotated[Decay | None, default("the paper's value for the variant")] = None
    """Drop-path rate (stochastic depth) of the last block. It rises linearly from 0 at the first block."""
    weights: Annotated[Path | None, default("random initialization")] = None
    """Weights file to start from, for fine-tuning: safetensors, or a checkpoint of the released FAT code. The
    classifier is kept if its classes are those of the data set."""
    classes: Annotated[Annotated[int, Interval(ge=1, le=1_000_000)] | None, default("those of the data set")] = None
    """Number of outputs of the classifier, at least the number of classes of the data set. With --weights that have
    another number, the classifier is initialized anew."""
    freeze_bn: bool = False
    """Normalize with BatchNorm's running statistics and do not update them. Use it for fine-tuning with small
    batches."""

    def __post_init__(self) -> None:
        check_ranges(self)
