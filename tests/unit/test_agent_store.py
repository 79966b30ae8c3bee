"""Ranks that torchrun has started again find each other in the store that the previous start has used."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.machine.agent_store import outlives_the_ranks, store_of_this_start
from tests.support.launching import free_port, run

SECONDS = timedelta(seconds=60)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def agent(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def joined(port: int, rank: int, size: int, timeout: timedelta = SECONDS) -> dist.Store:
    return store_of_this_start(dist.TCPStore("127.0.0.1", port, is_master=False), rank, size, timeout)


def start(port: int, size: int, first: int = 0) -> None:
    """Join with all ranks, which store and read a key each; rank `first` is the first to arrive."""

    def rank(number: int) -> str:
        time.sleep(0.2 * ((number - first) % size))
        store = joined(port, number, size)
        name = f"start {threading.get_ident()}"
        store.set(f"address/{number}", name)
        store.set(f"done/{number}", "")
        store.wait([f"done/{other}" for other in range(size)])
        assert store.get(f"address/{number}").decode() == name
        return ",".join(store.get(f"address/{other}").decode() for other in range(size))

    with ThreadPoolExecutor(size) as pool:
        assert len(set(pool.map(rank, range(size)))) == 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_start_has_keys_of_its_own(agent: dist.TCPStore, port: int, size: int) -> None:
    for first in range(4):
        start(port, size, first=first % size)


def test_a_start_in_which_a_rank_was_missing_is_not_continued(agent: dist.TCPStore, port: int) -> None:
    """The ranks that had arrived time out, as if they were killed, and leave their ids."""
    for missing in range(3):
        others = [rank for rank in range(3) if rank != missing]
        with ThreadPoolExecutor(2) as pool:
            failed = [pool.submit(joined, port, rank, 3, timedelta(seconds=1)) for rank in others]
        for future in failed:
            with pytest.raises(RuntimeError, match=r"timed out after 1 s: [23]/3 clients joined"):
                future.result()
        start(port, 3, first=missing)


def test_only_a_store_that_outlives_the_ranks_is_divided() -> None:
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert outlives_the_ranks(shared)
    assert not outlives_the_ranks(shared | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not outlives_the_ranks(shared | {"TORCHELASTIC_MAX_RESTARTS": "0"})
    assert not outlives_the_ranks({})


PROGRAM = """
import os, pathlib, signal, sys, torch, torch.distributed as dist
from launch.machine.world import connect, disconnect
world = connect()
total = torch.ones(())
dist.all_reduce(total)
restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if restarts < 2 and world.rank == 1 - restarts:
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(total)
pathlib.Path(sys.argv[1], str(world.rank)).write_text(str(int(total)))
disconnect()
"""


@pytest.mark.timeout(200)
def test_torchrun_restarts_the_ranks_of_a_machine(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(tmp_path, *torchrun, "--max-restarts", "2", program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4", "4"]
