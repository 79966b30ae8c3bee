"""A cache whose disk others have filled: slower, never wrong."""

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
    """A file system of its own with room for one shard and a half."""
    with disks.small_disk(tmp_path / "disk", "3m") as folder:
        yield folder


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_cache_disk_costs_speed_alone(
    site: Site, photos: Path, small_disk: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """Others fill it before a shard is begun, or while it is written: its samples are read from the server."""
    dataset = open_set(site.url, cache=small_disk / "cache", cache_gib=1)
    dataset.index("train")
    shards = {shard.name: shard.bytes for shard in ShardSet(photos).split("train").shards}
    if when == "before":
        fill(small_disk)
    else:
        site.before = lambda name, start, stop: fill(small_disk) if stop - start == shards.get(name) else None
    with caplog.at_level(logging.WARNING):
        assert same(batches_of(train(dataset)), batches_of(train(ShardSet(photos))))
    assert "what finds no room is read from the server sample by sample" in caplog.text
    assert not cached(small_disk / "cache", "*.tar*")


def test_what_was_written_when_the_disk_was_full_is_in_nobody_s_way(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", 1 << 30)
    part = cache.begin(cache.folder / "set" / "a", 2 << 20)
    assert isinstance(part, PartialFile)
    with part:
        part.append(bytes(1 << 20))
        fill(small_disk)
        with pytest.raises(DiskFull, match=r"--cache .*/cache: No space left on device; free some space there"):
            part.append(bytes(1 << 20))
        assert not list((cache.folder / "set").iterdir())


def test_files_of_the_cache_make_room_for_others_on_a_full_disk(small_disk: Path) -> None:
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
        with pytest.raises(DiskFull, match=r"no space left on the device for the 2,097,152 bytes of d"):
            cache.begin(cache.folder / "set" / "d", 1 << 21)


def says(patch: pytest.MonkeyPatch, *, total: int, free: int) -> None:
    """The file system is as large as this."""
    usage = shutil.disk_usage("/")
    patch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=total, used=total - free, free=free))


@pytest.mark.parametrize(("used", "free"), [((), 0), (("b",), 100)])
def test_files_stay_where_removing_them_would_not_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: tuple[str, ...], free: int
) -> None:
    """Others have filled the disk: all that may be removed is less than what is needed."""
    cache = Cache(tmp_path, 10_000)
    leases = []
    for name in ("a", "b"):
        leases.append(put(cache, name, 100))
        if name not in used:
            os.close(leases.pop())
    says(monkeypatch, total=10_000, free=free)
    with pytest.raises(DiskFull, match="no space left on the device for the 250 bytes of c"):
        cache.begin(cache.folder / "set" / "c", 250)
    assert sorted(path.name for path in (cache.folder / "set").iterdir()) == ["a", "b"]
    says(monkeypatch, total=10_000, free=free + 50)
    os.close(put(cache, "c", 200))
    assert sorted(path.name for path in (cache.folder / "set").iterdir()) == [*used, "c"]
    for lease in leases:
        os.close(lease)


def test_a_file_system_that_does_not_say_how_large_it_is_holds_what_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, total=0, free=0)
    cache = Cache(tmp_path, 250)
    for name in ("a", "b", "c"):
        os.close(put(cache, name, 100))
    assert sorted(path.name for path in (cache.folder / "set").iterdir()) == ["b", "c"]
    with pytest.raises(CacheFull, match="give a larger --cache-size"):
        Cache(tmp_path).begin(cache.folder / "set" / "d", 300)


def test_a_disk_that_is_full_at_once_is_no_bad_input(site: Site, small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", 1 << 30)
    fill(small_disk)
    with pytest.raises(DiskFull, match=r"--cache .*/cache: no space left on the device .* give another folder") as full:
        RemoteSet(site.url, cache)
    assert full.value.exit_code == 1
