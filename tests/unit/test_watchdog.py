"""The watchdog of a single rank. tests/dist and tests/slurm test it with several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.machine.world import World
from launch.resilience.watchdog import Watchdog
from shards.errors import UserError
from tests.support.disks import fill, small_disk
from tests.support.hanging_mount import can_mount
from tests.support.launching import python_path

pytestmark = pytest.mark.timed

PROGRAM = """
import ctypes, faulthandler, sys, time
from pathlib import Path
import torch
from launch.resilience import heartbeat
from launch.resilience import watchdog
from launch.machine.world import World
from tests.support.hanging_mount import mount_hanging

run, how = Path(sys.argv[1]), sys.argv[2]
watchdog.LAST_RESORT_SECONDS = 6.0
watchdog.FAREWELL_SECONDS = 0.5
ranks = 1
if how == "hang":
    watchdog.LAST_RESORT_SECONDS, watchdog.REPORT_SECONDS = 60.0, 4.0
    ranks = 3
    watchdog.new_start = lambda folder, world: heartbeat.Start(heartbeat.clear(folder), ("h0", "h1", "h2"))
world = World(0, ranks, 0, 1, torch.device("cpu"))
with watchdog.Watchdog(run, world, timeout=1.0, close=lambda: print("closed", flush=True)) as dog:
    for step in range(1, 4):
        dog.beat(step)
        time.sleep(0.4)
    for _ in dog.beat_on_each(range(4)):
        time.sleep(0.4)
    if how == "hang":
        mount_hanging(run)
    if how == "raise":
        def arm(*_, **__):
            raise RuntimeError("can't start new thread")
        faulthandler.dump_traceback_later = arm
    if how != "lock" and how != "end":
        time.sleep(60)
    if how == "lock":
        ctypes.PyDLL(None).sleep(60)  # PyDLL does not release the GIL
print("not ended")
"""


def run_program(run: Path, how: str, *wrapper: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": python_path()}
    command = [*wrapper, sys.executable, "-c", PROGRAM, str(run), how]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def location_of(text: str) -> str:
    """Return how stacks refer to the line of PROGRAM that contains `text`."""
    number = next(number for number, line in enumerate(PROGRAM.splitlines(), start=1) if text in line)
    return f'File "<string>", line {number} in <module>'


def test_a_run_that_makes_progress_is_not_ended(tmp_path: Path) -> None:
    done = run_program(tmp_path / "run", "end")
    assert (done.returncode, done.stdout) == (0, "not ended\n"), done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_without_progress_writes_stacks_and_ends_with_the_reserved_status(tmp_path: Path) -> None:
    done = run_program(tmp_path / "run", "sleep")
    assert (done.returncode, done.stdout) == (75, "closed\n"), done.stderr
    assert "stalled: rank 0 on" in done.stderr
    assert "after step 3; this is the only rank, so the input data" in done.stderr
    assert json.loads((tmp_path / "run" / "status").read_text())["status"] == "stalled"
    stacks = (tmp_path / "run" / "stacks-rank0.txt").read_text()
    assert "rank 0, 3 steps done" in stacks
    assert location_of("time.sleep(60)") in stacks


def test_a_process_in_which_a_library_holds_the_gil_is_ended_too(tmp_path: Path) -> None:
    done = run_program(tmp_path / "run", "lock")
    assert done.returncode == 1, done.stderr
    stacks = (tmp_path / "run" / "stacks-rank0.txt").read_text()
    assert location_of("ctypes.PyDLL(None)") in stacks


@pytest.mark.slow
def test_a_process_ends_even_if_the_file_system_hangs(tmp_path: Path) -> None:
    """Stacks, status and heartbeats cannot be written, so the reason and the stacks go to standard error."""
    if not can_mount():
        (pytest.fail if os.environ.get("CI") == "true" and os.getuid() == 0 else pytest.skip)("needs FUSE, as root")
    run = tmp_path / "run"
    done = run_program(run, "hang", "unshare", "--mount")
    assert done.returncode == 75, done.stderr
    assert "no progress for" in done.stderr
    assert f"{run} did not answer for 4 s; the stack traces are above" in done.stderr
    assert location_of("time.sleep(60)") in done.stderr


def test_the_watchdog_survives_any_exception(tmp_path: Path) -> None:
    done = run_program(tmp_path / "run", "raise")
    assert done.returncode == 75, done.stderr
    assert "watchdog: unexpected error, continuing: RuntimeError: can't start new thread" in done.stderr
    assert done.stderr.count("can't start new thread") == 1
    assert "stalled: rank 0 on" in done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_an_unwritable_file_of_stacks_is_an_error_of_the_run_folder(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "stacks-rank0.txt")
    with pytest.raises(UserError, match=r"the run folder cannot be written \(.*not a regular file\)"), alone(tmp_path):
        pass


def test_stacks_go_to_standard_error_when_the_disk_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as run:
        fill(run)
        done = run_program(run, "sleep")
    assert done.returncode == 75, done.stderr
    assert "stacks-rank0.txt: cannot be written (No space left on device)" in done.stderr
    assert location_of("time.sleep(60)") in done.stderr


def alone(folder: Path) -> Watchdog:
    return Watchdog(folder / "run", World(0, 1, 0, 1, torch.device("cpu")), timeout=60.0)
