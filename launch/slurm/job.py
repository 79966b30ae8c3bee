"""Options of a training run's SLURM job, and the world sizes that its global batch allows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Interval

from launch.config.recipe import Recipe
from pipeline.batch_shape import BatchShape, PlanError, divisors
from pipeline.phases.train_phase import with_micro_batch
from shards.errors import UserError
from shards.option_help import default
from shards.ranges import check_ranges

ROOT = Path(__file__).resolve().parents[2]
MAX_NODES = 10_000
# Time formats of sbatch: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
TIME = re.compile(r"\d{1,9}(:\d{1,2}){0,2}|\d{1,5}-\d{1,2}(:\d{1,2}){0,2}|unlimited|infinite", re.ASCII | re.IGNORECASE)


class SubmitError(UserError):
    """A job cannot be submitted with these options."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submit a training run to SLURM. Options after `--` are passed to launch/train.py, whose --help lists them."""

    nodes: str = "1"
    """N, or MIN-MAX. With MIN-MAX, each start uses as many free nodes as the global batch can be divided among."""
    gpus_per_node: Annotated[int, Interval(ge=0, le=1024)] = 8
    """GPUs per node, with one process each. 0: train on CPUs; also set --processes-per-node."""
    processes_per_node: Annotated[Annotated[int, Interval(ge=1, le=1024)] | None, default("one per GPU")] = None
    """Processes per node."""
    partition: Annotated[str | None, default("the default of the cluster")] = None
    """SLURM partition."""
    time: Annotated[str | None, default("the limit of the partition")] = None
    """Time limit of one start, such as 24:00:00. Before it ends, the run saves and the job is requeued."""
    account: Annotated[str | None, default("the default of the user")] = None
    """SLURM account."""
    cpus_per_node: Annotated[
        Annotated[int, Interval(ge=1, le=65535)] | None, default("whole nodes, with all their cores and memory")
    ] = None
    """CPU cores per node."""
    name: Annotated[str | None, default("the name of the run folder")] = None
    """Name of the job."""
    container: Annotated[str | None, default("none")] = None
    """Container image with Python and all libraries: a .sif file (Apptainer), or an image name for Pyxis."""
    mount: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folders (FROM or FROM:TO) to mount in addition to the project, the run folder and the data."""
    python: Annotated[str | None, default("the current one, or python3 in a container")] = None
    """Python interpreter on the nodes."""
    script: Path = ROOT / "launch" / "train.py"
    """Script that each process runs."""
    setup: str = ""
    """Shell command to run first on each node, such as 'module load cuda'. It is stored in the script: no passwords."""
    restarts: Annotated[int, Interval(ge=0, le=1_000_000)] = 3
    """Maximum number of restarts after failures without a new checkpoint in between."""
    warn_seconds: Annotated[int, Interval(ge=0, le=65535)] = 180
    """Seconds before the time limit at which SLURM signals the job, which then saves and stops."""
    sbatch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Additional options for sbatch, such as --sbatch=--qos=high --sbatch=--constraint=h100."""
    dry_run: bool = False
    """Print the script without writing or submitting it."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})?", self.nodes, re.ASCII) or not (
            self.bounds[0] <= self.bounds[1] <= MAX_NODES
        ):
            raise SubmitError(
                f"--nodes {self.nodes}: expected a number such as 4, or a range such as 2-8, of at most "
                f"{MAX_NODES:,} nodes"
            )
        if self.processes < 1:
            raise SubmitError(
                f"--gpus-per-node {self.gpus_per_node}, --processes-per-node {self.processes_per_node}: "
                "expected at least one process per node; set --processes-per-node to train on CPUs"
            )
        if self.time and not TIME.fullmatch(self.time):
            raise SubmitError(
                f"--time {self.time}: expected a time as in sbatch, such as 24:00:00 or 2-12 (days-hours)"
            )
        if self.seconds <= self.warn_seconds:
            raise SubmitError(
                f"--time {self.time}: with --warn-seconds {self.warn_seconds}, the job would be told to stop at its "
                "start; use a longer time, or fewer --warn-seconds"
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """(minimum, maximum) number of nodes."""
        first, _, last = self.nodes.partition("-")
        return int(first), int(last or first)

    @property
    def seconds(self) -> float:
        """Time limit of one start; infinite if it is that of the partition, or if there is none."""
        return seconds_of(self.time) if self.time else math.inf

    @property
    def processes(self) -> int:
        """Number of processes per node."""
        return self.gpus_per_node if self.processes_per_node is None else self.processes_per_node


def seconds_of(time: str) -> float:
    """Return the seconds of a time that matches `TIME`; infinity if it is unlimited, which for sbatch 0 is too."""
    if not time[0].isdigit():
        return math.inf
    days, separator, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # Days are followed by hours first. Without days, a single number or the first of two is in minutes.
    units = (3600, 60, 1) if separator or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(unit * part for unit, part in zip(units, parts, strict=False)) or math.inf


def fits(recipe: Recipe, job: Submit) -> list[tuple[int, int, int]]:
    """Find the largest world size that the global batch allows, for each number of nodes that SLURM may allocate.

    Returns:
        (nodes allocated, nodes used, processes per node) for each number of allocated nodes. As few nodes as possible
        are used, to reduce network traffic.

    Raises:
        SubmitError: the global batch cannot be divided among a fixed number of nodes (the message names sizes that
            work) or, with MIN-MAX, is invalid even for a single process.
    """
    low, high = job.bounds
    if error := _obstacle(recipe, high * job.processes if low == high else 1):
        raise SubmitError(f"--nodes {job.nodes} x {job.processes} processes: {error}")
    possible = []
    for world in reversed(divisors(recipe.data.global_batch)):
        used = next(nodes for nodes in divisors(world) if world // nodes <= job.processes)
        if used <= high and not _obstacle(recipe, world):
            possible.append((used, world // used))
    largest = [next(fit for fit in possible if fit[0] <= allocated) for allocated in range(low, high + 1)]
    return [(allocated, *fit) for allocated, fit in enumerate(largest, start=low)]


def _obstacle(recipe: Recipe, world: int) -> PlanError | None:
    """Return the reason why the global batch cannot be divided among `world` processes; None if it can."""
    data = recipe.data
    pairs = data.augmentation().mixes
    try:
        shape = BatchShape(global_batch=data.global_batch, world=world, micro_batch=data.micro_batch, pairs=pairs)
        for size, rows in data.micro_batches.items():
            with_micro_batch(shape, size, rows)
    except PlanError as error:
        return error
    return None
