"""`pipeline doctor` on a SLURM cluster: started by srun, and before a training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import start_job

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("no_orphans")]


def test_srun_starts_a_rank_per_task(cluster: Cluster, tmp_path: Path, photos: Path) -> None:
    output = tmp_path / "doctor.json"
    topology = ("srun", "--nodes=2", "--ntasks-per-node=1", "--overcommit", "--kill-on-bad-exit=0")
    pipeline = Path(sys.executable).parent / "pipeline"
    command = (*topology, pipeline, "doctor", photos, "--json", output, "--min-open-files", "1000000000")
    done = cluster.run(*command, check=False, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(output.read_text())
    nodes = [(node["host"], node["cores"], node["cores_limit"]) for node in content["nodes"]]
    assert nodes == [("n0", 1, "CPU mask"), ("n1", 1, "CPU mask")]
    assert [(rank["rank"], rank["host"]) for rank in content["ranks"]] == [(0, "n0"), (1, "n1")]
    assert [pair["hosts"] for pair in content["network"]["pairs"]] == [["n0", "n1"]]
    assert [(finding["kind"], finding["hosts"]) for finding in content["findings"]] == [
        ("open-files", ["n0"]),
        ("open-files", ["n1"]),
    ]
    assert done.stdout.count("problems found") == 1  # only rank 0 prints
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_nodes_are_measured_before_the_first_step(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--zero", "0", "--stop-after", "1", "--check-nodes")
    job = start_job(cluster, tmp_path / "run", "--nodes", "2", options=options)
    assert job.end()["JobState"] == "COMPLETED", job.log
    assert "measuring the nodes: network" in job.log
    content = json.loads((job.run / "doctor.json").read_text())
    assert [node["host"] for node in content["nodes"]] == ["n0", "n1"]
    assert content["data"] == str(digits)
    assert [f"warning: {finding['message']}" for finding in content["findings"]] == [
        line.split(" ", maxsplit=2)[2] for line in job.log.splitlines() if " warning: n" in line
    ]
