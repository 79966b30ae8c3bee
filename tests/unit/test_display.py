"""The live view and the log lines (launch/monitor/display.py, view.py), and the renewal of RUN/status."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.monitor.display import Display
from launch.monitor.view import View
from launch.run.status import BEFORE_NAME, StatusRenewal, read_content, read_previous, write_status

ROOT = Path(__file__).resolve().parents[2]


def view(**changes: Any) -> View:
    """Return a view in which every item is present, with the lengths of a large run."""
    values: dict[str, Any] = {
        "title": "b3-imagenet   fat_b3 on 32 GPUs",
        "step": 150_123,
        "total_steps": 375_300,
        "epochs": 300,
        "steps_per_epoch": 1251,
        "seconds": 112_320.0,
        "step_seconds": 0.31,
        "loss": 3.2141,
        "grad_norm": 1.21,
        "lr": 1.98e-3,
        "last_accuracy": "last top-1 61.20%, EMA 61.48%",
        "best_accuracy": "best 61.48% (EMA)",
        "images_per_second": 114_321.0,
        "average_images_per_second": 113_011.0,
        "data_wait": 0.004,
        "communication": 0.031,
        "mfu": 0.312,
        "memory_bytes": 41 * 10**9,
        "slowest": "17 on node-0007 (+31%, CPU quota)",
        "checkpoint_at": time.monotonic() - 241,
        "skipped": 3,
        "replaced": 12,
    }
    return View(**values | changes)


def drawn(shown: View, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=24)
    console.print(shown)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_every_item_is_complete_in_80_columns() -> None:
    title, bar, *lines = drawn(view(), 80)
    assert title == "b3-imagenet   fat_b3 on 32 GPUs"
    assert set(bar) == {"━", "╸"}
    assert lines == [
        "epoch 121 of 300   step 150,123 of 375,300",
        "elapsed 1 d 07:12:00   ETA 19:23:25",
        "loss 3.214   learning rate 1.98e-03   gradient norm 1.21",
        "last top-1 61.20%, EMA 61.48%   best 61.48% (EMA)",
        "114,321 images/s   average 113,011   waiting for data 0.4%   communication 3.1%",
        "MFU 31.2%",
        "GPU memory 41.0 GB   slowest rank 17 on node-0007 (+31%, CPU quota)",
        "checkpoint 0:04:01 ago   skipped steps 3   replaced samples 12",
    ]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_lines_are_shorter_than_the_terminal_and_no_item_is_divided(width: int) -> None:
    shown = view(phase="evaluating the moving average: 12,032 of 50,000 images", slowest="17 on n7 (+2%)")
    lines = drawn(shown, width)
    assert max(map(len, lines)) < width
    items = [item for row in shown.rows() for item in row]
    assert not [item for item in items if not any(item in line for line in lines)]


def test_a_wide_terminal_needs_fewer_lines() -> None:
    assert len(drawn(view(), 200)) < len(drawn(view(), 80))


def test_values_that_are_not_measured_are_not_shown() -> None:
    new = View(title="run", total_steps=44, epochs=2, steps_per_epoch=22)
    text = "\n".join(drawn(new, 80))
    assert "ETA -" in text
    assert not re.search("loss|MFU|memory|data|checkpoint|skipped|replaced|None", text)


def test_epochs_count_from_1_and_the_last_step_is_in_the_last_epoch() -> None:
    epochs = [View(step=step, total_steps=44, epochs=2, steps_per_epoch=22).epoch for step in (0, 22, 23, 44)]
    assert epochs == [1, 1, 2, 2]


def test_the_eta_follows_recent_intervals_and_includes_evaluations() -> None:
    shown = View(total_steps=100, steps_per_epoch=10, evaluation_seconds=0.5)
    line = {
        "steps": 10, "seconds": 29.0, "first_step_seconds": 20.0, "lr": 1.0, "loss": None, "grad_norm": None,
        "images_per_second": 1.0, "data_wait": 0.0, "memory_bytes": 0, "skipped": 0, "replaced": 0,
    }  # fmt: skip
    shown.step = 10
    shown.update(line, global_batch=8)
    assert shown.step_seconds == pytest.approx(1.5)  # without the first step, which compiles
    assert shown.eta == pytest.approx(1.5 * 90)
    assert shown.average_images_per_second == pytest.approx(8.0)
    shown.update(line | {"seconds": 60.0, "first_step_seconds": None}, global_batch=8)
    assert 1.5 < (shown.step_seconds or 0) < 6.5


def test_the_slowest_rank_is_shown_with_its_host_delay_and_cause() -> None:
    shown = view(slowest=None)
    line = {
        "steps": 10, "seconds": 5.0, "first_step_seconds": None, "lr": 1.0, "loss": None, "grad_norm": None,
        "images_per_second": 1.0, "data_wait": 0.0, "memory_bytes": 0, "skipped": 0, "replaced": 0,
        "compute": 0.9, "communication": 0.1, "slowest_rank": 17, "slowest_host": "node-7", "behind": 0.304,
    }  # fmt: skip
    shown.update(line | {"cause": None}, global_batch=8)
    assert "slowest rank 17 on node-7 (+30%)" in shown.line()
    assert "communication 10.0%" in shown.line()
    shown.update(line | {"cause": "data"}, global_batch=8)
    assert "slowest rank 17 on node-7 (+30%, data)" in shown.line()


def test_elapsed_time_continues_that_of_earlier_starts() -> None:
    assert View(seconds=3600.0).elapsed == pytest.approx(3600.0, abs=1.0)


def test_a_file_gets_lines_with_the_time_and_no_control_code() -> None:
    file = io.StringIO()
    display = Display(enabled=True, file=file)
    display.phase("reading the index of a\nset")
    display.start(view(slowest=None))
    display.print("epoch 1: top-1 63.06%")
    with display.evaluating("weights", 50) as progress:
        progress.advance(60)
    display.show_interval()
    display.close()
    lines = file.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in lines)
    assert "reading the index of a\\nset" in lines[0]
    assert "epoch 121 of 300, step 150,123 of 375,300, elapsed 1 d 07:12:00, ETA 19:23:25, loss 3.214" in lines[-1]
    assert "\x1b" not in file.getvalue()
    assert "\r" not in file.getvalue()


def test_other_ranks_show_nothing() -> None:
    file = io.StringIO()
    display = Display(enabled=False, file=file)
    display.phase("reading")
    display.start(view())
    display.print("text")
    display.close()
    assert file.getvalue() == ""


SESSION = """
import time
from launch.monitor.display import DISPLAY
from launch.monitor.view import View
DISPLAY.phase("loading PyTorch")
view = View(title="run", step=3, total_steps=44, epochs=2, steps_per_epoch=22)
DISPLAY.start(view)
time.sleep(0.5)
DISPLAY.print("a message " + "with many words " * 10)
DISPLAY.close()
"""


def on_a_terminal(**environment: str) -> str:
    """Return what a live view writes to a terminal of 80 x 24."""
    main, other = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    variables = os.environ | {"TERM": "xterm-256color"} | environment
    process = subprocess.Popen([sys.executable, "-c", SESSION], cwd=ROOT, stderr=other, env=variables)
    os.close(other)
    text = b""
    while True:
        try:
            found = os.read(main, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not found:
            break
        text += found
    os.close(main)
    assert process.wait(30) == 0
    return text.decode()


def test_the_live_view_shows_the_cursor_again_and_breaks_messages_between_words() -> None:
    text = on_a_terminal()
    assert "epoch 1 of 2   step 3 of 44" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    message = plain[plain.index("a message") :].replace("\r\n", " ")
    assert "with many words with many words" in message
    assert re.search(r"\x1b\[[0-9;]*m", text)  # colors


def test_no_color_is_honored() -> None:
    text = on_a_terminal(NO_COLOR="1")
    assert not re.search(r"\x1b\[(3[0-7]|38|4[0-7]|9[0-7])[;m]", text)


def test_the_status_is_renewed_while_it_is_running(tmp_path: Path) -> None:
    renewed = threading.Event()

    def renew() -> None:
        write_status(tmp_path, "running", step=0, at=(7, time.time()))
        renewed.set()

    write_status(tmp_path, "running")
    with StatusRenewal(tmp_path, renew, interval=0.01) as renewal:
        assert renewed.wait(30)
        content = read_content(tmp_path)
        assert content is not None
        assert content.status == "running"
        assert (content.pid, content.at_step) == (os.getpid(), 7)
    write_status(tmp_path, "stalled", reason="rank 3 is silent")
    renewed.clear()
    renewal.renew_if_running()
    assert not renewed.is_set(), "nothing is written after the end"


def test_another_status_is_not_replaced_until_the_run_is_running_again(tmp_path: Path) -> None:
    renewal = StatusRenewal(tmp_path, lambda: write_status(tmp_path, "running", reason="renewed"))
    for status in ("stalled", "finished", "failed"):
        write_status(tmp_path, status, reason="rank 3 is silent")
        renewal.renew_if_running()
        content = read_content(tmp_path)
        assert content is not None
        assert (content.status, content.reason) == (status, "rank 3 is silent")
    write_status(tmp_path, "running")
    renewal.renew_if_running()
    content = read_content(tmp_path)
    assert content is not None
    assert (content.status, content.reason) == ("running", "renewed")


def test_the_status_that_the_batch_script_has_renamed_is_the_previous_one(tmp_path: Path) -> None:
    assert read_previous(tmp_path) is None
    write_status(tmp_path, "running", step=20, at=(27, 1e9))
    (tmp_path / "status").rename(tmp_path / BEFORE_NAME)
    previous = read_previous(tmp_path)
    assert previous is not None
    assert (previous.training, previous.interrupted) == ((27, 1e9), True)
    write_status(tmp_path, "running", at=previous.training)
    write_status(tmp_path, "failed", reason="a later start, which failed before it trained")
    later = read_previous(tmp_path)
    assert later is not None
    assert (later.training, later.interrupted) == ((27, 1e9), True)
    write_status(tmp_path, "finished", step=44)
    previous = read_previous(tmp_path)
    assert previous is not None
    assert not previous.interrupted
    assert json.loads((tmp_path / "status").read_text())["time"] == pytest.approx(time.time(), abs=60)
