"""Where a run stands, saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Annotated, Literal, get_args

from pydantic import Field

from pipeline.plan import Position
from shards.schema import Count

Scored = Literal["weights", "average"]
"""What an evaluation is of: the weights as trained, or their moving average."""
SCORED: tuple[Scored, ...] = get_args(Scored)
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: Count = 0
    """Optimiser steps done."""
    epoch: Count = 0
    epoch_step: Count = 0
    """Position in the plan: steps done of `epoch`."""
    best: Fraction = 0.0
    """Best top-1 so far (share), of the weights or of their average."""
    best_of: Scored | None = None
    """Which of the two reached it; None = there is no best yet."""
    is_best: bool = False
    """Whether it was reached here."""
    pending_evaluation: bool = False
    """Whether the evaluation due at this step was broken off."""
    seconds: Seconds = 0.0
    """Time trained, over all restarts."""

    def after(self, step: int, position: Position) -> Progress:
        """The progress after an optimizer step.

        Args:
            step: optimizer steps done.
            position: where the plan stands then.
        """
        return replace(self, step=step, epoch=position.epoch, epoch_step=position.step, is_best=False)

    def evaluated(self, top1: Mapping[Scored, float]) -> Progress:
        """The progress after an evaluation at this step; of equally good ones, the weights are the best."""
        best_of, best = max(top1.items(), key=itemgetter(1))
        if best <= self.best:
            return replace(self, is_best=False, pending_evaluation=False)
        return replace(self, best=best, best_of=best_of, is_best=True, pending_evaluation=False)
