"""Options of the run folder, its checkpoints and metrics, and of the length of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from launch.config.errors import RecipeError
from launch.config.resume import ResumeOption
from launch.machine.network import START_TIMEOUT
from shards.option_help import default
from shards.ranges import Seconds, Seed, Steps, check_ranges

# Rank 0 waits for the lock while the other ranks wait for rank 0. Their timeout must not expire first, because
# its message would not mention the lock.
MAX_LOCK_WAIT = (START_TIMEOUT - timedelta(minutes=1)).total_seconds()
# Added to the hang timeout, in seconds: the watchdog kills a stuck trainer at most one minute after that timeout.
LOCK_WAIT_MARGIN = 120.0
# Every step adds up to some ten MB to the trace, and viewers hold all of it in memory.
ProfiledSteps = Annotated[int, Interval(ge=1, le=100)]
_PROJECT = re.compile(r"[^\W_][\w .-]{0,99}")  # names that every tracker accepts


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run folder, seed, length and evaluation."""

    out: Path = Path("runs/fat")
    """Run folder, to which recipe, metrics, checkpoints, weights and curves are written. With several nodes it must be
    on storage that all of them share."""
    seed: Seed = 0
    """Seed of all random numbers: initialization, order of samples, augmentation and drop path. It cannot change when a
    run is resumed."""
    stop_after: Annotated[Steps | None, default("train all epochs")] = None
    """End the run after this many optimizer steps, counted from the start of training. The learning-rate schedule still
    spans all epochs."""
    target_top1: Annotated[Annotated[float, Interval(gt=0, le=1)] | None, default("train to the last step")] = None
    """Finish the run after the first evaluation whose top-1 accuracy, of the weights or of their EMA, is at least this
    fraction, such as 0.76. The learning-rate schedule still spans all epochs."""
    eval_every: Annotated[int, Interval(ge=1, le=1_000_000)] = 1
    """Epochs between evaluations. The last step is always evaluated. A checkpoint is written after each evaluation."""
    dry_run: bool = False
    """Print steps, learning rates, estimated memory and checkpoint size of the run, then exit without writing
    anything."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving checkpoints and resuming from them."""

    resume: str = "auto"
    """auto = resume from the newest checkpoint of the run folder, if there is one; never = start from the beginning,
    and move earlier checkpoints and metrics to checkpoints-before-N in the run folder; step:N or best = return to this
    checkpoint of the run folder, and move later ones to checkpoints-before-N; a path = branch from the checkpoint in
    this folder, or from the newest one of this run folder, into a new --out. The same command resumes the run that
    results."""
    save_every: Annotated[Steps | None, default("after evaluations only")] = None
    """Optimizer steps between checkpoints, in addition to those after evaluations."""
    keep: Annotated[int, Interval(ge=1, le=1_000_000)] = 3
    """Number of newest checkpoints to keep. The best checkpoint is kept in addition."""
    local_checkpoint_every: Annotated[Steps | None, default("no local checkpoints")] = None
    """Optimizer steps between checkpoints in the memory or on a disk of rank 0's host, in addition to those in the run
    folder. After a crash or a hang, a run that restarts with rank 0 on the same host resumes from them."""
    local_checkpoint_dir: Path = Path("/dev/shm")
    """Folder of rank 0's host for --local-checkpoint-every, with space for two checkpoints. /dev/shm is memory, which
    counts toward the memory limit of a job."""
    lock_wait: Annotated[Seconds | None, default("--hang-timeout plus 120, at most 1740")] = None
    """Seconds to wait for another trainer that holds the lock of the run folder. An earlier trainer of the run may
    still be saving or hanging, and the lock of a host that crashed expires after a minute."""

    def __post_init__(self) -> None:
        check_ranges(self)
        ResumeOption.parse(self.resume)
        if self.lock_wait is not None and self.lock_wait > MAX_LOCK_WAIT:
            raise RecipeError(
                f"--lock-wait {self.lock_wait:g}: expected at most {MAX_LOCK_WAIT:g}, because the other ranks wait "
                "only 30 minutes for rank 0"
            )

    def lock_seconds(self, hang_timeout: float) -> float:
        """Return the seconds to wait for the run folder's lock: `lock_wait`, or its default."""
        if self.lock_wait is not None:
            return self.lock_wait
        return min(hang_timeout + LOCK_WAIT_MARGIN, MAX_LOCK_WAIT)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging of metrics."""

    log_every: Annotated[int, Interval(ge=1, le=100_000)] = 10
    """Optimizer steps between two log lines. Losses stay on the device until then, so that steps need not wait for the
    GPU."""
    verbose: bool = False
    """Print internals too: the chosen value of every option that was not set (metrics.jsonl always has them), and on
    CPUs the utilization of the arithmetic units (MFU)."""
    tracker: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers to log to, in addition to metrics.jsonl. Each needs the extra of its name, as in pip install
    'fat-pipeline[wandb]'."""
    tracker_project: Annotated[str | None, default("$WANDB_PROJECT, $MLFLOW_EXPERIMENT_NAME, else fat-pipeline")] = None
    """Project of the run in W&B and trackio, or its experiment in MLflow. The name of the run is that of its folder."""
    profile: Annotated[ProfiledSteps | None, default("no profile")] = None
    """Number of optimizer steps to profile, once per start, on rank 0. RUN/profile gets a timeline of operators and of
    the loader's stages, a table of the slowest operators, a snapshot of GPU memory and the slowest stage. Profiled
    steps are slower."""
    profile_from: Annotated[Steps | None, default("after 10 warm-up steps of this start")] = None
    """First optimizer step to profile, counted from 1 at the start of training."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.profile_from is not None and self.profile is None:
            raise RecipeError("--profile-from: no steps are profiled; add --profile STEPS")
        if self.tracker_project is not None and not _PROJECT.fullmatch(self.tracker_project):
            raise RecipeError(
                f"--tracker-project {self.tracker_project!r}: expected 1 to 100 letters, digits, spaces or ._- that "
                "begin with a letter or digit"
            )
