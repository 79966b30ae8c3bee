"""Options of preemption, of the watchdog and of the guards against bad steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from shards.option_help import default
from shards.ranges import Seconds, check_ranges


@dataclass(frozen=True, kw_only=True)
class PreemptConfig:
    """When to save a checkpoint and stop, so that the run can be resumed later."""

    time_limit: Annotated[
        Annotated[float, Interval(gt=0, le=1_000_000)] | None, default("none, except the end of the SLURM job")
    ] = None
    """Minutes after which the run saves a checkpoint and stops with exit status 75."""
    preempt_margin: Seconds = 120.0
    """Seconds before the end of the SLURM job at which the run saves a checkpoint and stops. It must cover the current
    step, the save and the end of all processes."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When to end a run that hangs or diverges."""

    hang_timeout: Seconds = 300.0
    """Seconds without progress after which every rank writes its stack traces and the run ends with exit status 75; 0 =
    never. It must be longer than the longest step or save. Before the first step, at least half an hour is allowed."""
    max_bad_steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 10
    """End the run after this many consecutive steps with gradients that are not finite. Each such step is skipped."""
    compare_every: Annotated[int, Interval(ge=0, le=10**12)] = 500
    """Optimizer steps between two checks that the weights are identical on all ranks; 0 = never."""

    def __post_init__(self) -> None:
        check_ranges(self)
