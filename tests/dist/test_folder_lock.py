"""Two trainings in one run folder: the second waits for the first to save and stop, or fails and names it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.dist.trainings import Trainer
from tests.support.launching import lines
from tests.support.runs import OPTIONS, ranks_of, start, status, wait_for_step


def test_a_training_keeps_its_run_folder_until_it_is_killed(train: Trainer, tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    options = (*OPTIONS, "--data", str(digits), "--out", str(run))
    process = start(tmp_path, "--data", digits, "--out", run)
    wait_for_step(run, 1, process)
    first = process.pid
    try:
        before = status(run)
        second = train(*options, "--lock-wait", "1")
        assert second.returncode == 2
        *_, error = second.stderr.strip().splitlines()
        host = os.uname().nodename
        assert error.startswith(f"error: run folder {run} is in use by process {first} on {host}; wait for it")
        assert error.endswith(f"(lock: {run}/.lock), or use another run folder (--out)")
        assert "waiting for it for up to 1 s" in second.stderr
        found = status(run)
        assert (before["status"], before["step"], before["pid"]) == (found["status"], found["step"], found["pid"])
        assert found["status"] == "running"
        assert ranks_of(run) == [first]
    finally:
        process.kill()
    process.wait()
    third = train(*options, "--stop-after", "1")
    assert third.returncode == 0, third.stderr
    assert f"replacing the lock of process {first} on {host}, which no longer runs" in third.stderr
    assert "waiting for it" not in third.stderr


@pytest.mark.slow
def test_a_training_started_while_another_one_saves_waits_and_resumes(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    first = start(tmp_path, "--data", digits, "--out", run)
    wait_for_step(run, 2, first)
    first.send_signal(signal.SIGSTOP)  # so that its save takes until the second training waits for it
    first.send_signal(signal.SIGTERM)
    second = start(tmp_path, "--data", digits, "--out", run, "--stop-after", "9")
    assert second.stderr is not None
    printed = []
    for line in second.stderr:  # ends if the second training does not wait
        printed.append(line)
        if "waiting for it" in line:
            break
    assert f"note: run folder {run} is in use by process {first.pid} on " in "".join(printed[-1:]), printed
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 75
    assert second.wait(timeout=120) == 0, second.stderr.read()
    trained = lines(run, "train")
    begun = [line["step"] for line in lines(run, "start")]
    assert begun[0] == 0
    assert begun[1] >= 2
    assert [line["step"] for line in trained] == list(range(1, 10))  # no step is repeated or missing


def test_a_second_training_with_invalid_options_does_not_change_the_status_of_the_first(
    train: Trainer, tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    first = start(tmp_path, "--data", digits, "--out", run)
    wait_for_step(run, 1, first)
    first.send_signal(signal.SIGSTOP)  # so that it does not end before the second one checks the lock
    second = train(*OPTIONS, "--data", tmp_path / "none", "--out", run, "--lock-wait", "0")
    assert second.returncode == 2
    assert status(run)["status"] == "running"
