"""Ranks that are stopped (SIGSTOP), and how the watchdogs of the other ranks report them."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import ROOT, environment, free_port

pytestmark = [pytest.mark.timed, pytest.mark.timeout(240)]

TIMEOUT = 6.0
# Seconds for writing the reports and for exiting, on a busy machine.
OVERHEAD = 90.0
NO_STEP = 0


class Run:
    """Ranks with different host names, without a launcher, which would end all ranks when one ends."""

    def __init__(self, folder: Path, ranks: int, *, steps: int, busy_step: int = NO_STEP) -> None:
        self.path = folder / "run"
        self.path.mkdir()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self.ranks = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"h{rank}"}
            arguments = (self.path, TIMEOUT, steps, busy_step)
            with (self.path / f"log-{rank}").open("w") as log:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "tests/dist/watchdog_run.py", *map(str, arguments)],
                        cwd=ROOT,
                        env=environment(folder, OMP_NUM_THREADS="1", **shared, **own),
                        stdout=log,
                        stderr=log,
                    )
                )

    def log(self, rank: int) -> str:
        return (self.path / f"log-{rank}").read_text()

    def step(self, rank: int) -> int:
        path = self.path / f"steps-{rank}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + OVERHEAD
        while self.step(0) < step:
            assert time.monotonic() < end, self.log(0)
            assert all(rank.poll() is None for rank in self.ranks), self.log(0)
            time.sleep(0.05)

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.ranks[rank].send_signal(number)

    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "status").read_text()))

    def stacks(self, rank: int) -> str:
        return (self.path / f"stacks-rank{rank}.txt").read_text()


@contextlib.contextmanager
def started(folder: Path, ranks: int, *, steps: int = 1_000_000, busy_step: int = NO_STEP) -> Iterator[Run]:
    run = Run(folder, ranks, steps=steps, busy_step=busy_step)
    try:
        yield run
    finally:
        for rank in run.ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize(("ranks", "stopped"), [(2, 1), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_only_the_stopped_rank_is_reported(tmp_path: Path, ranks: int, stopped: int) -> None:
    """Rank 0 too, although torch's store is lost with it."""
    with started(tmp_path, ranks) as run:
        run.wait_for_step(5)
        run.signal(stopped, signal.SIGSTOP)
        living = [rank for rank in range(ranks) if rank != stopped]
        for rank in living:
            assert run.ranks[rank].wait(TIMEOUT + OVERHEAD) == 75, run.log(rank)
            (line,) = [line for line in run.log(rank).splitlines() if line.startswith("stalled: ")]
            assert f"from: rank {stopped} on h{stopped} (process {run.ranks[stopped].pid}), last at step" in line
            for other in living:
                assert f"rank {other} on h{other} (" not in line
            assert "all_reduce" in run.stacks(rank)
        before = run.status()
        assert before["status"] == "stalled"
        assert f"rank {stopped} on h{stopped}" in before["reason"]
        # With two hosts there is no majority, so none is excluded.
        assert before.get("nodes", []) == ([f"h{stopped}"] if ranks > 2 else [])

        # Continued long after the other ranks have ended, it reads their last heartbeats and keeps the status.
        run.signal(stopped, signal.SIGCONT)
        assert run.ranks[stopped].wait(OVERHEAD) != 0
        assert "no heartbeat" not in run.log(stopped)
        assert run.status() == before


@pytest.mark.slow
def test_a_rank_stopped_for_less_than_the_timeout_has_no_effect(tmp_path: Path) -> None:
    with started(tmp_path, 2, steps=60) as run:
        run.wait_for_step(5)
        run.signal(1, signal.SIGSTOP)
        time.sleep(TIMEOUT / 2)
        run.signal(1, signal.SIGCONT)
        assert [rank.wait(OVERHEAD) for rank in run.ranks] == [0, 0], run.log(0)
        assert (run.step(0), run.step(1)) == (60, 60)
        assert not (run.path / "status").exists()
        assert not list(run.path.glob("stacks-*"))


@pytest.mark.slow
def test_a_rank_with_progress_writes_its_stacks_when_another_rank_hangs(tmp_path: Path) -> None:
    with started(tmp_path, 2, busy_step=5) as run:
        assert run.ranks[0].wait(TIMEOUT + 2 * OVERHEAD) == 75, run.log(0)
        assert "all other ranks are alive and also at step 4" in run.log(0)
        assert "in busy" in run.stacks(1)
        assert "in busy" not in run.stacks(0)
        assert "nodes" not in run.status()
