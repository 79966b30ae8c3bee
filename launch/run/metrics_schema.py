"""The lines of RUN/metrics.jsonl: JSON objects with `kind` and `time`. The other fields depend on `kind`.

The file is append-only: a start that repeats steps after a crash writes them again. All lines between a "start" line
and the next one belong to one start (one launch of the processes) of the run. Epochs are counted from 1, and steps are
the number of optimizer steps done. Readers must ignore fields and kinds that they do not know.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from shards.schema import Count, Finite

Seconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
UnixTime = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Line(BaseModel, strict=True):
    """Fields of every line."""

    kind: str
    """What the line describes; see below."""
    time: UnixTime
    """Unix time at which the line was written, in seconds."""
    step: Count = 0
    """Optimizer steps done."""


class Start(Line):
    """The processes have been started, and the run is ready for its first step."""

    kind: Literal["start"]
    step: Count
    """Step from which this start begins: 0, or that of the checkpoint from which the run was resumed."""
    world: Annotated[int, Field(ge=1)]
    """Number of ranks."""
    engine: str
    """Data parallelism and precision."""
    model: str
    """Name of the model, such as fat_b3 or timm/resnet50."""
    device: str
    """Name of rank 0's device."""
    host: str
    """Host of rank 0."""
    total_steps: Count
    """Step at which the run ends, unless it reaches --target-top1 before."""
    steps_per_epoch: Count
    """Number of optimizer steps per epoch."""
    epochs: Count
    """Number of epochs of the whole run."""
    global_batch: Count
    """Images per optimizer step, of all ranks."""
    started: UnixTime
    """Unix time at which rank 0's process was started."""
    restore_seconds: Seconds = 0.0
    """Time to load the checkpoint."""
    queued: UnixTime | None = None
    """Unix time since which the scheduler's job waited for this start; None: unknown, or not run by a scheduler."""
    previous_alive: UnixTime | None = None
    """Last time at which the previous start renewed RUN/status, if it was killed; None: it ended by itself."""
    previous_step: Count | None = None
    """Optimizer steps done by the previous start at `previous_alive`."""
    origin: str | None = None
    """Checkpoint that was chosen with --resume, if this start begins at it: that of another run from which this run
    branched (an absolute path), or one of this run to which it returned; None: the newest one, or none."""
    origin_digest: str | None = None
    """xxh3-64 hash of the state in `origin`."""


class RunStart(Line):
    """The clock of the run starts, before the first access to training data; in a later start, it continues.

    As in the logs of MLPerf Training, initialization and compilation before it are not timed.
    """

    kind: Literal["run_start"]
    step: Count
    clock: Seconds
    """Seconds of training so far, over all starts: 0, or those of the checkpoint."""
    target_top1: Fraction | None = None
    """Top-1 accuracy at which the run ends; None: there is no target."""


class Resolved(Line, extra="allow"):
    """Chosen values of the options that were not set: a field with the name of each option."""

    kind: Literal["resolved"]


class Train(Line):
    """The optimizer steps since the previous line of this kind, evaluation or checkpoint: one interval."""

    kind: Literal["train"]
    step: Count
    epoch: Annotated[int, Field(ge=1)]
    """Epoch of the last step."""
    lr: Finite
    """Learning rate of the last step."""
    size: Count | None = None
    """Height and width of the images of the last step, in pixels."""
    loss: Finite | None = None
    """Mean training loss over all ranks; None: the loss of every step of the interval was not finite."""
    grad_norm: Finite | None = None
    """Mean gradient norm before clipping."""
    steps: Annotated[int, Field(ge=1)]
    """Number of steps in the interval."""
    seconds: Seconds
    """Duration of the interval."""
    first_step_seconds: Seconds | None = None
    """Duration of the first step of this start, which includes compilation; None: it was not in this interval."""
    images_per_second: Finite
    """Images of all ranks per second."""
    data_wait: Fraction
    """Fraction of the interval in which rank 0's device waited for a batch."""
    compute: Fraction | None = None
    """Fraction of the interval in which rank 0 computed: the rest without `data_wait` and `communication`."""
    communication: Fraction | None = None
    """Fraction of the interval in which rank 0 waited in collectives, for the other ranks or for the transfer."""
    slowest_rank: Count | None = None
    """Rank whose own work (without waits in collectives) took longest in the last minute; None: there is one rank."""
    slowest_host: str | None = None
    """Host of that rank."""
    behind: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """By what fraction its own work took longer than that of the median of the other ranks."""
    cause: str | None = None
    """Why, if it holds the other ranks back; see [Slow ranks](slow-ranks.md)."""
    mfu: Finite | None = None
    """Model FLOPs utilization: fraction of the device's peak FLOP/s, for the image sizes of the interval's steps."""
    bandwidth: Finite | None = None
    """Fraction of the device's memory bandwidth that the model's minimum traffic corresponds to."""
    memory_bytes: Count = 0
    """Peak GPU memory that PyTorch has reserved on rank 0."""
    skipped: Count = 0
    """Updates skipped so far in this start, because gradients were not finite."""
    replaced: Count = 0
    """Damaged samples that all ranks have replaced so far in this start."""
    cache_hits: Fraction | None = None
    """Fraction of the samples that the memory cache or the GPU caches had, over all ranks; None: there is no cache."""
    cache_bytes: Count | None = None
    """Bytes of the images in the memory cache of rank 0's node, or in the cache of rank 0's GPU."""


class EpochStop(Line):
    """The steps of an epoch have been started. They are also done if an evaluation or a checkpoint follows."""

    kind: Literal["epoch_stop"]
    step: Count
    epoch: Annotated[int, Field(ge=1)]
    """Number of the epoch."""
    clock: Seconds
    """Seconds of training so far, over all starts."""


class Evaluation(Line):
    """Accuracy on the validation split: "eval" of the weights, "eval-ema" of their moving average (EMA)."""

    kind: Literal["eval", "eval-ema"]
    step: Count
    epoch: Annotated[int, Field(ge=1)]
    """Epoch of the last optimizer step before the evaluation."""
    top1: Fraction
    """Top-1 accuracy."""
    top5: Fraction
    """Top-5 accuracy."""
    loss: Finite
    """Mean loss."""
    samples: Count
    """Number of images."""
    seconds: Seconds = 0.0
    """Duration of the evaluation."""
    clock: Seconds | None = None
    """Seconds of training at the end of the evaluation, over all starts."""


class CheckpointSaved(Line):
    """A checkpoint was written, in a background thread. `step` is that of the checkpoint."""

    kind: Literal["checkpoint"]
    step: Count
    seconds: Seconds
    """Time for which training was blocked."""
    local: bool = False
    """Whether it is a local checkpoint (`--local-checkpoint-every`)."""


class RunStop(Line):
    """The clock of the run stops: the target was reached, or the last step was done and evaluated."""

    kind: Literal["run_stop"]
    step: Count
    clock: Seconds
    """Seconds of training so far, over all starts."""
    status: Literal["success", "aborted"]
    """aborted: the last step was done, but the target was not reached."""


class Stop(Line):
    """The start ended before the run was finished, after a checkpoint was saved."""

    kind: Literal["stop"]
    step: Count
    reason: str
    """What requested it: the name of a signal, a file, the deadline."""


class End(Line):
    """The run is finished."""

    kind: Literal["end"]
    step: Count
    seconds: Seconds
    """Training time over all starts."""
    best: Fraction | None
    """Best top-1 accuracy; None: nothing was evaluated."""
    best_of: Literal["weights", "average"] | None = None
    """Whether the weights or their EMA reached `best`."""


KINDS: dict[str, type[Line]] = {
    "start": Start,
    "run_start": RunStart,
    "resolved": Resolved,
    "train": Train,
    "epoch_stop": EpochStop,
    "eval": Evaluation,
    "eval-ema": Evaluation,
    "checkpoint": CheckpointSaved,
    "run_stop": RunStop,
    "stop": Stop,
    "end": End,
}
EVALUATIONS = frozenset(name for name, kind in KINDS.items() if kind is Evaluation)
