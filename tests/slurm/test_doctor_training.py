"""The measurement of the nodes before a training: it warns, and never fails or stops the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.doctor.measurements.channel import GLOO_TIMEOUT
from tests.slurm.conftest import OPTIONS, need
from tests.support.hosts import Host, some_hosts
from tests.support.launching import ROOT, TRAIN, environment, free_port
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start(hosts: Sequence[Host], folder: Path, *options: str | Path) -> list[subprocess.Popen[str]]:
    """Start one rank of a training on each host."""
    port, started = str(free_port()), []
    for number, host in enumerate(hosts):
        ranks = {"RANK": str(number), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        network = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "eth0"}
        env = environment(folder, **ranks, **network, SLURMD_NODENAME=f"host{number}")
        command = [sys.executable, TRAIN, *OPTIONS, "--check-nodes", "--stop-after", "1", "--zero", "0", *options]
        started.append(host.start(command, cwd=ROOT, env=env, log=folder / f"{number}.log"))
    return started


def test_a_slow_link_is_a_warning(tmp_path: Path, digits: Path) -> None:
    need("ip", "tc")
    run, log = tmp_path / "run", tmp_path / "0.log"
    with some_hosts(3) as hosts:
        hosts[2].limit_rate("100mbit")
        options = ("--data", digits, "--out", run, "--global-batch", "24")
        assert [process.wait(300) for process in start(hosts, tmp_path, *options)] == [0, 0, 0], log.read_text()
    text = log.read_text()
    assert " warning: host2: bandwidth to other hosts 1" in text, text
    assert " warning: option of launch.submit that excludes these nodes: --sbatch=--exclude=host2\n" in text, text
    content = json.loads((run / "doctor.json").read_text())
    assert (content["exclude"], len(content["ranks"])) == (["host2"], 3)
    assert json.loads((run / "status").read_text())["status"] == "finished"


def test_a_rank_that_does_not_respond_only_delays_the_run(tmp_path: Path, digits: Path) -> None:
    need("ip")
    run, log = tmp_path / "run", tmp_path / "0.log"
    with some_hosts(2) as hosts:
        processes = start(hosts, tmp_path, "--data", digits, "--out", run)
        wait_until(lambda: "measuring the nodes" in log.read_text(), "the measurement", seconds=120)
        stopped = hosts[1].processes()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(GLOO_TIMEOUT.total_seconds())
        wait_until(lambda: "warning: the nodes were not measured" in log.read_text(), "the timeout", seconds=60)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        assert [process.wait(300) for process in processes] == [0, 0], log.read_text()
    assert not (run / "doctor.json").exists()
    assert json.loads((run / "status").read_text())["status"] == "finished"
