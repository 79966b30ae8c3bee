"""Runs on a SLURM cluster: preemption, time limits, crashes and node failures."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import Job, start_job, uninterrupted
from tests.support.runs import ranks_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("no_orphans")]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status").read_text())


def steps_of(job: Job, start: int) -> list[int]:
    """Return the steps that rank 0 ran in a start."""
    return [entry["step"] for entry in job.fed() if entry["start"] == start and entry["rank"] == 0]


def test_a_preempted_run_with_zero_on_two_nodes_resumes_with_the_next_batch(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    options = ("--data", digits, "--zero", "1", "--stop-after", "24", "--check-nodes")
    job = start_job(cluster, tmp_path / "run", "--nodes", "2", options=options, PACE="0.5")
    job.wait_for_step(4)
    cluster.run("scancel", "--signal=USR2", "--batch", str(job.number))
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log
    ended = status(job.run)
    assert (ended["status"], ended["step"], ended["reason"]) == ("finished", 24, "")
    assert "DeepSpeed ZeRO-1" in job.log
    assert len(json.loads((job.run / "doctor.json").read_text())["ranks"]) == 2  # both nodes were measured

    for start in (0, 1):
        entries = [entry for entry in job.fed() if entry["start"] == start]
        assert {(e["rank"], e["node_id"], e["node"]) for e in entries} == {(0, "0", "n0"), (1, "1", "n1")}
        assert {e["rendezvous"] for e in entries} == {f"127.0.0.1:{10000 + job.number}"}
        assert {tuple(e["threads"]) for e in entries} == {(1, 1, 1)}  # the node's mask has one core
    stopped_at = len(steps_of(job, 0))
    assert 4 < stopped_at < 24
    assert steps_of(job, 0) + steps_of(job, 1) == list(range(24))  # no step is repeated or missing
    assert job.batches() == uninterrupted(digits, 24)


def test_a_crashing_run_is_restarted_only_so_often(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--zero", "0", "--stop-after", "4")
    job = start_job(cluster, tmp_path / "run", "--nodes", "1", "--restarts", "1", options=options, CRASH_AT="2")
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), job.log
    assert steps_of(job, 0) == steps_of(job, 1) == [0, 1, 2]
    assert "restarting in the allocation: crashed (status failed, srun returned 1)" in job.log
    assert status(job.run)["status"] == "failed"
    assert "injected fault" in status(job.run)["reason"]
    assert f"job {job.number}, start 1: error: crashed" in job.log
    assert "giving up after 1 restarts without a new checkpoint (last: none)" in job.log


@pytest.mark.slow
def test_a_second_failure_without_a_checkpoint_gets_new_nodes(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--zero", "0", "--stop-after", "4")
    job = start_job(cluster, tmp_path / "run", "--nodes", "1", "--restarts", "2", options=options, CRASH_AT="2")
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), job.log
    assert [steps_of(job, start) for start in range(4)] == [[0, 1, 2]] * 3 + [[]]
    assert job.log.count("restarting in the allocation") == 1
    assert job.log.count("requeueing: ") == 1


@pytest.mark.slow
def test_a_run_that_fails_after_a_request_to_stop_is_requeued(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--zero", "0", "--stop-after", "8")
    job = start_job(cluster, tmp_path / "run", "--nodes", "1", options=options, PACE="0.5", CRASH_ON_STOP="1")
    job.wait_for_step(1)
    cluster.run("scancel", "--signal=USR2", "--batch", str(job.number))
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log
    assert "requeueing: crashed" in job.log
    assert "restarting in the allocation" not in job.log


def test_a_killed_rank_is_replaced_without_a_requeue(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    (tmp_path / "memory").mkdir()
    local = ("--local-checkpoint-every", "3", "--local-checkpoint-dir", tmp_path / "memory")
    options = ("--data", digits, "--zero", "1", "--stop-after", "13", *local)
    job = start_job(cluster, tmp_path / "run", "--nodes", "2", options=options, PACE="0.5")
    job.wait_for_step(10)  # the local checkpoint of step 6 was complete before that of step 9 was begun
    (killed,) = (pid for pid in ranks_of(job.run) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(killed, signal.SIGKILL)
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.log
    assert steps_of(job, 1)[0] in (6, 9)  # from a local checkpoint: the run folder has that of step 3 only
    assert job.batches() == uninterrupted(digits, 13)


@pytest.mark.slow
def test_a_run_stops_before_its_time_limit_and_loses_no_batch(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    # SLURM's warning signal is one without effect, so that the run's own deadline stops it.
    limit = ("--nodes", "1", "--time", "1", "--warn-seconds", "1", "--sbatch=--signal=B:URG@1")
    options = ("--data", digits, "--zero", "0", "--stop-after", "80", "--preempt-margin", "15")
    job = start_job(cluster, tmp_path / "run", *limit, options=options, PACE="0.5")
    ended = job.end()
    assert ended["JobState"] == "COMPLETED", job.log
    starts = range(int(ended["Restarts"]) + 1)
    assert len(starts) > 1
    assert "saved and stopping: the deadline" in job.log
    assert [step for start in starts for step in steps_of(job, start)] == list(range(80))
    assert job.batches() == uninterrupted(digits, 80)


def test_after_a_node_failure_the_run_continues_without_the_node(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    options = ("--data", digits, "--zero", "1", "--save-every", "3", "--stop-after", "20")
    job = start_job(cluster, tmp_path / "run", "--nodes", "1-2", options=options, PACE="0.5")
    job.wait_for_step(7)
    cluster.kill_node("n1")
    try:
        wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", "requeue", seconds=60)
        ended = job.end()
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log
    finally:
        cluster.start_node("n1")
    assert {entry["world"] for entry in job.fed() if entry["start"] == 0} == {2}
    assert {(entry["world"], entry["node"]) for entry in job.fed() if entry["start"] == 1} == {(1, "n0")}
    assert steps_of(job, 1)[0] % 3 == 0  # the last checkpoint
    assert steps_of(job, 1)[0] > 0
    assert job.batches() == uninterrupted(digits, 20)


@pytest.mark.slow
def test_a_cancelled_run_saves_and_is_not_requeued(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--zero", "0", "--stop-after", "500")
    job = start_job(cluster, tmp_path / "run", "--nodes", "1", options=options, PACE="0.5")
    job.wait_for_step(1)
    cluster.run("scancel", str(job.number))
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.log
    cluster.wait_for_silence()
    assert status(job.run)["status"] == "preempted"
    assert list((job.run / "checkpoints").glob("step-*"))
    assert cluster.job(job.number)["JobState"] == "CANCELLED"
