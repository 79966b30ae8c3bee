"""The progress of a run, which is saved in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from pydantic import Field

from pipeline.plan import Position
from shards.schema import Count

WeightsKind = Literal["weights", "average"]
"""Which weights an evaluation uses: the trained weights, or their EMA."""
WEIGHTS_KINDS: tuple[WeightsKind, ...] = get_args(WeightsKind)
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run, saved in every checkpoint."""

    step: Count = 0
    """Number of optimizer steps done."""
    epoch: Count = 0
    epoch_step: Count = 0
    """Number of steps done in `epoch`; together they are the position in the plan."""
    best: Fraction = 0.0
    """Best top-1 accuracy so far (fraction), of the weights or of their EMA."""
    best_of: WeightsKind | None = None
    """Which weights reached `best`; None: nothing has been evaluated yet."""
    is_best: bool = False
    """Whether `best` was reached at this step."""
    top1: dict[WeightsKind, Fraction] = field(default_factory=dict)
    """Top-1 accuracies at this step (fractions); empty: it has not been evaluated."""
    pending_evaluation: bool = False
    """Whether the evaluation of this step was interrupted."""
    seconds: Seconds = 0.0
    """Training time in seconds, over all starts of the run."""

    def after(self, step: int, position: Position) -> Progress:
        """Return the progress after an optimizer step.

        Args:
            step: number of optimizer steps done.
            position: position in the plan after the step.
        """
        epoch, epoch_step = position.epoch, position.step
        return replace(self, step=step, epoch=epoch, epoch_step=epoch_step, is_best=False, top1={})

    def reached(self, target: float | None) -> bool:
        """Return whether the best top-1 accuracy is at least `target` (None: there is no target)."""
        return target is not None and self.best >= target

    def evaluated(self, top1: Mapping[WeightsKind, float]) -> Progress:
        """Return the progress after an evaluation at this step."""
        found = replace(self, is_best=False, pending_evaluation=False, top1=dict(top1))
        best_of = best_weights(top1)
        return replace(found, best=top1[best_of], best_of=best_of, is_best=True) if top1[best_of] > self.best else found


def best_weights(top1: Mapping[WeightsKind, float]) -> WeightsKind:
    """Return which weights have the higher top-1 accuracy. With equal accuracies, the weights count as best."""
    return max(WEIGHTS_KINDS, key=lambda kind: top1.get(kind, -1.0))
