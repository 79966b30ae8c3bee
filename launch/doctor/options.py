"""`pipeline doctor`: its options, and the start of its processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from launch.doctor.thresholds import Thresholds
from launch.machine.rank_errors import is_rank0
from launch.machine.slurm_tasks import adopt_slurm_task
from launch.start.processes import ProcessCount, default_processes, run_processes
from shards.files.output import check_output
from shards.option_help import default
from shards.ranges import check_ranges

RANK = Path(__file__).with_name("rank.py")


@dataclass(frozen=True)
class Doctor:
    """Find slow and misconfigured hosts before a long run, in less than a minute.

    Measures every GPU, host and connection, and compares them. Exit status 1 if a problem is found. On several hosts,
    start it as one process per GPU with srun, torchrun or 'accelerate launch --no_python':
    srun --nodes 4 --ntasks-per-node 8 .venv/bin/pipeline doctor SET
    """

    dataset: tyro.conf.Positional[
        Annotated[str | None, tyro.conf.arg(metavar="[SET]"), default("measure no storage")]
    ] = None
    """Shard set whose shards are read and decoded: a folder or a URL."""
    processes: ProcessCount = None
    """Number of processes on this machine, if no launcher has started them."""
    json: Annotated[Path | None, default("not written")] = None
    """JSON file to write, with all measurements and findings; - writes it to standard output instead of the tables."""
    limits: Thresholds = field(default_factory=Thresholds)
    """Limits beyond which something is reported."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self, args: list[str]) -> int:
        """Measure as one rank of a launcher, or start the ranks of this machine.

        Args:
            args: arguments of this command, for the processes that are started.
        """
        adopt_slurm_task(os.environ)
        if self.json is not None and is_rank0():  # on other hosts, the folder need not exist
            check_output(self.json, "--json")
        if "WORLD_SIZE" not in os.environ and (count := self.processes or default_processes()) > 1:
            return run_processes(RANK, count, args, name="doctor")
        from launch.doctor.run import run_rank

        return run_rank(self)
