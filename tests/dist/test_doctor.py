"""`pipeline doctor` on one machine: with one and several processes, and under torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.dist.forked import Launcher
from tests.support.launching import run

DOCTOR = (sys.executable, "-m", "launch.cli", "doctor")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def test_one_process_prints_tables_without_control_codes(tmp_path: Path, photos: Path) -> None:
    output = tmp_path / "doctor.json"
    done = run(tmp_path, *DOCTOR, photos, "--json", output, NO_COLOR="1", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith(("hosts", "devices", "input: ", "all-reduce", "pairs"))] == [
        "hosts",
        "devices",
        f"input: {photos}"[:80],
    ]
    assert lines[-1].startswith("no problems found (1 rank on 1 host, ")
    content = json.loads(output.read_text())
    assert (content["findings"], content["exclude"], content["network"]) == ([], [], None)
    assert content["seconds"] < 60
    assert content["ranks"][0]["read"] > 0
    assert content["ranks"][0]["decode"] > 0


def test_several_processes_are_measured_together(tmp_path: Path, photos: Path) -> None:
    done = run(tmp_path, *DOCTOR, photos, "--processes", "2", "--json", "-")
    content = json.loads(done.stdout)
    # Other processes of this machine may slow one of the two down.
    assert done.returncode == bool(content["findings"]), done.stderr
    assert all(not rank["errors"] for rank in content["ranks"])
    assert [rank["rank"] for rank in content["ranks"]] == [0, 1]
    assert [node["local_ranks"] for node in content["nodes"]] == [2]
    assert content["network"]["pairs"] == []
    sizes = [entry["bytes"] for entry in content["network"]["all_reduce"]]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1 << 12
    for entry in content["network"]["all_reduce"]:  # 2 (n - 1) / n = 1 for two ranks
        assert entry["bus_bandwidth"] == pytest.approx(entry["bytes"] / entry["seconds"])


def test_ranks_do_not_wait_for_one_without_memory_for_messages(launch: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "doctor.json"
    launch.start("tests.dist.doctor_run", output, ranks=2)
    assert launch.join()[0] == 1, launch.errors.read_text()  # the launcher then kills the other rank
    content = json.loads(output.read_text())
    assert content["network"] is None
    errors = [(finding["rank"], finding["message"]) for finding in content["findings"] if finding["kind"] == "failed"]
    assert [rank for rank, _ in errors] == [1]
    assert errors[0][1].endswith("not measured: network: cpu: out of memory")


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python")
    done = run(tmp_path, *launcher, *DOCTOR, "--min-open-files", "1000000000")
    assert done.returncode == 1
    assert "1 problem found (2 ranks on 1 host" in done.stdout
    assert "raise it with 'ulimit -n'" in " ".join(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_missing_set_is_invalid_input(tmp_path: Path, processes: str) -> None:
    done = run(tmp_path, *DOCTOR, tmp_path / "absent", "--processes", processes)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert f"{tmp_path / 'absent'}: no such shard set" in errors[0]


@pytest.mark.slow
def test_missing_ranks_are_counted(tmp_path: Path) -> None:
    program = (
        "from datetime import timedelta; import launch.doctor.run as run; run.JOIN_TIMEOUT = timedelta(seconds=3); "
        "from launch.doctor.options import Doctor; raise SystemExit(Doctor().run([]))"
    )
    ranks = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = run(tmp_path, sys.executable, "-c", program, **ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert done.returncode == 1, done.stderr
    assert "error: only 1 of 3 ranks have connected; look for the error of a rank that is missing" in done.stderr
