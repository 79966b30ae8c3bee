"""A conversion writes the same bytes after being killed, in parts, and with any number of workers."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards.commands.command_line import SamplePhotos
from shards.commands.verify import verify
from tests.support.conversions import DRIVER, descendants, workers_of
from tests.support.waiting import is_running, wait_until

OPTIONS = ("--shard-size", "1", "--format", "both")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "photos"
    SamplePhotos(folder, count=150).run()
    return folder


@pytest.fixture(scope="module")
def reference(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """Files of an uninterrupted conversion, and its duration in seconds."""
    out = tmp_path_factory.mktemp("reference") / "set"
    started = time.monotonic()
    done = run(photos, out)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert verify(out, workers=1) == []
    return contents(out), seconds


def start(photos: Path, out: Path, *options: str, **popen: object) -> subprocess.Popen[str]:
    """Start the command as leader of a new process group."""
    command = [sys.executable, "-c", DRIVER, str(photos), "--out", str(out), *OPTIONS, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, **popen)  # type: ignore[call-overload]


def run(photos: Path, out: Path, *options: str, **popen: object) -> subprocess.CompletedProcess[str]:
    process = start(photos, out, *options, **popen)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def some_shards(out: Path) -> int:
    return len(list(out.glob("train-*.tar")))


def kill_campaign(
    photos: Path, folder: Path, reference: tuple[dict[str, bytes], float], kills: int, *options: str
) -> None:
    """Kill conversions at random times, resume them repeatedly, and check the published files after each kill."""
    expected, seconds = reference
    draw = random.Random(kills)
    done = 0
    while done < kills:
        out = folder / f"set{done}"
        for _ in range(draw.randint(1, 6)):
            process = start(photos, out, *options)
            time.sleep(draw.uniform(0.2, 1.0) * seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            done += 1
            published = contents_published(out)
            assert published == {name: expected[name] for name in published}, "every published file is complete"
            if "dataset.json" in published:
                assert published.keys() == expected.keys(), "a set with a manifest is complete"
        resumed = run(photos, out, *options)
        assert resumed.returncode == 0, resumed.stderr
        assert contents(out) == expected


def contents_published(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("[!.]*")} if out.exists() else {}


def test_killed_at_random_moments_and_resumed(
    photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    kill_campaign(photos, tmp_path, reference, kills=10)


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_conversion_to_pixels_is_killed_and_resumed(kills: int, photos: Path, tmp_path: Path) -> None:
    options = ("--pixels", "--short-side", "200")
    started = time.monotonic()
    assert run(photos, tmp_path / "reference", *options).returncode == 0
    reference = contents(tmp_path / "reference"), time.monotonic() - started
    kill_campaign(photos, tmp_path, reference, kills, *options)
    assert verify(tmp_path / "reference", workers=1) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_two_hundred_times(photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]) -> None:
    kill_campaign(photos, tmp_path, reference, kills=200)


@pytest.mark.parametrize("workers", ["1", "2", "4"])
def test_any_number_of_workers(
    workers: str, photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    assert run(photos, tmp_path / "set", "--workers", workers).returncode == 0
    assert contents(tmp_path / "set") == reference[0]


def test_three_parts_at_the_same_time(photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]) -> None:
    """All parts start with an empty folder: one lists the source, the others wait for the listing."""
    out = tmp_path / "set"
    parts = [start(photos, out, "--part", f"{k}/3", "--workers", "1") for k in (1, 2, 3)]
    for process in parts:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert "dataset.json" not in contents_published(out)
    assert run(photos, out, "--finish").returncode == 0
    assert contents(out) == reference[0]


def test_a_second_process_fails_but_resumes_after_the_first_one_died(
    photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    out = tmp_path / "set"
    first = start(photos, out)
    wait_until(lambda: some_shards(out) > 0)
    os.killpg(first.pid, signal.SIGSTOP)  # so that it does not end before the second one starts
    second = run(photos, out)
    assert second.returncode == 1
    assert f"in use by process {first.pid} on {os.uname().nodename}" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    third = run(photos, out)
    assert third.returncode == 0
    assert f"replacing the lock of process {first.pid}" in third.stderr
    assert contents(out) == reference[0]


def test_workers_end_when_their_parent_is_killed(
    photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    out = tmp_path / "set"
    process = start(photos, out, "--workers", "2")
    wait_until(lambda: some_shards(out) > 0)
    everything = descendants(process.pid)
    assert len(workers_of(process.pid)) == 2
    process.kill()  # only the parent
    wait_until(lambda: not any(map(is_running, everything)))
    process.communicate()
    assert run(photos, out).returncode == 0
    assert contents(out) == reference[0]


def test_a_killed_worker_ends_the_conversion_with_one_line(
    photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    out = tmp_path / "set"
    process = start(photos, out, "--workers", "2")
    wait_until(lambda: some_shards(out) > 0)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: a worker process was killed by SIGKILL" in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert run(photos, out).returncode == 0
    assert contents(out) == reference[0]


def test_ctrl_c_ends_at_once_without_incomplete_files(
    photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    out = tmp_path / "set"
    process = start(photos, out, "--workers", "2")
    wait_until(lambda: some_shards(out) > 0)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal, to the whole process group
    _, stderr = process.communicate(timeout=10)
    assert process.returncode != 0
    assert stderr.count("Traceback") <= 1, "at most the KeyboardInterrupt of the parent"
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert run(photos, out).returncode == 0
    assert contents(out) == reference[0]


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Callable[[], None] | None]:
    """Mount a disk of that size; yield a function that enlarges it, or None if mounting is not possible."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))


def test_a_full_disk_is_reported_and_the_conversion_resumes_with_more_space(
    photos: Path, tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    with small_disk(tmp_path / "disk", mib=9) as enlarge:
        out = tmp_path / "disk" / "set"
        limits: dict[str, object] = {} if enlarge else {"preexec_fn": limit_file_size}
        failed = run(photos, out, **limits)
        assert failed.returncode == 1
        (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error")]
        assert ("No space left on device" if enlarge else "File too large") in line
        assert str(out) in line
        assert "run the same command to resume" in line
        assert "dataset.json" not in contents_published(out)
        if enlarge:
            enlarge()
        resumed = run(photos, out)
        assert resumed.returncode == 0, resumed.stderr
        assert contents(out) == reference[0]


def test_finish_reports_missing_shards(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert run(photos, out, "--part", "2/2").returncode == 0
    early = run(photos, out, "--finish")
    assert early.returncode == 1
    assert "first: train-000000.tar" in early.stderr
    assert json.loads((out / ".making" / "plan.json").read_text())["content"]["shards"]["train"] > 4
