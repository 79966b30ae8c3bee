"""Options of the optimizer, its learning-rate schedule and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from launch.config.errors import RecipeError
from shards.option_help import default
from shards.ranges import Decay, check_ranges

# The released code gives its learning rates for a batch size of 512 and scales them linearly.
LR_REFERENCE_BATCH = 512
DEFAULT_WARMUP = 20.0
# Longest recommended warm-up, as a fraction of all epochs. The cosine begins at step 0, so the learning rate drops when
# warm-up ends: by 2.5 % after a warm-up of this length, and by more after a longer one.
MAX_WARMUP_FRACTION = 0.1

OptimizerName = Literal["adamw"]
Rate = Annotated[float, Interval(ge=0, le=100)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning-rate schedule, loss and moving average of the weights."""

    optimizer: OptimizerName = "adamw"
    """Optimizer. AdamW is the only one at present."""
    epochs: Annotated[int, Interval(ge=1, le=1_000_000)] = 300
    """Epochs, that is, passes over the training split. The learning-rate schedule spans all of them. It cannot change
    when a run is resumed."""
    lr: Annotated[Rate | None, default("5e-4 x global batch / 512")] = None
    """Peak learning rate: warm-up rises to it, and the cosine schedule starts from it."""
    warmup_lr: Annotated[Rate | None, default("5e-7 x global batch / 512")] = None
    """Learning rate of the first step, from which warm-up rises."""
    min_lr: Annotated[Rate | None, default("5e-6 x global batch / 512")] = None
    """Learning rate at the end of training."""
    warmup_epochs: Annotated[
        Annotated[float, Interval(ge=0, le=1_000_000)] | None, default("20, but at most a tenth of --epochs")
    ] = None
    """Epochs of linear warm-up. Use more for large global batches."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay. It is not applied to biases and other 1-D parameters."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Interval(gt=0, le=1)] = 1e-8
    """AdamW's epsilon, added to the denominator for numerical stability."""
    clip_grad: Annotated[float, Interval(ge=0, le=10**9)] = 5.0
    """Maximum global norm of the gradients; larger gradients are scaled down. 0 turns clipping off."""
    label_smoothing: Decay = 0.1
    """Label smoothing: fraction of the target probability that is spread evenly over all classes."""
    ema: Decay = 0.0
    """Decay per step of the EMA, a moving average of the weights, such as 0.9999; 0 = no EMA. It is evaluated and
    exported in addition to the weights. In step t the decay is at most (1 + t) / (10 + t), so that the EMA of a short
    run does not contain its random initialization."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.warmup >= self.epochs:
            raise RecipeError(
                f"--warmup-epochs {self.warmup:g}: must be less than --epochs {self.epochs}; use at most "
                f"{self.max_warmup:g}, or omit the option"
            )

    @property
    def warmup(self) -> float:
        """Epochs of warm-up: `warmup_epochs`, or its default."""
        return min(DEFAULT_WARMUP, self.max_warmup) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def max_warmup(self) -> float:
        """Longest recommended warm-up in epochs: the learning rate drops by at most 2.5 % when it ends."""
        return self.epochs * MAX_WARMUP_FRACTION

    def rates(self, global_batch: int) -> tuple[float, float, float]:
        """Return the first, the peak and the last learning rate."""
        scale = global_batch / LR_REFERENCE_BATCH
        return (
            5e-7 * scale if self.warmup_lr is None else self.warmup_lr,
            5e-4 * scale if self.lr is None else self.lr,
            5e-6 * scale if self.min_lr is None else self.min_lr,
        )
