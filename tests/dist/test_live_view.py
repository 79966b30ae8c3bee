"""The live view of a real run at terminals of 80 x 24 and 200 x 50 characters, and the same run in a file."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.launching import TRAIN, environment, python
from tests.support.runs import OPTIONS
from tests.support.terminal import Terminal

SHORT = (*OPTIONS, "--epochs", "2", "--warmup-epochs", "0", "--ema", "0.9")
DURATION = r"(\d+(\.\d)? s|\d+:\d\d:\d\d)"
# What each line of the view consists of, from top to bottom, once an epoch has been evaluated.
LINES = (
    r"run   fat_b0 on CPUs(   evaluating the (weights|moving average): \d+ of 360 images)?",
    r"[━╸╺]+",
    r"epoch [12] of 2   step \d+ of 44",
    rf"elapsed {DURATION}   ETA {DURATION}",
    r"loss \d+\.\d{3}   learning rate \d\.\d\de-\d\d   gradient norm \d+\.\d\d",
    r"last top-1 \d+\.\d\d%, EMA \d+\.\d\d%   best \d+\.\d\d%( \(EMA\))?",
    r"\d+ images/s   average \d+   waiting for data \d+\.\d%",
    rf"checkpoint {DURATION} ago",
)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize(("columns", "rows"), [(80, 24), pytest.param(200, 50, marks=pytest.mark.slow)])
def test_the_live_view_is_complete_and_leaves_a_clean_terminal(
    tmp_path: Path, digits: Path, columns: int, rows: int
) -> None:
    run = tmp_path / "run"
    with Terminal(tmp_path, environment(tmp_path), columns=columns, rows=rows) as terminal:
        terminal.run(sys.executable, TRAIN, *SHORT, "--data", digits, "--out", run)
        terminal.wait_for("loading PyTorch")
        terminal.wait_for("evaluating the ", 200)
        terminal.wait_for(" ago")
        screen = terminal.screen()
        last = terminal.end(200)
    lines = screen.splitlines()
    assert max(map(len, lines)) < columns, screen
    view = "\n".join(lines[next(n for n, line in enumerate(lines) if line.startswith("run   fat_b0")) :])
    pattern = "\n".join(LINES) if columns == 80 else "\n".join(LINES[:2]) + "\n" + ".*".join(LINES[2:])
    assert re.search(pattern, view, re.DOTALL if columns > 80 else 0), screen
    assert last[-1] == "STATUS=0"
    assert "".join(last[:-1]).endswith("curves.png")  # without line breaks
    assert not [line for line in last if "━" in line or line.startswith("elapsed")]  # the view is removed


def test_a_file_gets_lines_with_time_epoch_elapsed_and_eta(tmp_path: Path, digits: Path) -> None:
    command = [TRAIN, *OPTIONS, "--epochs", "1", "--warmup-epochs", "0", "--stop-after", "3"]
    for expected in ("22 steps|3 steps in", "already finished: 3 steps, best top-1"):
        done = python(tmp_path, *command, "--data", digits, "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stderr)
        assert not [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line)]
        assert "loading PyTorch" in lines[0]
        assert re.search(expected, done.stderr)
        if "already" not in expected:
            assert re.search(rf"epoch 1 of 1, step 2 of 3, elapsed {DURATION}, ETA {DURATION}, loss \d", done.stderr)
            assert re.search(r" epoch 1: top-1 \d", done.stderr)
