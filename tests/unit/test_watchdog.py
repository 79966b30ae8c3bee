"""The watchdog alone (tests/slurm has it in real runs), and what it says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.peers import Peer, Standing, explain
from launch.watchdog import unreachable
from tests.dist.launching import python_path

pytestmark = pytest.mark.timed

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
import torch
from launch import watchdog
from launch.status import write_status
from launch.world import World

watchdog.LAST_RESORT_SECONDS = 6.0
run, how = Path(sys.argv[1]), sys.argv[2]
with watchdog.Watchdog(run, World(0, 1, 0, 1, torch.device("cpu")), timeout=1.0) as dog:
    for step in range(1, 4):
        dog.beat(step)
        time.sleep(0.4)
    for _ in dog.watched(range(4)):
        time.sleep(0.4)
    if how == "sleep":
        time.sleep(60)
    if how == "lock":
        ctypes.PyDLL(None).sleep(60)  # PyDLL keeps Python's lock
print("left in peace")
"""


def run_program(run: Path, how: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", PROGRAM, str(run), how]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def place_of(text: str) -> str:
    """How stacks name the line of the program that holds `text`."""
    number = next(number for number, line in enumerate(PROGRAM.splitlines(), start=1) if text in line)
    return f'File "<string>", line {number} in <module>'


def test_progress_keeps_it_quiet(tmp_path: Path) -> None:
    done = run_program(tmp_path / "run", "end")
    assert (done.returncode, done.stdout) == (0, "left in peace\n"), done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_no_progress_ends_the_process_with_the_reserved_status_and_its_stacks(tmp_path: Path) -> None:
    done = run_program(tmp_path / "run", "sleep")
    assert done.returncode == 75, done.stderr
    assert "stalled: rank 0 on" in done.stderr
    assert "after step 3; there are no other ranks to wait for" in done.stderr
    assert json.loads((tmp_path / "run" / "status").read_text())["status"] == "stalled"
    stacks = (tmp_path / "run" / "stacks-rank0.txt").read_text()
    assert "rank 0, 3 steps done" in stacks
    assert place_of("time.sleep(60)") in stacks


def test_a_library_that_holds_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    done = run_program(tmp_path / "run", "lock")
    assert done.returncode == 1, done.stderr
    stacks = (tmp_path / "run" / "stacks-rank0.txt").read_text()
    assert place_of("ctypes.PyDLL(None)") in stacks


PEERS = [Peer(rank, f"n{rank // 2}", f"10.0.0.{rank // 2}", 1000 + rank) for rank in range(8)]


@pytest.mark.parametrize(
    ("standings", "said", "nodes"),
    [
        ([], "there are no other ranks to wait for", []),
        ([Standing(peer, 5) for peer in PEERS[1:]], "all other ranks answer and are at step 5 too", []),
        (
            [Standing(PEERS[2]), Standing(PEERS[3]), *(Standing(peer, 5) for peer in PEERS[4:])],
            "no answer from: rank 2 on n1 (10.0.0.1); rank 3 on n1 (10.0.0.1)",
            ["n1"],
        ),
        # a process is gone, its host is there
        ([Standing(PEERS[2]), *(Standing(peer, 5) for peer in PEERS[3:])], "no answer from: rank 2 on n1", []),
        # everybody is gone: this host is the one that is cut off
        ([Standing(peer) for peer in PEERS[2:]], "no answer from: rank 2", []),
        (
            [Standing(PEERS[2], 4, 33.0), Standing(PEERS[3], 6, 2.0)],
            "behind: rank 2 on n1 (10.0.0.1), at step 4 for 33 s; ahead: rank 3 on n1 (10.0.0.1), at step 6",
            [],
        ),
    ],
)
def test_who_is_to_blame(
    standings: list[Standing], said: str, nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n0")
    assert said in explain(standings, 5)
    assert unreachable(standings) == nodes


def test_our_own_address_is_that_of_the_named_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.network import own_address

    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", socket.gethostname())
    assert own_address()
