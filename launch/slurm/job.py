"""A SLURM job of a training run: its options, and the world sizes that the global batch allows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Interval

from launch.config.recipe import Recipe
from pipeline.batch_shape import BatchShape, PlanError, divisors
from shards.errors import UserError
from shards.ranges import check_ranges

ROOT = Path(__file__).resolve().parents[2]
MAX_NODES = 10_000
# As sbatch has them: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
TIME = re.compile(r"\d{1,9}(:\d{1,2}){0,2}|\d{1,5}-\d{1,2}(:\d{1,2}){0,2}|unlimited|infinite", re.ASCII | re.IGNORECASE)


class SubmitError(UserError):
    """A job that cannot be submitted as asked."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submit a training run to SLURM. What stands after `--` goes to launch/train.py (its --help lists it)."""

    nodes: str = "1"
    """N, or MIN-MAX: each start takes what is free between them, as far as the global batch can be dealt out to it."""
    gpus_per_node: Annotated[int, Interval(ge=0, le=1024)] = 8
    """GPUs, and processes, per node; 0 = a cluster without GPUs, see --processes-per-node."""
    processes_per_node: Annotated[int, Interval(ge=1, le=1024)] | None = None
    """Processes per node. None = one per GPU."""
    partition: str | None = None
    """SLURM's partition."""
    time: str | None = None
    """Time limit of one start, such as 24:00:00. At its end the run saves and goes back into the queue."""
    account: str | None = None
    """SLURM's account."""
    cpus_per_node: Annotated[int, Interval(ge=1, le=65535)] | None = None
    """Cores per node. None = whole nodes (--exclusive), with all their cores and memory."""
    name: str | None = None
    """Name of the job. None = the run folder's."""
    container: str | None = None
    """Image that holds Python and all libraries: a .sif file (Apptainer), or what Pyxis takes."""
    mount: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folders (FROM or FROM:TO) to see in the container, besides the project, the run folder and the data."""
    python: str | None = None
    """Python on the nodes. None = this one, or python3 in a container."""
    script: Path = ROOT / "launch" / "train.py"
    """What each process runs."""
    setup: str = ""
    """Shell line run first on each node, such as 'module load cuda'. It is kept in the script: no passwords."""
    restarts: Annotated[int, Interval(ge=0, le=1_000_000)] = 3
    """Starts after a crash or stall that brings no new checkpoint, before the job ends."""
    warn_seconds: Annotated[int, Interval(ge=0, le=65535)] = 180
    """Seconds before the time limit at which SLURM warns the job, which then saves and leaves."""
    sbatch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """More options of sbatch, such as --sbatch=--qos=high --sbatch=--constraint=h100."""
    dry_run: bool = False
    """Show the script; write and submit nothing."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})?", self.nodes, re.ASCII) or not (
            self.bounds[0] <= self.bounds[1] <= MAX_NODES
        ):
            raise SubmitError(
                f"--nodes {self.nodes}: a number as in 4, or MIN-MAX as in 2-8, up to {MAX_NODES:,} expected"
            )
        if self.processes < 1:
            raise SubmitError(
                f"--gpus-per-node {self.gpus_per_node}, --processes-per-node {self.processes_per_node}: "
                "at least one process per node expected"
            )
        if self.time and not TIME.fullmatch(self.time):
            raise SubmitError(f"--time {self.time}: a time as sbatch has it, such as 24:00:00 or 2-12, expected")

    @property
    def bounds(self) -> tuple[int, int]:
        """(fewest, most) nodes."""
        first, _, last = self.nodes.partition("-")
        return int(first), int(last or first)

    @property
    def processes(self) -> int:
        """Per node."""
        return self.gpus_per_node if self.processes_per_node is None else self.processes_per_node


def fits(recipe: Recipe, job: Submit) -> list[tuple[int, int, int]]:
    """For each number of nodes that may be given, find the largest world size on them that the global batch allows.

    Returns:
        (nodes given, nodes used, processes per node): as few nodes as hold the world, which means less traffic.

    Raises:
        SubmitError: a fixed number of nodes does not fit; the message names what would. Or not even one process does.
    """
    low, high = job.bounds
    if error := _obstacle(recipe, high * job.processes if low == high else 1):
        raise SubmitError(f"--nodes {job.nodes} x {job.processes} processes: {error}")
    possible = []
    for world in reversed(divisors(recipe.data.global_batch)):
        used = next(nodes for nodes in divisors(world) if world // nodes <= job.processes)
        if used <= high and not _obstacle(recipe, world):
            possible.append((used, world // used))
    largest = [next(fit for fit in possible if fit[0] <= given) for given in range(low, high + 1)]
    return [(given, *fit) for given, fit in enumerate(largest, start=low)]


def _obstacle(recipe: Recipe, world: int) -> PlanError | None:
    """Return why the global batch cannot be dealt out to so many processes; None if it can."""
    data = recipe.data
    pairs = data.augmentation().mixes
    try:
        BatchShape(global_batch=data.global_batch, world=world, micro_batch=data.micro_batch, pairs=pairs)
    except PlanError as error:
        return error
    return None
