"""One rank of `pipeline doctor`: measure, and print the results of all ranks."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from launch.doctor.findings import find, hosts_to_exclude
from launch.doctor.json_file import to_json
from launch.doctor.measure import COMPLETE, JOIN_TIMEOUT, measure
from launch.doctor.measurements.input import open_input
from launch.doctor.tables import show
from launch.machine.world import broadcast_from_rank0, connect, run_command
from shards.cores import cores
from shards.errors import UserError, first_line
from shards.files.output import is_standard_output, write_output
from shards.progress import Phases
from shards.table_console import table_console

if TYPE_CHECKING:
    from launch.doctor.options import Doctor


def run_rank(command: Doctor) -> int:
    """Measure this rank; rank 0 prints the results. Return the exit status, the same on all ranks."""
    return run_command(lambda: _run(command))


def _run(command: Doctor) -> int:
    usable = cores()  # before the process is bound to the cores near its GPU
    with Phases("doctor") if os.environ.get("RANK", "0") == "0" else Silence() as progress:
        progress.begin("connecting the ranks")
        world = connect(timeout=JOIN_TIMEOUT)
        if command.dataset is not None:
            dataset = command.dataset
            broadcast_from_rank0(lambda: open_input(dataset), world)  # raises UserError on all ranks
        try:
            report = measure(world, command.dataset, cores=usable, durations=COMPLETE, phase=progress.begin)
        except RuntimeError as error:
            if world.size == 1:
                raise
            raise ConnectionFailed(
                f"host {world.host}: the ranks lost the connection to each other while they were measured "
                f"({first_line(error)}); look for the error of another rank above, or test fewer hosts at once"
            ) from error
    findings = find(report, command.limits)
    exclude = hosts_to_exclude(findings, report)
    if world.is_main:
        if command.json is not None:
            content = to_json(report, findings, exclude, command.limits)
            write_output(command.json, (json.dumps(content, indent=1) + "\n").encode(), "--json")
        if not is_standard_output(command.json):
            show(report, findings, exclude, table_console())
            sys.stdout.flush()
    return 1 if findings else 0


class ConnectionFailed(UserError):
    """The ranks could not communicate; a host or a link failed, or the process of another rank ended."""

    exit_code = 1


class Silence:
    """Shows no progress: for all ranks but rank 0."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, phase: str) -> None:
        pass
