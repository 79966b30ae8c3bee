"""A cache on a disk that other programs have filled: samples are read more slowly, but correctly."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.errors import CacheFull, DiskFull
from pipeline.storage.cache.partial_file import PartialFile
from pipeline.storage.remote.shard_set import RemoteSet, open_set
from shards.format.dataset import ShardSet
from tests.support import disks
from tests.support.cached import cached
from tests.support.disks import fill
from tests.support.remote_sets import batches_of, impatient, put, same, site, train
from tests.support.serving import Site

__all__ = ["impatient", "site"]  # fixtures


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system with space for one and a half shards."""
    with disks.small_disk(tmp_path / "disk", "3m") as folder:
        yield folder


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_samples_are_read_from_the_server_when_the_disk_of_the_cache_is_full(
    site: Site, photos: Path, small_disk: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """The disk becomes full before a shard is downloaded, or during its download."""
    dataset = open_set(site.url, cache=small_disk / "cache", cache_gib=1)
    dataset.index("train")
    shards = {shard.name: shard.bytes for shard in ShardSet(photos).split("train").shards}
    if when == "before":
        fill(small_disk)
    else:
        site.before = lambda name, start, stop: fill(small_disk) if stop - start == shards.get(name) else None
    with caplog.at_level(logging.WARNING):
        assert same(batches_of(train(dataset)), batches_of(train(ShardSet(photos))))
    assert "samples of shards that do not fit are read individually from the server" in caplog.text
    assert not cached(small_disk / "cache", "*.tar*")


def test_a_partial_file_is_removed_when_the_disk_is_full(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", 1 << 30)
    part = cache.begin(cache.folder / "set" / "a", 2 << 20)
    assert isinstance(part, PartialFile)
    with part:
        part.append(bytes(1 << 20))
        fill(small_disk)
        with pytest.raises(DiskFull, match=r"--cache .*/cache: No space left on device; free disk space"):
            part.append(bytes(1 << 20))
        assert not list((cache.folder / "set").iterdir())


def test_cached_files_are_evicted_when_the_disk_is_full_though_the_cache_is_not(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", 1 << 30)
    for name in ("a", "b"):
        part = cache.begin(cache.folder / "set" / name, 1 << 20)
        assert isinstance(part, PartialFile)
        with part:
            part.append(bytes(1 << 20))
            os.close(part.finish())
    part = cache.begin(cache.folder / "set" / "c", 3 << 19)
    assert isinstance(part, PartialFile)
    with part:
        assert [path.name for path in sorted((cache.folder / "set").iterdir())][:1] == ["b"]
        with pytest.raises(DiskFull, match=r"no space left on the device for d \(2,097,152 bytes\)"):
            cache.begin(cache.folder / "set" / "d", 1 << 21)


def set_disk_usage(patch: pytest.MonkeyPatch, *, total: int, free: int) -> None:
    """Let the file system report this size."""
    usage = shutil.disk_usage("/")
    patch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=total, used=total - free, free=free))


@pytest.mark.parametrize(("used", "free"), [((), 0), (("b",), 100)])
def test_no_file_is_evicted_if_that_does_not_free_enough_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: tuple[str, ...], free: int
) -> None:
    """Other programs have filled the disk, and the unused cached files are smaller than the new file."""
    cache = Cache(tmp_path, 10_000)
    leases = []
    for name in ("a", "b"):
        leases.append(put(cache, name, 100))
        if name not in used:
            os.close(leases.pop())
    set_disk_usage(monkeypatch, total=10_000, free=free)
    with pytest.raises(DiskFull, match=r"no space left on the device for c \(250 bytes\)"):
        cache.begin(cache.folder / "set" / "c", 250)
    assert sorted(path.name for path in (cache.folder / "set").iterdir()) == ["a", "b"]
    set_disk_usage(monkeypatch, total=10_000, free=free + 50)
    os.close(put(cache, "c", 200))
    assert sorted(path.name for path in (cache.folder / "set").iterdir()) == [*used, "c"]
    for lease in leases:
        os.close(lease)


def test_a_file_system_that_does_not_report_its_size_is_used_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_disk_usage(monkeypatch, total=0, free=0)
    cache = Cache(tmp_path, 250)
    for name in ("a", "b", "c"):
        os.close(put(cache, name, 100))
    assert sorted(path.name for path in (cache.folder / "set").iterdir()) == ["b", "c"]
    with pytest.raises(CacheFull, match="specify a larger --cache-size"):
        Cache(tmp_path).begin(cache.folder / "set" / "d", 300)


def test_a_full_disk_is_not_an_input_error(site: Site, small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", 1 << 30)
    fill(small_disk)
    with pytest.raises(DiskFull, match=r"--cache .*/cache: no space left on the device .*another folder") as raised:
        RemoteSet(site.url, cache)
    assert raised.value.exit_code == 1
