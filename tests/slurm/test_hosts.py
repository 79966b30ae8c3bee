"""Failures of hosts, links and ranks, on simulated hosts."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.conftest import OPTIONS, RECORDED, need
from tests.support.hosts import Host, some_hosts
from tests.support.launching import LAUNCHER, ROOT, environment, free_port

STALL_SECONDS = 6
# Seconds for writing the reports, and for the launcher to end, on a busy machine.
OVERHEAD_SECONDS = 45


def start(
    hosts: list[Host], tmp_path: Path, *options: str | Path, only_second: tuple[str | Path, ...] = ()
) -> list[subprocess.Popen[str]]:
    """Start one rank on each host with accelerate."""
    port = str(free_port())
    started = []
    count = str(len(hosts))
    for number, host in enumerate(hosts):
        env = environment(tmp_path, GLOO_SOCKET_IFNAME="eth0", PACE="0.3", SLURMD_NODENAME=f"host{number}")
        topology = ("--multi_gpu", "--num_machines", count, "--num_processes", count, "--machine_rank", str(number),
                    "--main_process_ip", hosts[0].address, "--main_process_port", port)  # fmt: skip
        command = [*LAUNCHER, *topology, RECORDED, *OPTIONS, *options, *(only_second if number else ())]
        started.append(host.start(command, cwd=ROOT, env=env, log=tmp_path / f"{number}.log"))
    return started


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_failed_link_ends_both_ranks_and_is_reported_and_the_run_can_be_resumed_later(
    tmp_path: Path, digits: Path
) -> None:
    need("ip")
    run = tmp_path / "run"
    options = (
        "--data",
        digits,
        "--out",
        run,
        "--zero",
        "1",
        "--save-every",
        "2",
    )
    short = ("--hang-timeout", str(STALL_SECONDS))
    logs = [tmp_path / "0.log", tmp_path / "1.log"]

    def steps() -> list[int]:
        fed = run / "fed-0.jsonl"
        return [json.loads(line)["step"] for line in fed.read_text().splitlines()] if fed.exists() else []

    def texts() -> str:
        return "\n".join(path.read_text() for path in logs)

    with some_hosts() as hosts:
        processes = start(hosts, tmp_path, *options, *short, "--stop-after", "100")
        wait_until(lambda: len(steps()) > 4 or any(p.poll() is not None for p in processes), "step 4", seconds=150)
        assert all(process.poll() is None for process in processes), texts()
        hosts[1].unplug()
        cut = time.monotonic()
        for process in processes:
            process.wait(STALL_SECONDS + OVERHEAD_SECONDS - (time.monotonic() - cut))
        assert all(process.returncode for process in processes)
        wait_until(lambda: not any(host.processes() for host in hosts), "end of all processes")
        for own, log in enumerate(logs):
            stalled = [line for line in log.read_text().splitlines() if line.startswith("stalled: ")]
            assert stalled, log.read_text()
            # Both reach the run folder, so each finds that the other is alive, and which of them is disconnected.
            assert "no heartbeat" not in stalled[0]
            assert "no connection to the host of rank 0 from: rank 1 on host1" in stalled[0]
            assert f"rank {own}, {steps()[-1]} steps done" in (run / f"stacks-rank{own}.txt").read_text()
        found = json.loads((run / "status").read_text())
        assert found["status"] == "stalled"
        assert "nodes" not in found  # with two hosts there is no majority

        hosts[1].plug_in()
        last = max(steps())
        resumed = start(hosts, tmp_path, *options, "--stop-after", str(last + 4))
        assert [process.wait(200) for process in resumed] == [0, 0], texts()
        assert steps()[-1] == last + 3
        assert json.loads((run / "status").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", [0, 2])
def test_a_host_that_loses_power_is_reported_and_excluded_from_the_next_start(
    tmp_path: Path, digits: Path, lost: int
) -> None:
    """Also the host of rank 0, with which torch's store and the rendezvous are lost."""
    need("ip")
    run = tmp_path / "run"
    options = ("--data", digits, "--out", run, "--zero", "0", "--hang-timeout", str(STALL_SECONDS))
    with some_hosts(3) as hosts:
        processes = start(hosts, tmp_path, *options, "--global-batch", "48", "--stop-after", "500")
        fed = run / "fed-0.jsonl"

        def begun() -> bool:
            return fed.exists() and len(fed.read_text().splitlines()) > 4

        wait_until(lambda: begun() or any(p.poll() is not None for p in processes), "step 4", seconds=200)
        assert begun(), (tmp_path / "0.log").read_text()
        hosts[lost].power_off()
        for number in {0, 1, 2} - {lost}:
            log = tmp_path / f"{number}.log"
            assert processes[number].wait(STALL_SECONDS + 2 * OVERHEAD_SECONDS), log.read_text()
            stalled = [line for line in log.read_text().splitlines() if line.startswith("stalled: ")]
            assert stalled, log.read_text()
            assert f"from: rank {lost} on host{lost} (" in stalled[0]
            assert f"rank {number}, " in (run / f"stacks-rank{number}.txt").read_text()
    found = json.loads((run / "status").read_text())
    assert (found["status"], found.get("nodes")) == ("stalled", [f"host{lost}"]), found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_when_one_rank_hangs_all_ranks_write_their_stacks(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    topology = ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()))
    options = ("--data", digits, "--out", run, "--zero", "0", "--hang-timeout", "5", "--stop-after", "50")
    command = [*LAUNCHER, *topology, RECORDED, *OPTIONS, *options]
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment(tmp_path, HANG_AT="3"), capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "recorded_train.py" in (run / "stacks-rank1.txt").read_text()
    assert "in hang" in (run / "stacks-rank1.txt").read_text()
    assert "in hang" not in (run / "stacks-rank0.txt").read_text()
    found = json.loads((run / "status").read_text())
    assert found["status"] == "stalled"
    assert "nodes" not in found  # all ranks publish heartbeats: no node is at fault


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_host_with_another_set_and_another_run_folder_is_reported(tmp_path: Path, digits: Path) -> None:
    need("ip")
    shutil.copytree(digits, tmp_path / "set")
    with (tmp_path / "set" / "dataset.json").open("a") as manifest:
        manifest.write("\n")
    run = tmp_path / "run"
    with some_hosts() as hosts:
        apart = ("--data", tmp_path / "set", "--out", tmp_path / "elsewhere")
        for process in start(hosts, tmp_path, "--data", digits, "--out", run, only_second=apart):
            assert process.wait(120) != 0
    log = (tmp_path / "0.log").read_text()
    assert "error: nodes that differ from the others: host1: data " in log
    assert "run folder not shared with rank 0, expected shared" in log
    found = json.loads((run / "status").read_text())
    assert found["status"] == "failed"
    assert found["reason"].startswith("host1: data ")
    assert "nodes" not in found  # with two nodes there is no majority
