"""Hosts whose names do not lead to them: ranks meet all the same, or one line names the variable that helps."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import need
from tests.slurm.hosts import some_hosts
from tests.support.launching import ROOT, environment, free_port

JOIN = """
import os, sys
import torch
import torch.distributed as dist
from launch.machine.world import connect, run_command

def command():
    world = connect()
    total = torch.ones(1)
    dist.all_reduce(total)
    print("joined", int(total), os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
    return 0

sys.exit(run_command(command))
"""
# In namespaces of their own: the host's name and what /etc/hosts says of it.
SETUPS = {
    "unknown": "hostname no-such-host",
    "the loopback address": "hostname no-such-host && mount --bind {hosts} /etc/hosts",
}


def join(tmp_path: Path, setup: str, **env: str) -> list[tuple[int, str]]:
    """(exit status, output) of a rank on each of two hosts."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 no-such-host\n")
    inside = f'{setup.format(hosts=tmp_path / "hosts")} && exec "$0" -c "$1"'
    port = str(free_port())
    with some_hosts() as hosts:
        for rank, host in enumerate(hosts):
            variables = environment(tmp_path, MASTER_ADDR=hosts[0].address, MASTER_PORT=port, RANK=str(rank), **env)
            variables |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            command = ["unshare", "--uts", "--mount", "sh", "-c", inside, sys.executable, JOIN]
            host.start(command, cwd=ROOT, env=variables, log=tmp_path / f"{rank}.log")
        return [(host.started[0].wait(120), (tmp_path / f"{rank}.log").read_text()) for rank, host in enumerate(hosts)]


@pytest.mark.parametrize("setup", SETUPS.values(), ids=list(SETUPS))
def test_ranks_meet_on_hosts_whose_names_lead_nowhere(setup: str, tmp_path: Path) -> None:
    need("ip", "unshare")
    for status, output in join(tmp_path, setup):
        assert status == 0, output
        assert "joined 2 eth0" in output


def test_an_interface_that_does_not_exist_is_named(tmp_path: Path) -> None:
    need("ip", "unshare")
    for status, output in join(tmp_path, SETUPS["unknown"], GLOO_SOCKET_IFNAME="eth9"):
        assert (status, "Traceback" in output) == (1, False)
        assert "set GLOO_SOCKET_IFNAME to the interface that leads to the other hosts, now eth9" in output


def test_a_port_that_another_run_has_is_named(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = str(held.getsockname()[1])
        env = environment(tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="2")
        env |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        done = subprocess.run(
            [sys.executable, "-c", JOIN], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"error: port {port} is in use" in done.stderr
    assert "--main_process_port 0" in done.stderr
