"""Several tasks without a launcher are rejected at the start; a single process is accepted however it was started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.machine.launcher_check import check_launcher
from shards.errors import UserError
from tests.support.launching import ROOT, python_path

# Variables that SLURM 22.05 sets for a job, and for a step of the job.
BATCH = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2"}
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("case", "environment", "found"),
    [
        ("no cluster", {}, ""),
        ("the batch script of a job with several tasks", BATCH, ""),
        ("a shell started by salloc", {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8"}, ""),
        ("an interactive step in a job with several tasks", STEP | {"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ("a step with one task", STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ("the first of two tasks", STEP, "SLURM_STEP_NUM_TASKS=2"),
        ("the second of two tasks", STEP | {"SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS=2"),
        ("a task without variables of its step", BATCH | {"SLURM_PROCID": "1"}, "SLURM_PROCID=1"),
        ("two tasks under a launcher", STEP | LAUNCHED, ""),
        ("a task that is a separate run", STEP | {"WORLD_SIZE": "1"}, ""),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4"),
        ("mpirun with one process", {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, ""),
        ("mpiexec of MPICH", {"PMI_SIZE": "3", "PMI_RANK": "2"}, "PMI_SIZE=3"),
        ("mpirun under a launcher", {"OMPI_COMM_WORLD_SIZE": "4"} | LAUNCHED, ""),
        ("values that are not numbers", {"SLURM_STEP_NUM_TASKS": "(null)", "PMI_SIZE": ""}, ""),
    ],
)
def test_several_processes_without_a_launcher_are_rejected(case: str, environment: dict[str, str], found: str) -> None:
    if not found:
        check_launcher(environment)
        return
    with pytest.raises(UserError) as raised:
        check_launcher(environment)
    assert f"({found})" in str(raised.value), case
    assert "accelerate launch" in str(raised.value)


@pytest.mark.parametrize("script", ["train", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_tasks_are_rejected_before_files_are_created(script: str, digits: Path, tmp_path: Path) -> None:
    arguments = {"train": ["--out", str(tmp_path / "run")], "evaluate": [str(tmp_path / "w.safetensors")]}
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments[script], "--data", str(digits)]
    done = subprocess.run(
        command, env=env | STEP | {"PYTHONPATH": python_path()}, capture_output=True, text=True, check=False
    )
    *phases, last = done.stderr.splitlines()
    assert (done.returncode, len(phases)) == (2, script == "train"), done.stderr
    assert last.startswith("error: srun started several tasks (SLURM_STEP_NUM_TASKS=2)")
    assert not (tmp_path / "run").exists()
