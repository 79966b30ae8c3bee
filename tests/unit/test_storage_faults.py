"""Failures of local storage: reads are retried for a while, then the error blames the storage and not the set."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.run import files as run_files
from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.plan import TrainPlan
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.files import LocalFiles
from pipeline.storage.placement import open_storage
from pipeline.storage.quick_check import quick_check
from pipeline.storage.reader import SampleReader
from shards.errors import ShardSetError, StorageFailed
from shards.files import private_folder, regular, retry
from shards.format.dataset import ShardSet

IDS = np.arange(30)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "_retry_warnings", retry.WarningThrottle())


Fail = Callable[..., None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make the next reads from storage fail, and all reads from the page cache."""
    real = os.preadv

    def fail(number: int, times: int = 10**6) -> None:
        left = iter(range(times))

        def preadv(handle: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if flags:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if next(left, None) is not None:
                raise OSError(number, os.strerror(number))
            return real(handle, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    return fail


def reader_of(path: Path) -> SampleReader:
    return SampleReader(open_storage(ShardSet(path), "train"), threads=2)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_temporarily_is_retried(
    digits: Path, fail: Fail, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with reader_of(digits) as reader:
        expected = reader.read(IDS).checked().images
        fail(number, times=9)
        with caplog.at_level(logging.WARNING):
            found = reader.read(IDS).checked().images
    assert all(map(np.array_equal, found, expected))
    (line,) = caplog.messages
    assert "train-000000.tar" in line
    assert "retrying for at most" in line


def test_a_stale_handle_is_replaced(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, stale = os.preadv, set()

    def preadv(handle: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EAGAIN, "again")
        if handle in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with reader_of(digits) as reader:
        reader.read(IDS).checked()
        stale |= {handle.number for handle in reader._storage.files._open.values()}  # type: ignore[attr-defined]
        # Occupy the number of the stale descriptor, so that the file is reopened with another one.
        kept = [os.dup2(os.open(os.devnull, os.O_RDONLY), os.dup(0)) for _ in stale]
        reader.read(IDS).checked()
    for handle in kept:
        os.close(handle)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_the_quick_check_distinguishes_failing_storage_from_an_outdated_set(
    digits: Path, fail: Fail, number: int
) -> None:
    fail(number)
    dataset = ShardSet(digits)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=64, seed=0)
    recipe, shape = augment_recipe("light", size=32), BatchShape(global_batch=64)
    options = LoaderOptions(decode_threads=1, bad_samples="skip:9")
    with pytest.raises(StorageFailed, match=rf"train-000000.tar: cannot be read \({os.strerror(number)}") as raised:
        TrainLoader(dataset, plan, shape, recipe, epochs=1, device=torch.device("cpu"), options=options)
    assert raised.value.exit_code == 1
    assert "outdated" not in str(raised.value)


def test_a_sample_that_storage_failed_to_read_is_not_replaced(digits: Path, fail: Fail) -> None:
    bad = BadSamples(budget=99, samples=ShardSet(digits).split("train").samples, seed=0)
    with reader_of(digits) as reader:
        fail(errno.EIO)
        with pytest.raises(StorageFailed, match=r"train-000000.tar.*\(sample \d+\)"):
            bad.replace_bad_samples(reader.read(IDS), reader, epoch=0)
    assert bad.count == 0


def test_a_truncated_file_is_an_error_of_the_set(digits: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(digits, tmp_path / "set"))
    os.truncate(ShardSet(copy).shard_path("train", 0), 2000)
    with reader_of(copy) as reader:
        with pytest.raises(ShardSetError, match="truncated") as raised:
            quick_check(ShardSet(copy), "train", reader)
        assert raised.value.exit_code == 2
        assert {fault.error.exit_code for fault in reader.read(IDS).faults} == {2}


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("verify", "train-000000.tar"),
        ("verify", "train-000000.idx"),
        ("verify", "train.index.npy"),
        ("verify", "dataset.json"),
        ("verify", ""),
        ("info", "train.index.npy"),
        ("look", "train-000000.tar"),
        ("look", ""),
    ],
)
def test_a_file_without_read_permission_is_a_failure_of_storage(
    digits: Path, tmp_path: Path, command: str, file: str
) -> None:
    copy = Path(shutil.copytree(digits, tmp_path / "set"))
    (copy / file).chmod(0)
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    arguments = [command, str(copy), *(["--out", str(tmp_path / "b.png")] if command == "look" else [])]
    done = subprocess.run(
        [*drop, sys.executable, "-m", "launch.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (copy / file).chmod(0o755)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    output = done.stdout + done.stderr
    assert f"{copy / file}" in output
    assert "cannot be read" in output
    assert "Permission denied" in output


def open_of_a_reader(path: Path) -> int:
    files = LocalFiles([path])
    files.read(0, np.empty(1, np.uint8), 0)
    return os.dup(files._open[0].number)


def open_of_a_cache(path: Path) -> int:
    folder = private_folder.open_folder(path.parent, remedy="")
    try:
        return private_folder.open_file(path.name, os.O_RDWR, folder=folder, path=path, remedy="")
    finally:
        os.close(folder)


@pytest.mark.parametrize("open_file", [open_of_a_reader, open_of_a_cache, regular.open_regular, run_files.open_regular])
def test_reads_wait_for_a_file_that_another_host_has_locked(tmp_path: Path, open_file: Callable[[Path], int]) -> None:
    """O_NONBLOCK is set only while the file is opened: with it, a read on Lustre fails with EAGAIN instead of waiting
    for the lock of another client."""
    (tmp_path / "file").write_bytes(b"1")
    handle = open_file(tmp_path / "file")
    try:
        assert os.get_blocking(handle)
    finally:
        os.close(handle)
