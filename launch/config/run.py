"""The run folder: checkpoints, metrics, and how long a run lasts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from launch.config.errors import RecipeError
from launch.machine.network import START_TIMEOUT
from shards.option_help import default
from shards.ranges import Seconds, Seed, Steps, check_ranges

# The ranks that wait for the one that waits for the run folder's lock end with a timeout that names no lock.
LONGEST_LOCK_WAIT = (START_TIMEOUT - timedelta(minutes=1)).total_seconds()
# The watchdog's last resort ends a stuck trainer a minute after the hang timeout.
BEYOND_HANG = 120.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run as a whole."""

    out: Path = Path("runs/fat")
    """Run folder: recipe, metrics, checkpoints, curves."""
    seed: Seed = 0
    """Seed of everything random."""
    stop_after: Annotated[Steps | None, default("train to the end")] = None
    """End after this many optimizer steps (the schedule still spans all epochs)."""
    eval_every: Annotated[int, Interval(ge=1, le=1_000_000)] = 1
    """Evaluate and write a checkpoint every N epochs, and at the end."""
    dry_run: bool = False
    """Show what the run would be (steps, rates, memory, checkpoint size) and touch nothing."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints and resuming."""

    resume: Literal["auto", "never"] = "auto"
    """auto = resume from the newest checkpoint of the run folder, if there is one."""
    save_every: Annotated[Steps | None, default("at evaluations only")] = None
    """Write a checkpoint every N optimizer steps too."""
    keep: Annotated[int, Interval(ge=1, le=1_000_000)] = 3
    """Checkpoints to keep, besides the best."""
    lock_wait: Annotated[Seconds | None, default("--hang-timeout and two minutes, at most 29 minutes")] = None
    """Seconds to wait for an earlier trainer that still holds the run folder: it may be saving or stuck, and the lock
    of a dead host takes a minute or more to expire."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.lock_wait is not None and self.lock_wait > LONGEST_LOCK_WAIT:
            raise RecipeError(
                f"--lock-wait {self.lock_wait:g}: at most {LONGEST_LOCK_WAIT:g}, as the other ranks of a start wait no "
                "longer than half an hour for the first"
            )

    def lock_seconds(self, hang_timeout: float) -> float:
        """Seconds to wait for the run folder's lock, with the default filled in."""
        if self.lock_wait is not None:
            return self.lock_wait
        return min(hang_timeout + BEYOND_HANG, LONGEST_LOCK_WAIT)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics."""

    log_every: Annotated[int, Interval(ge=1, le=100_000)] = 10
    """Optimizer steps between two lines of metrics. Losses of all of them are kept on the device until then."""
    tracker: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these. wandb: project $WANDB_PROJECT, else fat-pipeline; WANDB_MODE=offline needs no server."""

    def __post_init__(self) -> None:
        check_ranges(self)
