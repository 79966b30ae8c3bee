"""What ends or saves a run: preemption, the watchdog and guards against bad steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from shards.option_help import default
from shards.ranges import Seconds, check_ranges


@dataclass(frozen=True, kw_only=True)
class PreemptConfig:
    """When to save and leave."""

    time_limit: Annotated[
        Annotated[float, Interval(gt=0, le=1_000_000)] | None, default("the SLURM job's end, where there is one")
    ] = None
    """Minutes after which to save and leave with status 75."""
    preempt_margin: Seconds = 120.0
    """Seconds before the SLURM job's end at which to save and leave: what a save and the processes' end take."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When to end a run that does not progress or diverges."""

    hang_timeout: Seconds = 300.0
    """Seconds without progress after which the stacks of all ranks are written and the run ends; 0 = never. Longer than
    the longest step or save. Before the first step, at least half an hour is allowed."""
    max_bad_steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 10
    """Give up after this many steps in a row whose gradients are not finite (each is skipped)."""
    compare_every: Annotated[int, Interval(ge=0, le=10**12)] = 500
    """Optimizer steps between two checks that all ranks hold the same weights; 0 = never."""

    def __post_init__(self) -> None:
        check_ranges(self)
