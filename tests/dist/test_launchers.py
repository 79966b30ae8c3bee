"""Errors and Ctrl-C under every launcher: `pipeline train`, `accelerate launch` and torchrun."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.support.launching import LAUNCHER, TRAIN, environment, free_port
from tests.support.launching import run as run_command
from tests.support.runs import OPTIONS, ranks_of, spawn, status, wait_for_step
from tests.support.terminal import Terminal
from tests.support.waiting import wait_until

PIPELINE = (sys.executable, "-m", "launch.cli", "train")
INJECT_FAULT = "tests/dist/inject_fault.py"


def launcher(name: str, ranks: int = 1) -> tuple[str, ...]:
    """Return the command that launches launch/train.py, up to its options."""
    count = str(ranks)
    return {
        "pipeline": (*PIPELINE, "--processes", count, "--"),
        "accelerate": (*LAUNCHER, TRAIN),
        "accelerate-multi": (
            *(*LAUNCHER, "--multi_gpu", "--num_processes", count, "--main_process_port", str(free_port()), TRAIN),
        ),
        "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, TRAIN),
    }[name]


@pytest.mark.parametrize(
    ("name", "ranks", "expected"),
    [
        ("pipeline", 2, 2),
        ("accelerate", 1, -signal.SIGTERM),
        pytest.param("pipeline", 1, 2, marks=pytest.mark.slow),
        pytest.param("accelerate-multi", 2, 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_an_error_of_all_ranks_is_printed_once_and_last(tmp_path: Path, name: str, ranks: int, expected: int) -> None:
    missing = tmp_path / "missing"
    done = run_command(tmp_path, *launcher(name, ranks), *OPTIONS, "--data", missing, "--out", tmp_path / "run")
    error = f"error: {missing}: no such shard set; create it with 'pipeline shard SOURCE --out {missing}'"
    assert done.stderr.count("no such shard set") == 1, done.stderr
    last = [line for line in done.stderr.splitlines() if line.strip("=")][-1]  # torch draws a line below
    assert last.removeprefix("  traceback : ") == error
    assert done.returncode == expected
    assert not (tmp_path / "run").exists()
    if name in ("pipeline", "accelerate"):
        assert "Traceback" not in done.stderr
    if name == "pipeline":
        assert done.stderr.endswith(f"\n{error}\n")


@pytest.mark.slow
def test_wrong_usage_is_printed_once_by_several_ranks(tmp_path: Path) -> None:
    done = run_command(tmp_path, *PIPELINE, "--processes", "2", "--", "--varient", "b3")
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("--varient: no such option of") == 1


def test_training_options_before_the_separator_get_a_hint(tmp_path: Path) -> None:
    done = run_command(tmp_path, *PIPELINE, "--variant", "b3")
    expected = "error: --variant: a training option; write training options after --: pipeline train -- --variant b3\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize(
    ("name", "ranks", "expected"), [("accelerate", 1, 143), pytest.param("pipeline", 2, 75, marks=pytest.mark.slow)]
)
def test_ctrl_c_at_a_terminal_saves_before_the_prompt_returns(
    tmp_path: Path, digits: Path, name: str, ranks: int, expected: int
) -> None:
    run = tmp_path / "run"
    with Terminal(tmp_path, environment(tmp_path)) as terminal:
        terminal.run(*launcher(name, ranks), *OPTIONS, "--data", digits, "--out", run)
        wait_until((run / "metrics.jsonl").exists)
        wait_until(lambda: '"train"' in (run / "metrics.jsonl").read_text())
        terminal.press("C-c")
        *_, before, end = [line for line in terminal.end() if line != "Terminated"]
        processes = ranks_of(run)
        screen = terminal.screen()
    assert end == f"STATUS={expected}"
    assert "saved and stopping: SIGINT" in before, screen
    assert screen.count("SIGINT: finishing this step, then saving; press Ctrl-C again to stop without saving") == 1
    assert "Traceback" not in screen
    assert status(run)["status"] == "preempted"
    assert processes == []


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_a_second_ctrl_c_at_a_terminal_says_what_is_lost(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    with Terminal(tmp_path, environment(tmp_path)) as terminal:
        terminal.run(*LAUNCHER, INJECT_FAULT, "blocked", *OPTIONS, "--data", digits, "--out", run)
        wait_until((run / "metrics.jsonl").exists)
        wait_until(lambda: '"train"' in (run / "metrics.jsonl").read_text())
        terminal.press("C-c")
        terminal.wait_for("press Ctrl-C again to stop without saving")
        wait_until(lambda: terminal.press("C-c") or "STATUS=" in terminal.screen(), interval=2)
        *_, before, end = [line for line in terminal.end() if line not in ("^C", "Terminated")]
        processes = ranks_of(run)
    assert (before, end) == ("ended at once; lost: 1 step, all of the run", "STATUS=143")
    assert status(run)["status"] == "failed"
    assert processes == []


@pytest.mark.slow
def test_the_end_of_the_launcher_saves_the_run(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    process = spawn(tmp_path, *LAUNCHER, TRAIN, *OPTIONS, "--data", digits, "--out", run)
    wait_for_step(run, 1, process)
    process.kill()
    wait_until(lambda: not ranks_of(run))
    assert status(run)["status"] == "preempted"


def test_a_killed_rank_is_named_in_one_line(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    process = spawn(tmp_path, *launcher("pipeline", 2), *OPTIONS, "--data", digits, "--out", run)
    wait_for_step(run, 1, process)
    (killed,) = (pid for pid in ranks_of(run) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(killed, signal.SIGKILL)
    _, printed = process.communicate(timeout=100)
    line = f"error: rank 1 on {os.uname().nodename} was killed by SIGKILL (out of memory?)"
    assert printed.splitlines()[-1] == f"{line}; run the same command to resume"
    assert "Traceback" not in printed
    assert process.returncode == 1
    assert ranks_of(run) == []
