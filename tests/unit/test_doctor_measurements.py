"""Measurements of `pipeline doctor`: the estimators, and what they do on this machine."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import shutil
import signal
import stat
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.doctor.measurements import device, nvidia_smi
from launch.doctor.measurements.clock import clock_offsets
from launch.doctor.measurements.device import measure_device
from launch.doctor.measurements.input import (
    PIECE,
    ShardFile,
    _local,
    best_rate,
    files_of_rank,
    measure_decoding,
    measure_reading,
    open_input,
)
from launch.doctor.measurements.network import MIN_PAIR_ROUNDS, pair_rounds
from launch.doctor.measurements.nvidia_smi import GpuQuery, parse
from pipeline.storage.files import read_cached
from shards.cores import cores, quota_periods
from shards.errors import ShardSetError
from tests.support.commands import run_pipeline
from tests.support.cpu_quota import cpu_quota
from tests.support.launching import python
from tests.support.serving import serve
from tests.support.waiting import wait_until

CPU = torch.device("cpu")


# -- clocks ------------------------------------------------------------------------------------------------------------


@given(
    skews=st.lists(st.floats(-1000, 1000), min_size=1, max_size=4),
    delays=st.lists(st.lists(st.floats(1e-5, 0.5), min_size=5, max_size=5), min_size=5, max_size=5),
)
def test_the_estimated_offset_is_within_its_error(skews: list[float], delays: list[list[float]]) -> None:
    """Whatever the delays of the messages are: an all-gather ends after all ranks have begun it."""
    skews = [0.0, *skews]
    sent: list[list[int]] = [[] for _ in skews]
    received: list[list[int]] = [[] for _ in skews]
    now = 1e6
    for round_delays in delays:
        begun = [now + delay for delay in round_delays[: len(skews)]]
        for rank, skew in enumerate(skews):
            sent[rank].append(int((begun[rank] + skew) * 1e9))
            received[rank].append(int((max(begun) + round_delays[rank] + skew) * 1e9))
        now = max(begun) + 1
    for skew, found in zip(skews, clock_offsets(sent, received), strict=True):
        assert abs(found.offset - skew) <= found.error + 1e-6
        assert found.error <= 0.5


def test_the_round_with_the_shortest_delays_determines_the_offset() -> None:
    second = 10**9
    sent = [[0, 10 * second], [5 * second, 15 * second]]
    received = [[8 * second, 10 * second + 1000], [13 * second, 15 * second + 1000]]
    assert clock_offsets(sent, received)[1] == pytest.approx((5.0, 1e-6))


# -- pairs of hosts ----------------------------------------------------------------------------------------------------


@given(count=st.integers(2, 200))
def test_every_round_consists_of_disjoint_pairs_and_no_pair_meets_twice(count: int) -> None:
    rounds = pair_rounds(count)
    met = Counter(pair for pairs in rounds for pair in pairs)
    assert all(number == 1 for number in met.values())
    for pairs in rounds:
        hosts = [host for pair in pairs for host in pair]
        assert len(hosts) == len(set(hosts)) == count - count % 2
    assert len(rounds) <= max(MIN_PAIR_ROUNDS, count.bit_length())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_pairs_of_few_hosts_meet(count: int) -> None:
    assert sum(map(len, pair_rounds(count))) == count * (count - 1) // 2


# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_cpu_has_a_speed_and_keeps_its_number_of_threads() -> None:
    threads = torch.get_num_threads()
    found = measure_device(CPU, threads=2, seconds=0.2)
    assert torch.get_num_threads() == threads
    assert 1e8 < found.matmul < 1e14
    assert 1e7 < found.copy < 1e13
    assert found.cpu_received is not None
    assert 0 < found.cpu_received <= 1


def test_the_speed_of_a_thread_does_not_depend_on_the_number_of_threads_that_run() -> None:
    """Ten threads on fewer cores: each waits most of the time, which is not part of its speed."""
    few = measure_device(CPU, threads=1, seconds=0.3)
    many = measure_device(CPU, threads=10 * cores(), seconds=0.6)
    assert many.cpu_received is not None
    assert many.cpu_received < 0.5
    assert many.matmul > 5 * cores() * few.matmul


def test_a_rank_with_a_gpu_measures_its_cpu_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU itself is replaced: ten threads on each core wait most of the time."""
    monkeypatch.setattr(device, "_measure_gpu", lambda *_: device.DeviceSpeed(matmul=1.0, copy=2.0))
    found = measure_device(torch.device("cuda", 0), threads=10 * cores(), seconds=0.6)
    assert (found.matmul, found.copy) == (1.0, 2.0)
    assert found.cpu_received is not None
    assert found.cpu_received < 0.5


def test_a_thread_that_fails_does_not_leave_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10))

    def fails_second() -> tuple[object, float]:
        if next(calls) == 1:
            raise MemoryError("no memory")
        return lambda: None, 1.0

    monkeypatch.setattr(device, "_multiplication", fails_second)
    with pytest.raises(MemoryError):
        measure_device(CPU, threads=3, seconds=0.05)


IN_A_QUOTA = """
import sys
from pathlib import Path
import torch
from launch.doctor.measurements.device import measure_device
Path(sys.argv[1]).write_text("0")
found = measure_device(torch.device("cpu"), threads=1, seconds=1.0)
print(found.throttled, found.cpu_received)
"""


def test_a_cpu_quota_is_found_by_its_periods(tmp_path: Path) -> None:
    with cpu_quota(0.1) as processes:
        done = python(tmp_path, "-c", IN_A_QUOTA, processes)
    assert done.returncode == 0, done.stderr
    throttled, received = map(float, done.stdout.split())
    assert throttled > 0.5
    assert received < 0.5


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "50000 100000", "cpu.stat": "usage_usec 9\nnr_periods 40\nnr_throttled 30\n"}, (40, 30)),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000", "cpu.stat": "nr_periods 4\nnr_throttled 3\n"},
         (4, 3)),
        ({"cpu.max": "max 100000", "cpu.stat": "nr_periods 40\nnr_throttled 30\n"}, None),
        ({"cpu.max": "50000 100000"}, None),
        ({"cpu.max": "50000 100000", "cpu.stat": "garbage\n"}, None),
    ],
)  # fmt: skip
def test_periods_of_a_quota_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: tuple[int, int] | None
) -> None:
    own = tmp_path / "own"
    own.write_text("0::/a\n4:cpu:/a\n")
    folder = tmp_path / "cgroup" / ("cpu/a" if "cpu.cfs_quota_us" in files else "a")
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.setattr("shards.cores.CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("shards.cores.OWN_GROUPS", own)
    assert quota_periods() == expected


def test_periods_are_those_of_the_smallest_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    for group, quota, periods in (("job", 400_000, 7), ("job/step", 100_000, 8)):
        (tmp_path / group).mkdir()
        (tmp_path / group / "cpu.max").write_text(f"{quota} 100000")
        (tmp_path / group / "cpu.stat").write_text(f"nr_periods {periods}\nnr_throttled 1\n")
    monkeypatch.setattr("shards.cores.CGROUPS", tmp_path)
    monkeypatch.setattr("shards.cores.OWN_GROUPS", own)
    assert quota_periods() == (8, 1)


LINES = {
    "580.65.06, 1980, 1980, 3201, 3201, 61, 0, 0x0000000000000004": ((1980, 0), ("power cap",)),
    "535.104.05, 1200, 1410, 1593, 1593, 88, 3, 0x0000000000000060": (
        (1200, 3),
        ("software thermal slowdown", "hardware thermal slowdown"),
    ),
    "580.65.06, 300, 2100, 405, 9001, 40, [N/A], 0x0000000000000001": ((300, None), ()),
    "470.82.01, [Not Supported], [Not Supported], [N/A], [N/A], 40, [N/A], Not Active": ((None, None), ()),
}


@pytest.mark.parametrize("line", LINES)
def test_output_of_nvidia_smi_is_parsed(line: str) -> None:
    (clock, errors), reasons = LINES[line]
    found = parse(line + "\n")
    assert found is not None
    assert (found.clock, found.ecc_uncorrected, found.throttle_reasons) == (clock, errors, reasons)
    assert line.startswith(f"{found.driver},")


@pytest.mark.parametrize("text", ["", "No devices were found\n", "[N/A], 1, 1, 1, 1, 1, 1, 0x0", "1, 2, 3"])
def test_other_output_of_nvidia_smi_is_ignored(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_old_and_new_versions_of_nvidia_smi_are_queried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """Each version rejects a query that has a field it does not know."""
    program = tmp_path / "nvidia-smi"
    line = next(iter(LINES))
    program.write_text(
        f'#!/bin/sh\ncase "$*" in --id=00000000:65:00.0*{known}*) echo "{line}";; '
        '*) echo "not a valid field"; exit 2;; esac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with GpuQuery("00000000:65:00.0") as query:
        pass
    assert query.state == parse(line)


def test_without_nvidia_smi_the_state_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with GpuQuery("00000000:65:00.0") as query:
        assert query.done()
    assert query.state is None


def test_an_nvidia_smi_that_does_not_end_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the driver of a GPU that no longer responds, where not even SIGKILL ends it."""
    program, blocked = tmp_path / "nvidia-smi", tmp_path / "blocked"
    program.write_text(f'#!/bin/sh\nsleep 600 &\necho $! >> "{blocked}"\nwait\n')  # `sleep` keeps the output open
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(nvidia_smi, "TIMEOUT_SECONDS", 0.2)
    with GpuQuery("00000000:65:00.0") as query:
        wait_until(lambda: blocked.exists() and len(blocked.read_text().split()) == 2, "the programs")
    assert query.timed_out
    assert query.state is None
    for pid in map(int, blocked.read_text().split()):
        os.kill(pid, signal.SIGKILL)  # fails if it has ended


# -- input -------------------------------------------------------------------------------------------------------------


@given(files=st.integers(1, 40), ranks=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_ranks_read_different_shards(files: int, ranks: int, seed: int) -> None:
    shards = tuple(ShardFile(str(number), 1) for number in range(files))
    parts = [files_of_rank(shards, rank=rank, ranks=ranks, seed=seed) for rank in range(ranks)]
    assert all(parts)
    assert {file for part in parts for file in part} == set(shards)
    if files >= ranks:
        assert sum(map(len, parts)) == files


def test_the_first_shards_are_not_always_read_by_the_first_host() -> None:
    """A file server has cached those that an earlier job has read, on fewer hosts."""
    shards = tuple(ShardFile(str(number), 1) for number in range(1000))
    cached = [0, 0, 0]
    for rank in range(24):
        cached[rank // 8] += int(files_of_rank(shards, rank=rank, ranks=24, seed=0)[0].name) < 500
    assert min(cached) > 0
    assert max(cached) < 8


def test_the_page_cache_is_dropped_before_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with path.open("wb") as file:
        file.write(bytes(4 * PIECE))
        file.flush()
        os.fsync(file.fileno())
    last = np.empty(4096, np.uint8)
    with path.open("rb") as file:
        if not read_cached(file.fileno(), last, 4 * PIECE - 4096):
            pytest.skip("this file system does not tell what is in the page cache")
        piece = next(iter(_local(tmp_path)(ShardFile(path.name, 4 * PIECE))))
        assert len(piece) == PIECE
        assert not read_cached(file.fileno(), last, 4 * PIECE - 4096)


def test_a_truncated_shard_is_an_error(photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(photos, copy)
    found = open_input(copy)
    (copy / found.files[0].name).write_bytes(b"short")
    with pytest.raises(ShardSetError, match="truncated"):
        measure_reading(found, rank=0, ranks=1, seconds=0.05)


def test_a_slow_server_is_measured_in_time(photos: Path) -> None:
    def slow(name: str, start: int, stop: int) -> None:
        if name != "dataset.json":
            time.sleep(0.25)

    with serve(photos) as site:
        fast = measure_reading(open_input(site.url), rank=0, ranks=1, seconds=0.5)
    with serve(photos, before=slow) as site:
        late = measure_reading(open_input(site.url), rank=0, ranks=1, seconds=1.0)
    assert 0 < late.rate < fast.rate / 2
    assert fast.beginning[: len(late.beginning)] == late.beginning


def test_a_server_without_range_requests_is_measured(photos: Path) -> None:
    with serve(photos, supports_ranges=False) as site:
        assert measure_reading(open_input(site.url), rank=1, ranks=2, seconds=0.3).rate > 0


def test_decoding_is_proportional_to_the_cores(photos: Path) -> None:
    found = open_input(photos)
    beginning = measure_reading(found, rank=0, ranks=1, seconds=0.05).beginning
    one, eight = (measure_decoding(found, beginning, cores=cores, seconds=0.2) for cores in (1, 8))
    assert one is not None
    assert eight is not None
    assert 4 < eight / one < 16


def test_an_incomplete_image_at_the_end_of_the_bytes_is_not_decoded(photos: Path) -> None:
    found = open_input(photos)
    beginning = measure_reading(found, rank=0, ranks=1, seconds=0.05).beginning
    with tarfile.open(fileobj=io.BytesIO(beginning)) as tar:
        second = next(itertools.islice((member for member in tar if member.name.endswith(".jpg")), 1, None))
    cut = beginning[: second.offset_data + second.size // 2]
    assert measure_decoding(found, cut, cores=1, seconds=0.05) is not None


def test_stored_pixels_are_not_decoded(photos: Path) -> None:
    found = dataclasses.replace(open_input(photos), pixels=True)
    assert measure_decoding(found, b"", cores=1, seconds=0.1) is None


def test_a_beton_is_divided_among_the_ranks(photos: Path, tmp_path: Path) -> None:
    run_pipeline("shard", photos.parent / "images", "--out", tmp_path / "set", "--format", "ffcv", "--shard-size", "2")
    found = open_input(tmp_path / "set")
    assert not found.tars
    assert sum(file.size for file in found.files) == (tmp_path / "set" / found.files[0].name).stat().st_size
    assert measure_reading(found, rank=1, ranks=2, seconds=0.05).rate > 0


def test_the_fastest_block_counts() -> None:
    assert best_rate([0.0, 1.0, 2.0, 3.0], [0, 100, 900, 1000], shortest=0.5) == 800
    assert best_rate([0.0, 1.0, 1.01], [0, 100, 900], shortest=0.5) == 100
    assert best_rate([0.0, 0.1], [0, 100], shortest=0.5) == 1000
