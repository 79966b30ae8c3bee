"""Runs on a cluster with more nodes, longer runs and further failures, in `make test-all` only."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm.script import TEMPLATE
from tests.slurm.cluster import DAEMONS, Cluster, wait_until
from tests.slurm.conftest import OPTIONS, need, start_job, uninterrupted
from tests.support.launching import ROOT, lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Cluster of four nodes."""
    need(*DAEMONS)
    with Cluster(tmp_path_factory.mktemp("large"), nodes=4) as cluster:
        yield cluster
        cluster.wait_for_silence()


@pytest.mark.parametrize("nodes", [3, 4])
def test_three_and_four_nodes(large: Cluster, tmp_path: Path, digits: Path, nodes: int) -> None:
    options = ("--data", digits, "--zero", "1", "--stop-after", "10", "--global-batch", "48")
    job = start_job(large, tmp_path / "run", "--nodes", str(nodes), options=options)
    assert job.end(600)["JobState"] == "COMPLETED", job.log
    assert {(e["rank"], e["node_id"], e["node"]) for e in job.fed()} == {(n, str(n), f"n{n}") for n in range(nodes)}
    assert job.batches() == uninterrupted(digits, 10, "--global-batch", "48")


def test_a_range_of_nodes_uses_as_many_free_nodes_as_the_global_batch_allows(
    large: Cluster, tmp_path: Path, digits: Path
) -> None:
    """A batch of 16 rows cannot be divided among three ranks, so two of the three free nodes are used."""
    blocker = large.run("sbatch", "--parsable", "--nodelist=n0", "--output=/dev/null", "--wrap", "sleep 600").stdout
    wait_until(lambda: large.job(int(blocker))["JobState"] == "RUNNING", "blocker")
    job = start_job(large, tmp_path / "run", "--nodes", "1-4", options=("--data", digits, "--stop-after", "4"))
    assert job.end(600)["JobState"] == "COMPLETED", job.log
    large.run("scancel", blocker.strip())
    assert "using 2 of 3 nodes: the largest world size that the global batch allows is 2" in job.log
    assert {e["node"] for e in job.fed()} == {"n1", "n2"}


def test_preempted_training_on_two_nodes_reaches_full_accuracy(large: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--zero", "1", "--size", "64", "--global-batch", "64", "--save-every", "40")
    job = start_job(large, tmp_path / "run", "--nodes", "2", options=options)
    job.wait_for_step(100, seconds=600)
    large.run("scancel", "--signal=USR2", "--batch", str(job.number))
    assert job.end(1500)["JobState"] == "COMPLETED", job.log
    assert lines(job.run, "eval")[-1]["top1"] >= 0.98


def test_a_run_survives_the_failure_of_the_node_of_the_batch_script(
    large: Cluster, tmp_path: Path, digits: Path
) -> None:
    """Only SLURM is left to requeue the job."""
    options = ("--data", digits, "--zero", "1", "--save-every", "3", "--stop-after", "16")
    job = start_job(large, tmp_path / "run", "--nodes", "2", options=options, PACE="0.5")
    job.wait_for_step(7)
    large.kill_node("n0")
    try:
        wait_until(lambda: large.job(job.number)["Restarts"] == "1", "requeue", seconds=60)
        assert job.end(600)["JobState"] == "COMPLETED", job.log
    finally:
        large.start_node("n0")
    assert "n0" not in {entry["node"] for entry in job.fed() if entry["start"] == 1}
    assert job.batches() == uninterrupted(digits, 16)
    wait_until(lambda: large.idle() == set(large.nodes), "idle nodes")


def test_a_stalled_run_writes_stacks_and_is_restarted(large: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--zero", "1", "--save-every", "2", "--stop-after", "12", "--hang-timeout", "30")
    job = start_job(large, tmp_path / "run", "--nodes", "2", options=options, HANG_AT="5")
    assert job.end(600)["JobState"] == "COMPLETED", job.log
    assert "restarting in the allocation: stalled (restart 1 of 3 since checkpoint step-00000004)" in job.log
    assert "in hang" in (job.run / "stacks-rank1.txt").read_text()
    assert "rank 0, 5 steps done" in (job.run / "stacks-rank0.txt").read_text()
    assert json.loads((job.run / "status").read_text())["status"] == "finished"
    assert job.batches() == uninterrupted(digits, 12)


def test_two_jobs_do_not_share_a_run_folder(large: Cluster, tmp_path: Path, digits: Path) -> None:
    options = ("--data", digits, "--stop-after", "400")
    first = start_job(large, tmp_path / "run", "--nodes", "1", options=options, PACE="0.5")
    first.wait_for_step(0)
    second = start_job(large, tmp_path / "run", "--nodes", "1", options=options)
    assert second.end()["ExitCode"] == "2:0"
    assert f"in use by job {first.number}" in second.log
    large.run("scancel", str(first.number))
    first.end()


def test_a_run_with_invalid_input_is_not_restarted(large: Cluster, tmp_path: Path, digits: Path) -> None:
    """The recipe is valid, but the set does not exist, which only the nodes can find out."""
    job = start_job(large, tmp_path / "run", "--nodes", "1", options=("--data", tmp_path / "absent"))
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), job.log


def test_the_template_can_be_edited_by_hand(large: Cluster, tmp_path: Path, digits: Path) -> None:
    """Only the options and the settings are changed."""
    run = tmp_path / "run"
    arguments = shlex.join(map(str, (*OPTIONS, "--data", digits, "--out", run, "--stop-after", "3")))
    edits = {
        "#SBATCH --gpus-per-node=8": "",
        "#SBATCH --output=slurm-%j.out": f"#SBATCH --output={tmp_path}/slurm-%j.out",
        "RUN=": f"RUN={run}",
        "PYTHON=": f"PYTHON={sys.executable}",
        "PROCESSES=": "PROCESSES=1",
        "ARGS=": f"ARGS=({arguments})",
    }
    text = TEMPLATE.read_text()
    for old, new in edits.items():
        text, count = re.subn(f"^{re.escape(old)}.*$", new, text, flags=re.MULTILINE)
        assert count == 1, old
    (tmp_path / "mine.sbatch").write_text(text)
    number = large.run("sbatch", "--parsable", f"--chdir={ROOT}", tmp_path / "mine.sbatch").stdout
    ended = large.wait_for_end(int(number), 600)
    assert ended["JobState"] == "COMPLETED", (tmp_path / f"slurm-{number.strip()}.out").read_text()
    assert [line["world"] for line in lines(run, "start")] == [2]
    assert json.loads((run / "status").read_text())["status"] == "finished"
