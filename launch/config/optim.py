"""The optimizer, its learning-rate schedule and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from launch.config.errors import RecipeError
from shards.option_help import default
from shards.ranges import Decay, check_ranges

# The released code's rates are given for a batch of 512 and scale linearly.
LR_REFERENCE_BATCH = 512
DEFAULT_WARMUP = 20.0
# Of all epochs. The cosine spans the whole training, so the rate falls when a long warm-up ends: by 2.5 % after this.
MOST_WARMUP = 0.1

OptimizerName = Literal["adamw"]
Rate = Annotated[float, Interval(ge=0, le=100)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule and the loss."""

    optimizer: OptimizerName = "adamw"
    """Optimizer."""
    epochs: Annotated[int, Interval(ge=1, le=1_000_000)] = 300
    """Passes over the training split."""
    lr: Annotated[Rate | None, default("5e-4 x global batch / 512")] = None
    """Where the cosine starts, and so the rate that warm-up aims at."""
    warmup_lr: Annotated[Rate | None, default("5e-7 x global batch / 512")] = None
    """Learning rate of the first step."""
    min_lr: Annotated[Rate | None, default("5e-6 x global batch / 512")] = None
    """Learning rate at the end."""
    warmup_epochs: Annotated[
        Annotated[float, Interval(ge=0, le=1_000_000)] | None, default("20, or a tenth of --epochs where that is less")
    ] = None
    """Epochs of linear warm-up."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay; 1-D parameters and biases have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: Annotated[float, Interval(gt=0, le=1)] = 1e-8
    """AdamW's epsilon."""
    clip_grad: Annotated[float, Interval(ge=0, le=10**9)] = 5.0
    """Largest gradient norm; 0 = no clipping."""
    label_smoothing: Decay = 0.1
    """Fraction of the target spread evenly over all classes."""
    ema: Decay = 0.0
    """Decay per step of a moving average of the weights, evaluated and exported beside them; 0 = none. Step t decays by
    (1 + t) / (10 + t) at most, so that the average of a short run is of weights that were trained."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.warmup >= self.epochs:
            raise RecipeError(
                f"--warmup-epochs {self.warmup:g} of --epochs {self.epochs}: warm-up must be shorter; use at most "
                f"{self.most_warmup:g}, or leave it out"
            )

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, with the default filled in."""
        return min(DEFAULT_WARMUP, self.most_warmup) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def most_warmup(self) -> float:
        """Epochs of warm-up after which the cosine has fallen by no more than 2.5 %."""
        return self.epochs * MOST_WARMUP

    def rates(self, global_batch: int) -> tuple[float, float, float]:
        """(first, peak, last) learning rate."""
        scale = global_batch / LR_REFERENCE_BATCH
        return (
            5e-7 * scale if self.warmup_lr is None else self.warmup_lr,
            5e-4 * scale if self.lr is None else self.lr,
            5e-6 * scale if self.min_lr is None else self.min_lr,
        )
