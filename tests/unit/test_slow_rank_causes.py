"""What a process observes about itself (launch/stragglers/local_causes.py), in a process that is slowed down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.stragglers import local_causes
from launch.stragglers.local_causes import LocalCauses, LocalObserver, QuotaUse, gpu_clocks
from tests.support.launching import environment
from tests.support.slow_ranks import bind, busy_core, cpu_quota, stop_pulses

# A process that computes, and prints what it observes about itself until its input ends.
OBSERVED = """
import sys, threading
from dataclasses import astuple
from launch.stragglers.local_causes import LocalObserver
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
observer = LocalObserver(sample_seconds=0.2)
print("ready", flush=True)
while not ended.is_set():
    sum(range(100_000))
print(*astuple(observer.take()))
observer.close()
"""


@contextmanager
def observed(tmp_path: Path) -> Iterator[tuple[int, list[LocalCauses]]]:
    """Yield the id of a process that computes, and a list to which what it observed is added at the end."""
    found: list[LocalCauses] = []
    with subprocess.Popen(
        [sys.executable, "-c", OBSERVED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(tmp_path)
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid, found
            output, _ = process.communicate(timeout=60)
            found.append(LocalCauses(*map(float, output.split())))
        finally:
            process.kill()


LONG = [pytest.param(seconds, marks=pytest.mark.slow) for seconds in (0.104, 0.25)]


@pytest.mark.parametrize("seconds", [0.1, *LONG])
def test_a_process_notices_that_it_is_stopped(tmp_path: Path, seconds: float) -> None:
    """Also if the stops are about as long as the thread's sleep, and would begin and end with it."""
    with observed(tmp_path) as (pid, found), stop_pulses(pid, seconds=seconds):
        time.sleep(4)
    (causes,) = found
    assert 0.2 < causes.stopped <= 0.8, causes  # about 0.5
    assert causes.throttled == 0


def test_a_process_notices_that_its_core_is_busy(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    with observed(tmp_path) as (pid, found):
        bind(pid, core)
        with busy_core(pid, core):
            time.sleep(4)
    (causes,) = found
    assert causes.waiting_for_core > 0.4
    assert causes.stopped < causes.waiting_for_core


def test_a_process_notices_that_its_quota_is_exhausted(tmp_path: Path) -> None:
    with observed(tmp_path) as (pid, found), cpu_quota(pid, 0.2):
        time.sleep(4)
    (causes,) = found
    assert causes.throttled > 0.3


@pytest.mark.parametrize(
    ("text", "used"),
    [("usage_usec 2500000\nthrottled_usec 1500000", 2.5), ("throttled_time 1500000000", pytest.approx(0, abs=1e4))],
    ids=["v2", "v1"],
)
def test_the_throttled_time_is_read_in_both_versions_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, used: float
) -> None:
    (tmp_path / "cpu.stat").write_text(f"nr_periods 9\nnr_throttled 5\n{text}\n")
    monkeypatch.setattr(local_causes, "control_groups", lambda: iter([tmp_path, tmp_path / "missing"]))
    assert dict(local_causes.quota_uses()) == {tmp_path: (1.5, used)}


@pytest.mark.parametrize(
    ("throttled", "used", "expected"),
    [
        pytest.param(5.0, 5.0, 5.0, id="one thread, half of the time"),
        pytest.param(4.0, 156.0, 0.25, id="16 threads, each for 2.5 % of the time"),
        pytest.param(80.0, 80.0, 5.0, id="16 threads, half of the time"),
        pytest.param(0.01, 0.01, 0.01, id="a group that is idle most of the time"),
        pytest.param(0.0, 10.0, 0.0, id="not throttled"),
        pytest.param(10.0, 0.0, 10.0, id="throttled all the time"),
    ],
)
def test_throttled_time_of_all_cpus_is_converted_to_wall_time(throttled: float, used: float, expected: float) -> None:
    earlier = QuotaUse(100.0, 1000.0)
    later = QuotaUse(100.0 + throttled, 1000.0 + used)
    assert later.throttled_since(earlier, 10.0) == pytest.approx(expected)


def test_the_last_causes_are_returned_until_there_are_new_ones() -> None:
    observer = LocalObserver(sample_seconds=0.1)
    try:
        deadline = time.monotonic() + 30
        while observer._last is observer._first and time.monotonic() < deadline:
            sum(range(1000))
        observer._causes = LocalCauses(clock=17.0)
        first = observer.take()
        assert first.clock == 0.0
        observer._first = observer._last
        assert observer.take() is first
    finally:
        observer.close()
    assert not observer._thread.is_alive()


@pytest.mark.parametrize("answer", ["1200, 1980\n", "[N/A], [N/A]\n", "", "1200\n"])
def test_clocks_that_nvidia_smi_does_not_know_are_0(answer: str) -> None:
    expected = (1200.0, 1980.0) if answer.startswith("1200,") else (0.0, 0.0)
    assert gpu_clocks("00000000:1b:00.0", run=lambda *_, **__: answer) == expected


def test_a_missing_nvidia_smi_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_clocks("00000000:1b:00.0") == (0.0, 0.0)


def test_a_blocked_nvidia_smi_does_not_delay_the_end_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    began, ends = threading.Event(), threading.Event()

    def blocked(gpu: str) -> tuple[float, float]:
        began.set()
        ends.wait(600)
        return 0.0, 0.0

    monkeypatch.setattr(local_causes, "gpu_clocks", blocked)
    monkeypatch.setattr(local_causes, "CLOSE_SECONDS", 0.1)
    observer = LocalObserver("00000000:1b:00.0", sample_seconds=0.1)
    observer.measure_clock()
    assert began.wait(60)
    observer.close()
    assert observer._thread.is_alive()
    ends.set()
    observer._thread.join(60)
    assert not observer._thread.is_alive()


def test_a_stopped_process_continues() -> None:
    """`stop_pulses` leaves no process stopped, which would make other tests hang."""
    with subprocess.Popen(["sleep", "60"]) as process:
        with stop_pulses(process.pid, seconds=0.02):
            time.sleep(0.1)
        state = (Path(f"/proc/{process.pid}/stat")).read_text().rsplit(")", 1)[1].split()[0]
        process.send_signal(signal.SIGKILL)
    assert state == "S"
