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
# Learning rates of the first and the last step in the released code, as fractions of the peak.
WARMUP_LR, MIN_LR = 1e-3, 1e-2
# The paper's length of training and warm-up, in epochs.
PAPER_EPOCHS, PAPER_WARMUP = 300, 20.0
# Default length of other warm-ups, as a fraction of all epochs; at most that of the paper.
WARMUP_FRACTION = 0.05
# Longest recommended warm-up with cosine-from-start, as a fraction of all epochs. The cosine begins at step 0, so the
# learning rate drops when warm-up ends: by 2.5 % after a warm-up of this length, and by more after a longer one.
MAX_WARMUP_FRACTION = 0.1

OptimizerName = Literal["adamw", "sgd", "lamb"]
Schedule = Literal["cosine", "cosine-from-start", "linear", "wsd", "constant"]
Loss = Literal["cross-entropy", "bce"]
Rate = Annotated[float, Interval(ge=0, le=100)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning-rate schedule, loss and moving average of the weights."""

    optimizer: OptimizerName = "adamw"
    """Optimizer. adamw = AdamW (arXiv 1711.05101), as in the paper; sgd = SGD with momentum; lamb = LAMB (arXiv
    1904.00962), AdamW with a learning rate per weight tensor, for large batches; it does not support ZeRO. It cannot
    change when a run is resumed."""
    epochs: Annotated[int, Interval(ge=1, le=1_000_000)] = 300
    """Epochs, that is, passes over the training split. The learning-rate schedule spans all of them. More epochs extend
    a run, even a finished one: the schedule is then that of the new number of epochs."""
    lr: Annotated[Rate | None, default("5e-4 x global batch / 512")] = None
    """Peak learning rate, which is reached when warm-up ends."""
    schedule: Annotated[
        Schedule | None, default("cosine-from-start for 300 epochs with 20 of warm-up, as in the paper, else cosine")
    ] = None
    """Learning rate after warm-up. cosine, linear = falls from --lr to --min-lr; wsd = stays at --lr, then falls to
    --min-lr in the last steps (warm-up, stable, decay: MiniCPM, arXiv 2404.06395), by 1 - sqrt (arXiv 2405.18392);
    constant = stays at --lr; cosine-from-start = the cosine of the released code, which begins at step 0, so that the
    rate drops when warm-up ends: by 1.1 % after 20 of 300 epochs."""
    decay_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """Fraction of all steps in which --schedule wsd lowers the learning rate."""
    warmup_lr: Annotated[Rate | None, default("a thousandth of --lr")] = None
    """Learning rate of the first step, from which warm-up rises."""
    min_lr: Annotated[Rate | None, default("a hundredth of --lr")] = None
    """Learning rate at the end of training."""
    warmup_epochs: Annotated[
        Annotated[float, Interval(ge=0, le=1_000_000)] | None,
        default("5 % of --epochs, at most 20; with cosine-from-start a fifteenth, at most 20"),
    ] = None
    """Epochs of linear warm-up. Use more for large global batches."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Layer-wise learning-rate decay for fine-tuning, such as 0.75: each layer's learning rate is that of the next
    layer times this factor. Layers are the stem, every block, and the head, whose factor is 1 (as in BEiT, arXiv
    2106.08254)."""
    head_lr_scale: Annotated[float, Interval(gt=0, le=10_000)] = 1.0
    """Factor of the classifier's learning rate, such as 10 for fine-tuning with a newly initialized classifier."""
    weight_decay: Rate = 0.05
    """Weight decay. It is not applied to biases and other 1-D parameters. Decoupled with adamw; with sgd it is added to
    the gradient (L2), where 1e-4 to 5e-5 is common."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the first and second moment of adamw and lamb."""
    eps: Annotated[float, Interval(gt=0, le=1)] = 1e-8
    """Epsilon of adamw and lamb, added to the denominator for numerical stability."""
    momentum: Decay = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov momentum in sgd."""
    clip_grad: Annotated[float, Interval(ge=0, le=10**9)] = 5.0
    """Maximum global norm of the gradients; larger gradients are scaled down. 0 turns clipping off."""
    loss: Loss = "cross-entropy"
    """Training loss. bce = binary cross-entropy of every class, averaged over classes (ResNet strikes back, arXiv
    2110.00476). Evaluations always report the cross-entropy."""
    bce_target_threshold: Annotated[Decay | None, default("targets are not rounded")] = None
    """With --loss bce, round targets above this value up to 1 and others down to 0, so that a mixed image has both of
    its classes. ResNet strikes back uses 0.2."""
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
        if self.resolved_schedule == "wsd" and self.warmup > (1 - self.decay_fraction) * self.epochs:
            raise RecipeError(
                f"--decay-fraction {self.decay_fraction:g}: with {self.warmup:g} of {self.epochs} epochs of warm-up, "
                f"at most {1 - self.warmup / self.epochs:.3g} is left for the decay"
            )
        if self.bce_target_threshold is not None and self.loss != "bce":
            raise RecipeError(f"--bce-target-threshold: --loss is {self.loss}; add --loss bce, or omit the option")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise RecipeError("--nesterov: requires --optimizer sgd with a --momentum above 0")

    @property
    def resolved_schedule(self) -> Schedule:
        """`schedule`, or its default."""
        if self.schedule is not None:
            return self.schedule
        paper = self.epochs == PAPER_EPOCHS and self.warmup_epochs in (None, PAPER_WARMUP)
        return "cosine-from-start" if paper else "cosine"

    @property
    def warmup(self) -> float:
        """Epochs of warm-up: `warmup_epochs`, or its default."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        if self.resolved_schedule == "cosine-from-start":
            return min(PAPER_WARMUP, self.epochs * PAPER_WARMUP / PAPER_EPOCHS)
        return min(PAPER_WARMUP, self.epochs * WARMUP_FRACTION)

    @property
    def max_warmup(self) -> float:
        """Longest recommended warm-up in epochs; with cosine-from-start, the rate drops by 2.5 % after it."""
        return self.epochs * MAX_WARMUP_FRACTION

    def rates(self, global_batch: int) -> tuple[float, float, float]:
        """Return the first, the peak and the last learning rate.

        Raises:
            RecipeError: the first or the last one is larger than the peak.
        """
        peak = 5e-4 * global_batch / LR_REFERENCE_BATCH if self.lr is None else self.lr
        first = WARMUP_LR * peak if self.warmup_lr is None else self.warmup_lr
        last = MIN_LR * peak if self.min_lr is None else self.min_lr
        for option, rate in (("--warmup-lr", first), ("--min-lr", last)):
            if rate > peak:
                raise RecipeError(f"{option} {rate:g}: larger than the peak learning rate (--lr), which is {peak:g}")
        return first, peak, last
