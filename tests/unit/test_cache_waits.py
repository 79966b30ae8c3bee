"""Waits for another process that uses the cache: errors name it, waits are limited, samples come from the server."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.cache import folder as cache_folder
from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.folder import LOCK, CacheLocked
from pipeline.storage.remote import staging
from pipeline.storage.remote.shard_set import RemoteSet, open_set
from shards.errors import StorageFailed
from shards.files import waiting
from shards.format.dataset import ShardSet
from tests.support.cached import cached, own_folder
from tests.support.launching import ROOT, environment
from tests.support.remote_sets import batches_of, impatient, same, shards_of, site, train, wait_until_staged
from tests.support.serving import Site
from tests.support.waiting import wait_until

__all__ = ["impatient", "site"]  # fixtures

# Starts to download a file, or acquires the folder's lock, and is then suspended, as by SLURM's gang scheduling.
HOLDER = """
import os, signal, sys
from pathlib import Path
from pipeline.storage.cache.cache import Cache
cache = Cache(Path(sys.argv[1]))
if sys.argv[2] == "lock":
    held = cache._folder.locked(lambda: None)
    held.__enter__()
else:
    held = cache.begin(Path(sys.argv[2]), int(sys.argv[3]))
    held.append(bytes(7))
print("holds", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@contextmanager
def holder(tmp_path: Path, place: Path, *what: object) -> Iterator[int]:
    """Run a process that is suspended while holding the folder's lock or a partial file; yield its process id."""
    command = [sys.executable, "-c", HOLDER, str(place), *map(str, what)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holds\n"
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.01)
            yield process.pid
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "STALLED_SECONDS", 1.0)
    monkeypatch.setattr(cache_folder, "LOCK_SECONDS", 1.0)
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.2)


@pytest.mark.usefixtures("hasty")
def test_the_error_names_a_suspended_process_that_downloads_the_index(
    site: Site, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_set(site.url, cache=tmp_path / "cache")
    index = dataset.split("train").index
    size = (photos / index).stat().st_size
    with holder(tmp_path, tmp_path / "cache", dataset.path / index, size) as pid:
        with pytest.raises(StorageFailed) as error:
            dataset.index("train")
        name = rf"{dataset.path / index}: being downloaded by process {pid} (python"
        assert str(error.value).startswith(name)
        fact = f"which has made no progress beyond 7 of {size:,} bytes for 1 s; end that process, or resume it"
        assert fact in str(error.value)
        assert error.value.exit_code == 1
        assert f"{name}" in caplog.text, "logged before the error"
        assert "still waiting after" in caplog.text
    assert len(dataset.index("train")) == dataset.split("train").samples, "the download of an ended process is resumed"
    assert (index, 7, size) in site.log


@pytest.mark.usefixtures("hasty")
def test_samples_are_read_from_the_server_while_a_suspended_process_downloads_their_shard(
    site: Site, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_set(site.url, cache=tmp_path / "cache")
    victim, *others = ShardSet(photos).split("train").shards
    with holder(tmp_path, tmp_path / "cache", dataset.path / victim.name, victim.bytes) as pid:
        loader = train(dataset, epochs=2)
        with loader, caplog.at_level(logging.WARNING):
            found = [next(loader)]
            wait_until(lambda: f"process {pid}" in caplog.text)
            wait_until_staged(tmp_path / "cache", len(others))
            time.sleep(0.5)
            found += list(loader.stream())
        assert same(found, batches_of(train(ShardSet(photos))))
        assert caplog.text.count("are read individually from the server") == 1
        assert not cached(tmp_path / "cache", victim.name)


@pytest.mark.usefixtures("hasty")
def test_samples_are_read_from_the_server_while_a_suspended_process_holds_the_lock(
    site: Site, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_set(site.url, cache=tmp_path / "cache")
    dataset.index("train")
    with holder(tmp_path, tmp_path / "cache", "lock") as pid:
        with pytest.raises(CacheLocked) as error:
            Cache(tmp_path / "cache")
        path = own_folder(tmp_path / "cache") / LOCK
        assert str(error.value).startswith(f"{path}: the lock of the cache is held by process {pid} (python")
        assert "suspended): timed out after 1 s; end that process, or resume it" in str(error.value)
        assert error.value.exit_code == 1
        caplog.clear()
        loader = train(dataset)
        with loader:
            found = [next(loader)]
            wait_until(lambda: "read individually" in caplog.text)
            found += list(loader.stream())
        assert same(found, batches_of(train(ShardSet(photos))))
        assert not cached(tmp_path / "cache", "*.tar")


def test_closing_a_loader_does_not_wait_for_the_lock(site: Site, tmp_path: Path) -> None:
    """The timeout of the lock is a minute."""
    dataset = open_set(site.url, cache=tmp_path / "cache")
    dataset.index("train")
    with holder(tmp_path, tmp_path / "cache", "lock"):
        loader = train(dataset)
        next(loader)
        done = threading.Event()
        closing = threading.Thread(target=lambda: (loader.close(), done.set()))
        closing.start()
        assert done.wait(20)
        closing.join()


INTERRUPTED = """
import sys
from pathlib import Path
from pipeline.storage.cache.cache import Cache
print("waits", flush=True)
Cache(Path(sys.argv[1]))
"""


def test_ctrl_c_ends_a_process_that_waits_for_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path, tmp_path / "cache", "lock"):
        command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "cache")]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
            assert "KeyboardInterrupt" in stderr


def test_a_shard_is_read_from_the_server_if_a_foreign_file_has_its_name(
    site: Site, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_set(site.url, cache=tmp_path)
    victim = dataset.path / shards_of(photos)[0]
    victim.write_bytes(b"mine")
    with train(dataset) as loader:
        found = [next(loader)]
        wait_until_staged(tmp_path, len(shards_of(photos)))
        found += list(loader.stream())
    assert same(found, batches_of(train(ShardSet(photos))))
    assert victim.read_bytes() == b"mine"
    assert caplog.text.count(f"{victim.name}: was not created by this cache and is not the file of the set (") == 1


@pytest.mark.parametrize(
    "damage",
    [(name, how) for name in ("train.index.npy", "dataset.json", "train-000000.tar") for how in ("altered", "emptied")],
)
def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(
    site: Site, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: tuple[str, str]
) -> None:
    name, how = damage
    dataset = open_set(site.url, cache=tmp_path)
    assert isinstance(dataset, RemoteSet)
    dataset.index("train")
    entry = next(shard for shard in dataset.split("train").shards if shard.name == "train-000000.tar")
    whole = staging.whole_file(entry.name, entry.bytes, entry.hash)
    os.close(staging.stage_now(whole, dataset._remote, dataset.cache, dataset.path))
    path = dataset.path / name
    if how == "emptied":
        os.truncate(path, 0)
    elif name.endswith(".npy"):
        index = np.load(path, mmap_mode="r+")
        index["label"] = 1 - index["label"]
        index.flush()
        del index
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = open_set(site.url, cache=tmp_path)
    assert np.array_equal(again.index("train"), ShardSet(photos).index("train"))
    with train(again) as loader:
        found = [next(loader)]
        wait_until(lambda: cached(tmp_path, "train-000000.tar") and path.read_bytes() == (photos / name).read_bytes())
        found += list(loader.stream())
    assert same(found, batches_of(train(ShardSet(photos))))
    assert f"{name}: damaged in the cache (" in caplog.text
