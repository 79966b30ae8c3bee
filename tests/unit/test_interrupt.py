"""Ctrl-C in commands: one line, no traceback, status 130 (shards/interrupt.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT, environment, python_path

# Presses Ctrl-C at the import of a module, and waits for the reaction.
HOOK = """
import os, signal, sys, time
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
sys.meta_path.insert(0, Finder())
"""
PIPELINE = "import sys; sys.argv[0] = 'pipeline'; from launch.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (("-c", PIPELINE, "info", "nowhere"), "tyro"),
        (("-c", PIPELINE, "info", "nowhere"), "shards.commands.command_line"),
        (("launch/train.py",), "torch"),
        (("launch/evaluate.py", "nowhere"), "torch"),
        (("-m", "launch.submit"), "tyro"),
        (("-m", "fat.account.table"), "torch"),
    ],
)
def test_ctrl_c_during_imports_prints_one_line(tmp_path: Path, command: tuple[str, ...], module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    path = os.pathsep.join([str(tmp_path), python_path()])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(tmp_path, PYTHONPATH=path, INTERRUPT_AT=module),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    *phases, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout, last) == (130, "", "interrupted")
    assert not [line for line in phases if "loading PyTorch" not in line]


COMMAND = """
import ctypes, sys
from shards.interrupt import interruptible

def wait_in_python():
    try:
        print("runs", flush=True)
        import time
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

def wait_in_c():
    print("runs", flush=True)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

sys.exit(interruptible({function}))
"""


def start(tmp_path: Path, function: str, **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(function=function)],
        cwd=ROOT,
        env=environment(tmp_path, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "runs\n"
    return process


def test_an_interrupted_command_cleans_up(tmp_path: Path) -> None:
    with start(tmp_path, "wait_in_python") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("cleaned up\n", "interrupted\n")
        assert process.returncode == 130


def test_ctrl_c_is_answered_during_a_call_into_c_and_a_second_one_ends_it(tmp_path: Path) -> None:
    with start(tmp_path, "wait_in_c") as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "interrupted\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 130


def test_only_rank_0_prints(tmp_path: Path) -> None:
    with start(tmp_path, "wait_in_python", RANK="1") as process:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("cleaned up\n", "")
        assert process.returncode == 130


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """As in a script's background job."""
    code = (
        "import os, signal; from shards.interrupt import interruptible; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print(interruptible(lambda: os.kill(os.getpid(), signal.SIGINT) or 7))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("7\n", "")
