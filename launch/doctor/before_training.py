"""The short form of `pipeline doctor` before the first step of a run on several nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from launch.config.recipe import Recipe
from launch.doctor.findings import exclude_option, find, hosts_to_exclude
from launch.doctor.json_file import to_json
from launch.doctor.measure import BRIEF, measure
from launch.doctor.thresholds import Thresholds
from launch.machine.world import World
from shards.errors import first_line
from shards.files.durable import durable_write

DOCTOR_NAME = "doctor.json"
REPORTED_BEFORE = frozenset({"cores-per-gpu"})
"""Kinds of findings that the preflight check has already reported."""


def check_nodes(recipe: Recipe, world: World, phase: Callable[[str], object]) -> list[str]:
    """Measure the nodes for at most about 20 s, and return warnings. Collective.

    The measurements are written to RUN/doctor.json. Errors are returned as warnings: a run whose nodes cannot be
    measured starts nevertheless.

    Args:
        phase: called with the name of each measurement.
    """
    if not recipe.parallel.check_nodes or world.local_size == world.size:
        return []
    location, limits = recipe.data.location(), Thresholds()
    # Reading a remote set would fetch shards twice.
    data = location if isinstance(location, Path) else None
    try:
        report = measure(
            world,
            data,
            cores=world.cores * world.local_size,
            durations=BRIEF,
            phase=lambda name: phase(f"measuring the nodes: {name}"),
        )
        findings = [finding for finding in find(report, limits) if finding.kind not in REPORTED_BEFORE]
        exclude = hosts_to_exclude(findings, report)
        if world.is_main:
            content = to_json(report, findings, exclude, limits)
            durable_write(recipe.run.out / DOCTOR_NAME, (json.dumps(content, indent=1) + "\n").encode())
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        return [f"warning: the nodes were not measured before the training ({reason}); try 'pipeline doctor'"]
    lines = [f"warning: {finding.message}" for finding in findings]
    if exclude:
        lines.append(f"warning: option of launch.submit that excludes these nodes: --sbatch={exclude_option(exclude)}")
    return lines
