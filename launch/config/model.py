"""Which model is trained."""

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
    """The model."""

    variant: Variant = "b0"
    """FAT variant. Million parameters: 4.5, 7.8, 13.5, 29.2; top-1 in the paper: 77.6, 80.1, 81.9, 83.6 %."""
    drop_path: Annotated[Decay | None, default("the variant's own")] = None
    """Stochastic depth of the last block, rising linearly from 0 at the first."""
    weights: Annotated[Path | None, default("random initialization")] = None
    """Start from these weights (safetensors, or the released layout): fine-tuning."""
    classes: Annotated[Annotated[int, Interval(ge=1, le=1_000_000)] | None, default("those of the data set")] = None
    """Number of classes. With --weights of another number, the head is initialized afresh."""
    freeze_bn: bool = False
    """BatchNorm uses and keeps its running statistics (fine-tuning with small batches)."""

    def __post_init__(self) -> None:
        check_ranges(self)
