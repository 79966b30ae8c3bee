"""Remote sets give the same batches as local ones, even if servers, downloads or the cache fail."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pipeline.plan import Position, ShardRequest, TrainPlan
from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.errors import CacheFull
from pipeline.storage.cache.partial_file import Busy, PartialFile
from pipeline.storage.files import Interrupted
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from pipeline.storage.remote import client as remote
from pipeline.storage.remote import shard_table
from pipeline.storage.remote.errors import RemoteError
from pipeline.storage.remote.shard_set import GIB, RemoteSet, open_set
from shards.errors import ShardSetError, UserError
from shards.format.dataset import ShardSet
from tests.support.cached import cached
from tests.support.remote_sets import (
    batches_of,
    evaluation,
    impatient,
    put,
    same,
    shards_of,
    site,
    size_of,
    train,
    wait_until_staged,
)
from tests.support.serving import Site, serve

__all__ = ["impatient", "site"]  # fixtures


@pytest.mark.parametrize("world", [1, 3])
def test_the_batches_are_those_of_the_local_set_and_each_shard_is_downloaded_once(
    site: Site, photos: Path, tmp_path: Path, world: int
) -> None:
    dataset = open_set(site.url, cache=tmp_path)
    for rank in range(world):
        loader = train(dataset, world=world, rank=rank)
        with loader:
            found = [next(loader)]
            wait_until_staged(tmp_path, 1)
            found += list(loader.stream())
        assert same(found, batches_of(train(ShardSet(photos), world=world, rank=rank)))
    assert same(batches_of(evaluation(dataset)), batches_of(evaluation(ShardSet(photos))))
    assert set(site.whole_reads().values()) <= {1, 2}, "the manifest is read once to name the folder and once to stage"
    assert {name: n for name, n in site.whole_reads().items() if name.endswith("tar") and n > 1} == {}


def test_a_second_run_downloads_no_shard(
    site: Site, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches_of(train(ShardSet(photos)))
    with train(open_set(site.url, cache=tmp_path)) as loader:
        next(loader)
        wait_until_staged(tmp_path, len(shards_of(photos)))
    not_found, lease = set(shards_of(photos)), Cache.lease
    all_leased = threading.Event()

    def watched(cache: Cache, path: Path, *args: Any, **options: Any) -> int | None:
        found = lease(cache, path, *args, **options)
        not_found.difference_update({path.name} if found is not None else ())
        if not not_found:
            all_leased.set()
        return found

    monkeypatch.setattr(Cache, "lease", watched)
    site.log.clear()
    loader = train(open_set(site.url, cache=tmp_path), read_threads=1)
    # The quick check has read some samples. A further read from the server waits until all shards are leased.
    site.before = lambda name, start, stop: void(all_leased.wait(20) or all_leased.set())
    assert same(batches_of(loader), expected)
    assert site.whole_reads().keys() <= {"dataset.json", "train.index.npy"}
    assert sum(site.bytes_read(name) for name in shards_of(photos)) < size_of(tmp_path) / 4


def test_the_first_batch_does_not_wait_for_shards(site: Site, photos: Path, tmp_path: Path) -> None:
    proceed = threading.Event()
    sizes = {shard.name: shard.bytes for shard in ShardSet(photos).split("train").shards}
    site.before = lambda name, start, stop: None if stop - start < sizes.get(name, 1 << 62) else void(proceed.wait(20))
    expected = batches_of(train(ShardSet(photos), epochs=1))
    with train(open_set(site.url, cache=tmp_path), epochs=1) as loader:
        found = list(loader.stream())
        assert not cached(tmp_path, "*.tar")
        proceed.set()
    assert same(found, expected)


def test_the_number_of_requests_ahead_does_not_depend_on_the_number_of_epochs(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested, original = [], TrainPlan.shard_requests

    def counted(*args: Any, **kwargs: Any) -> Iterator[ShardRequest]:
        for request in original(*args, **kwargs):
            requested.append(request)
            yield request

    monkeypatch.setattr(TrainPlan, "shard_requests", counted)
    with train(open_set(site.url, cache=tmp_path), epochs=10**6) as loader:
        next(loader)
    assert 0 < len(requested) < 2 * shard_table.MAX_REQUESTS


def void(_: object) -> None:
    return None


def damage_downloads(site: Site, name: str, times: int) -> None:
    """Flip a bit in the next downloads of a complete shard, but not in samples that are read individually."""
    size = (site.folder / name).stat().st_size
    left = iter(range(times))

    def before(file: str, start: int, stop: int) -> None:
        if file == name and stop - start == size and next(left, None) is not None:
            site.damage[name] = 1

    site.before = before


def test_a_shard_that_was_damaged_in_transfer_is_downloaded_again(site: Site, photos: Path, tmp_path: Path) -> None:
    victim = shards_of(photos)[1]
    damage_downloads(site, victim, times=2)
    with train(open_set(site.url, cache=tmp_path)) as loader:
        found = [next(loader)]
        wait_until_staged(tmp_path, len(shards_of(photos)))
        found += list(loader.stream())
    assert same(found, batches_of(train(ShardSet(photos))))
    assert site.whole_reads()[victim] == 3
    assert cached(tmp_path, victim)[0].read_bytes() == (photos / victim).read_bytes()


def test_a_sample_that_was_damaged_in_transfer_is_read_again(site: Site, photos: Path, tmp_path: Path) -> None:
    dataset = open_set(site.url, cache=tmp_path)
    for shard in shards_of(photos):
        site.damage[shard] = 1
    with SampleReader(open_storage(dataset, "train")) as reader:
        for sample in range(0, dataset.split("train").samples, 7):
            reader.read(np.array([sample])).checked()
    assert not +site.damage


def test_a_shard_that_never_has_the_hash_of_the_manifest_is_an_error(site: Site, photos: Path, tmp_path: Path) -> None:
    victim = shards_of(photos)[1]
    damage_downloads(site, victim, times=10**6)
    with pytest.raises(RemoteError, match=rf"{site.url}/{victim}: downloaded 3 times, .*damaged or outdated"):
        batches_of(train(open_set(site.url, cache=tmp_path), epochs=50))
    assert not cached(tmp_path, f"{victim}*")


def test_an_outdated_shard_is_rejected_before_training(site: Site, photos: Path, tmp_path: Path) -> None:
    dataset = open_set(site.url, cache=tmp_path / "cache")
    site.folder = Path(shutil.copytree(photos, tmp_path / "stale"))
    victim = site.folder / shards_of(photos)[1]
    victim.write_bytes(bytes(victim.stat().st_size))
    message = rf"{site.url}/{victim.name}: neither the first nor the last sample matches the index: .*outdated"
    with pytest.raises(ShardSetError, match=message):
        train(dataset)


def test_requests_are_repeated_after_temporary_failures_of_the_server(site: Site, photos: Path, tmp_path: Path) -> None:
    for name in (*shards_of(photos), "dataset.json", "train.index.npy"):
        site.failures[name] = 3
    assert same(batches_of(train(open_set(site.url, cache=tmp_path))), batches_of(train(ShardSet(photos))))


def test_a_failed_server_raises_an_error_in_the_consumer(
    site: Site, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    dataset = open_set(site.url, cache=tmp_path)
    loader = train(dataset, epochs=50)
    for name in shards_of(photos):
        site.failures[name] = 10**6
    with pytest.raises(RemoteError, match=rf"{site.url}/train-.*: the request failed \d+ times.*503.*data is kept"):
        batches_of(loader)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{site}-that-is-not-there", "dataset.json: not found on the server"),
        ("nonsense://host/set", "nonsense://host/set: .*such as https://host/set or s3://bucket/set"),
    ],
)
def test_a_wrong_url_is_reported_at_once(site: Site, tmp_path: Path, url: str, message: str) -> None:
    site.folder /= "elsewhere"
    with pytest.raises(UserError, match=message):
        open_set(url.format(site=site.url.replace("the-set", "x/y")), cache=tmp_path)


def test_the_command_that_installs_a_missing_package_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3fs.*pip install 'fat-pipeline\[remote\]'"):
        open_set("s3://bucket/set", cache=tmp_path)


def test_a_server_without_ranges_can_be_used(photos: Path, tmp_path: Path) -> None:
    with serve(photos, supports_ranges=False) as site:
        assert same(batches_of(train(open_set(site.url, cache=tmp_path))), batches_of(train(ShardSet(photos))))


def test_file_systems_without_asyncio_can_be_used(photos: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in photos.iterdir():
        memory.pipe(f"/some/set/{path.name}", path.read_bytes())
    dataset = open_set("memory://some/set", cache=tmp_path)
    assert same(batches_of(train(dataset)), batches_of(train(ShardSet(photos))))


def test_an_interrupted_download_is_resumed(site: Site, photos: Path, tmp_path: Path) -> None:
    dataset = open_set(site.url, cache=tmp_path)
    assert isinstance(dataset, RemoteSet)
    victim = ShardSet(photos).split("train").shards[1]
    part = dataset.cache.begin(dataset.path / victim.name, victim.bytes)
    assert isinstance(part, PartialFile)
    with part:
        part.append((photos / victim.name).read_bytes()[:700_000])
    with train(dataset) as loader:
        next(loader)
        wait_until_staged(tmp_path, len(shards_of(photos)))
    assert (victim.name, 700_000, victim.bytes) in site.log
    assert site.whole_reads()[victim.name] == 0
    assert (dataset.path / victim.name).read_bytes() == (photos / victim.name).read_bytes()


def test_the_older_of_two_sets_is_evicted_from_a_cache_that_is_too_small_for_both(
    photos: Path, digits: Path, tmp_path: Path
) -> None:
    limit = (size_of_set(photos) + size_of_set(digits)) * 9 // 10
    largest = 0
    with serve(photos) as one, serve(digits) as other:
        for site, path in ((one, photos), (other, digits), (one, photos)):
            with train(open_set(site.url, cache=tmp_path, cache_gib=limit / GIB)) as loader:
                found = [next(loader)]
                for batch in loader.stream():
                    found.append(batch)
                    largest = max(largest, size_of(tmp_path))
            assert same(found, batches_of(train(ShardSet(path))))
    assert limit // 2 < largest <= limit


def size_of_set(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".tar", ".npy", ".json"))


def test_batches_are_the_same_with_a_cache_that_is_too_small(
    site: Site, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = max(shard.bytes for shard in ShardSet(photos).split("train").shards)
    dataset = open_set(site.url, cache=tmp_path, cache_gib=(shard * 1.5) / GIB)
    with caplog.at_level(logging.WARNING):
        assert same(batches_of(train(dataset, epochs=3)), batches_of(train(ShardSet(photos), epochs=3)))
    assert size_of(tmp_path) <= shard * 1.5


def test_the_least_recently_used_file_is_evicted_but_never_a_leased_one(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    folder, zeros = cache.folder / "set", xxhash.xxh3_64_hexdigest(bytes(400))
    leases = {name: put(cache, name, 400) for name in ("a", "b")}
    with pytest.raises(CacheFull, match=r"no space for c \(400 bytes\): .* limit of 1,000 bytes.*--cache-size"):
        put(cache, "c", 400)
    os.close(leases.pop("a"))
    os.close(leases.pop("b"))
    again = cache.lease(folder / "a", 400, zeros)
    assert again is not None, "a was used after b"
    os.close(again)
    os.close(put(cache, "c", 400))
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c"]
    with pytest.raises(CacheFull, match=r"d has 2,000 bytes, more than the cache's limit of 1,000 bytes"):
        put(cache, "d", 2000)


def test_one_process_at_a_time_downloads_a_file_and_its_space_is_reserved(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    path = cache.folder / "set" / "a"
    part = cache.begin(path, 900)
    assert isinstance(part, PartialFile)
    with part:
        part.append(bytes(10))
        busy = cache.begin(path, 900)
        assert isinstance(busy, Busy)
        assert (busy.done, busy.holder().split(" (")[0]) == (10, f"process {os.getpid()}")
        with pytest.raises(CacheFull):
            cache.begin(path.with_name("b"), 200)
    resumed = cache.begin(path, 900)
    assert isinstance(resumed, PartialFile)
    assert resumed.done == 10
    with resumed:
        pass
    other = cache.begin(path.with_name("b"), 200)
    assert isinstance(other, PartialFile), "an abandoned partial file is evicted"


def test_closing_does_not_wait_for_a_server_that_hangs(site: Site, tmp_path: Path) -> None:
    loader = train(open_set(site.url, cache=tmp_path))
    server_continues = threading.Event()
    answered: list[bool] = []
    site.before = lambda *_: answered.append(server_continues.wait(60))
    ends: list[BaseException] = []

    def consume() -> None:
        try:
            next(loader)
        except BaseException as end:
            ends.append(end)

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.5)
    loader.close()
    assert not answered
    server_continues.set()
    consumer.join(20)
    assert [type(end) for end in ends] in ([Interrupted], [StopIteration])
    assert not [t for t in threading.enumerate() if t.name.startswith(("staging", "shard-reader", "train-loader"))]


def test_a_large_plan_requests_shards_without_permuting_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TrainPlan(np.full(100_000, 10_000), global_batch=1024, seed=0)
    monkeypatch.delattr(TrainPlan, "_block")
    every = plan.shard_requests(Position(1, 500_000), range(128), epochs=9)
    requests = [request for request, _ in zip(every, range(64), strict=False)]
    assert len(requests) == 64
    assert all(len(request.shards) <= 2 for request in requests)


def test_a_local_set_is_not_staged(photos: Path) -> None:
    dataset = open_set(photos)
    assert not isinstance(dataset, RemoteSet)
    assert dataset.path == photos
