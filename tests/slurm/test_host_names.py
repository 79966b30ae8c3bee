"""Hosts whose names do not resolve to a usable address: the ranks connect anyway, or one line names the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import need
from tests.support.hosts import some_hosts
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
# Shell commands, run in new namespaces, that set the host's name and its entry in /etc/hosts.
SETUPS = {
    "unknown": "hostname no-such-host",
    "the loopback address": "hostname no-such-host && mount --bind {hosts} /etc/hosts",
}


def join(tmp_path: Path, setup: str, **env: str) -> list[tuple[int, str]]:
    """Run one rank on each of two hosts, and return (exit status, output) per rank."""
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
def test_ranks_connect_on_hosts_whose_names_do_not_resolve_to_them(setup: str, tmp_path: Path) -> None:
    need("ip", "unshare")
    for status, output in join(tmp_path, setup):
        assert status == 0, output
        assert "joined 2 eth0" in output


def test_the_error_names_an_interface_that_does_not_exist(tmp_path: Path) -> None:
    need("ip", "unshare")
    for status, output in join(tmp_path, SETUPS["unknown"], GLOO_SOCKET_IFNAME="eth9"):
        assert (status, "Traceback" in output) == (1, False)
        assert "set GLOO_SOCKET_IFNAME (currently eth9) to the network interface that leads to" in output


def test_the_error_names_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        env = environment(tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="2")
        env |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        done = subprocess.run(
            [sys.executable, "-c", JOIN], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"error: port {port} is in use" in done.stderr
    assert "--main_process_port 0" in done.stderr
