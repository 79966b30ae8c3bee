"""A rank that is slowed down during a real training is named, with the cause, in the log and in the metrics."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dist.forked import Launcher
from tests.dist.slow_rank_run import WINDOW
from tests.support.launching import lines
from tests.support.slow_ranks import bind, busy_core, cpu_quota, stop_pulses
from tests.support.waiting import wait_until

PROGRAM = "tests.dist.slow_rank_run"
OPTIONS = ("--recipe", "launch/recipes/digits.toml", "--size", "32", "--global-batch", "16", "--log-every", "4")
ENDLESS = ("--epochs", "1000", "--eval-every", "1000")
SECONDS = 150.0  # although a rank is named after about ten, because other processes may use the cores
WARNING = re.compile(r"warning: rank (\d+) on (\S+) holds the other ranks back: .*; cause: ([^:]+): (.*)")


class Running:
    """A training of two ranks, on one core each."""

    def __init__(self, launch: Launcher, folder: Path, data: Path, *options: str, **environment: str) -> None:
        self._launch, self.run = launch, folder / "run"
        launch.start(PROGRAM, *OPTIONS, *ENDLESS, "--data", data, "--out", self.run, *options, ranks=2, **environment)
        self.cores = sorted(os.sched_getaffinity(0))
        self.pids = list(launch.running)
        self.wait_for(lambda: self.lines() and self.lines()[-1]["step"] >= 8, "the first steps")
        for pid, core in zip(self.pids, self.cores, strict=False):
            bind(pid, core)

    def lines(self) -> list[dict[str, Any]]:
        return lines(self.run, "train") if (self.run / "metrics.jsonl").exists() else []

    def output(self) -> str:
        return self._launch.errors.read_text(errors="replace")

    def warnings(self) -> list[tuple[str, ...]]:
        return [found.groups() for found in WARNING.finditer(self.output())]

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        def ended_or_true() -> object:
            assert not self._launch.have_ended(), self.output()
            return condition()

        wait_until(ended_or_true, what, SECONDS, interval=0.2)


@pytest.fixture
def start(launch: Launcher, tmp_path: Path, digits: Path) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a training of two ranks, and waits for its first steps."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    yield lambda *options, **environment: Running(launch, tmp_path, digits, *options, **environment)
    launch.kill()


DISTURBANCES: dict[str, Callable[[Running], contextlib.AbstractContextManager[None]]] = {
    "stopped": lambda running: stop_pulses(running.pids[1]),
    "busy cores": lambda running: busy_core(running.pids[1], running.cores[1]),
    "CPU quota": lambda running: cpu_quota(running.pids[1], 0.3),
}


@pytest.mark.parametrize(
    "cause", ["stopped", *(pytest.param(cause, marks=pytest.mark.slow) for cause in ("busy cores", "CPU quota"))]
)
def test_a_rank_that_is_slowed_down_is_named_with_the_cause(start: Callable[..., Running], cause: str) -> None:
    running = start()
    with DISTURBANCES[cause](running):
        running.wait_for(lambda: any(found[0] == "1" for found in running.warnings()), f"a warning about {cause}")
    (rank, host, name, fact), *_ = [found for found in running.warnings() if found[0] == "1"]
    assert name == cause, running.output()
    assert "%" in fact
    named = [line for line in running.lines() if line.get("cause") == cause]
    assert named
    assert all((line["slowest_rank"], line["slowest_host"]) == (int(rank), host) for line in named)
    assert all(line["behind"] > 0.2 for line in named)
    running.wait_for(lambda: f"rank 1 on {host}: no longer behind" in running.output(), "the end of the delay")


# The ranks wait for rank 1 in the reduction of gradients by DDP or DeepSpeed, or already in synchronized BatchNorm.
@pytest.mark.parametrize(
    "options",
    [
        ("--zero", "2"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--sync-bn", "on"), marks=pytest.mark.slow),
        pytest.param(("--zero", "1", "--sync-bn", "on"), marks=pytest.mark.slow),
    ],
)
def test_a_rank_whose_loader_is_slow_is_named(start: Callable[..., Running], options: tuple[str, ...]) -> None:
    running = start(*options, SLOW_DATA="0.5")
    running.wait_for(running.warnings, "a warning")
    rank, _, cause, _ = running.warnings()[0]
    assert (rank, cause) == ("1", "data"), running.output()
    last = [line for line in running.lines() if line.get("cause")][-1]
    assert last["communication"] > 0.2  # rank 0 waits for rank 1
    assert last["data_wait"] < 0.1
    assert last["compute"] == pytest.approx(1 - last["communication"] - last["data_wait"], abs=1e-3)


@pytest.mark.slow
def test_ranks_that_are_equally_slow_are_not_reported(start: Callable[..., Running]) -> None:
    """Also not rank 0, which alone writes the checkpoints and the records of evaluations."""
    running = start("--save-every", "10", "--eval-every", "1")
    with stop_pulses(running.pids[0], seconds=0.05), stop_pulses(running.pids[1], seconds=0.05):
        running.wait_for(lambda: sum(line["seconds"] for line in running.lines()) > 3 * WINDOW, "three windows")
    assert running.warnings() == []
    assert {line["cause"] for line in running.lines() if "cause" in line} == set()
