"""Conversion as an array job: its result equals that of a local conversion, even if a task is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, command_of, wait_until
from tests.support.commands import run_pipeline
from tests.support.launching import ROOT

OPTIONS = ("--shard-size", "1", "--max-side", "48")  # --max-side re-encodes, so that a task takes a while


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("no_orphans")
def test_four_tasks_with_one_of_them_killed_equal_a_local_conversion_byte_by_byte(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    source = digits.parent / "images"
    run_pipeline("shard", source, "--out", tmp_path / "local", *OPTIONS)

    tool = str(Path(sys.executable).parent / "pipeline")
    env = cluster.environment() | {"PIPELINE": tool, "SBATCH_OPTIONS": "--cpus-per-task=1"}
    script = str(ROOT / "launch" / "slurm" / "shard.sbatch")
    command = ["bash", script, "4", str(source), str(tmp_path / "set"), *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    numbers = re.search(r"\(job (\d+)\).*\(job (\d+)\)", done.stdout)
    assert numbers is not None, done.stdout

    killed: list[int] = []

    def kill_the_third() -> bool:
        for pid in cluster.processes():
            command = command_of(pid).split(b"\0")
            if b"3/4" in command and b"--part" in command and Path(command[0].decode()).name.startswith("python"):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        return bool(killed)

    wait_until(kill_the_third, "third task", seconds=120)
    last = cluster.wait_for_end(int(numbers[2]))
    logs = {path.name: path.read_text() for path in tmp_path.glob("shard-*.out")}
    assert last["JobState"] == "COMPLETED", logs
    assert "task 3 was killed (status 137)" in logs[f"shard-{numbers[1]}_3.out"]

    files = {path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*") if path.is_file()}
    assert {Path("dataset.json"), Path("train.index.npy")} < files
    for name in files:
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
