"""Two trainers in one run folder: the second waits for the first to save and leave, or is refused by name."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.dist.trainings import Trainer
from tests.support.launching import LAUNCHER, ROOT, TRAIN, environment, lines
from tests.support.runs import OPTIONS, STARTED, ranks_of, start, status, wait_for_step
from tests.support.waiting import is_running, wait_until


def test_a_trainer_whose_launcher_was_ended_keeps_its_folder_until_it_is_killed(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    """accelerate's launcher of one process passes no signal on."""
    run = tmp_path / "run"
    options = (*OPTIONS, "--data", str(digits), "--out", str(run))
    launcher = subprocess.Popen(
        [*LAUNCHER, TRAIN, *options], cwd=ROOT, env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    )
    STARTED.append(launcher)
    wait_for_step(run, 1, launcher)
    launcher.terminate()
    launcher.wait(timeout=20)
    (orphan,) = ranks_of(run)
    try:
        before = status(run)
        second = train(*options, "--lock-wait", "1")
        assert second.returncode == 2
        *_, error = second.stderr.strip().splitlines()
        host = os.uname().nodename
        assert error.startswith(
            f"error: run folder {run} is being worked on by process {orphan} on {host}; wait for it"
        )
        assert error.endswith(f"(lock: {run}/.lock), or give this run another --out")
        assert "waiting for it for up to 1 s" in second.stderr
        assert before == status(run) == {"status": "running", "step": 0, "reason": ""}
        assert ranks_of(run) == [orphan]
    finally:
        os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: not is_running(orphan))
    third = train(*options, "--stop-after", "1")
    assert third.returncode == 0, third.stderr
    assert f"left by process {orphan} on {host}, which is gone; taken over" in third.stderr
    assert "waiting for it" not in third.stderr


@pytest.mark.slow
def test_a_trainer_started_while_the_last_one_saves_waits_and_goes_on_from_there(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    first = start(tmp_path, "--data", digits, "--out", run)
    wait_for_step(run, 2, first)
    first.send_signal(signal.SIGSTOP)  # its save takes as long as the second needs to get there
    first.send_signal(signal.SIGTERM)
    second = start(tmp_path, "--data", digits, "--out", run, "--stop-after", "9")
    assert second.stderr is not None
    said = []
    for line in second.stderr:  # to its end, if it does not wait
        said.append(line)
        if "waiting for it" in line:
            break
    assert f"note: run folder {run} is being worked on by process {first.pid} on " in "".join(said[-1:]), said
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 75
    assert second.wait(timeout=120) == 0, second.stderr.read()
    left = lines(run, "train")
    begun = [line["step"] for line in lines(run, "start")]
    assert begun[0] == 0
    assert begun[1] >= 2
    assert [line["step"] for line in left] == list(range(1, 10))  # none twice, none left out


def test_a_second_trainer_that_is_asked_for_nonsense_says_nothing_for_the_first(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    first = start(tmp_path, "--data", digits, "--out", run)
    wait_for_step(run, 1, first)
    first.send_signal(signal.SIGSTOP)  # lest it ends before the second one asks
    second = train(*OPTIONS, "--data", tmp_path / "none", "--out", run, "--lock-wait", "0")
    assert second.returncode == 2
    assert status(run)["status"] == "running"
