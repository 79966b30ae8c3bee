"""The memory cache: the same samples, crops, operations and pixels as without it, and no reads of cached samples."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.decode.resize import resized
from pipeline.loader import Batch, LoaderOptions, TrainLoader
from pipeline.loaders import node_cache
from pipeline.plan import TrainPlan
from pipeline.storage.files import LocalFiles
from pipeline.storage.memory_cache.layout import CacheLayout, scaled_windows, stored_sizes
from pipeline.storage.memory_cache.shared_pixels import SharedPixels, StoredFlags, allocate, open_shared
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.format.index import INDEX_DTYPE
from shards.memory import GIB
from tests.support.commands import run_pipeline
from tests.support.leftovers import nothing_is_left_behind

CPU = torch.device("cpu")
GLOBAL = 24
WHOLE_SET = 1.0  # GiB, more than all photos need
PART = 0.02  # GiB: about half of the photos
LIGHT = augment_recipe("light", size=64)


def loader(path: Path, recipe: AugmentRecipe = LIGHT, *, epochs: int = 2, **options: Any) -> TrainLoader:
    dataset = ShardSet(path)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, pairs=recipe.mixes)
    names = ("world", "rank", "micro_batch")
    shape = {name: options.pop(name) for name in names if name in options}
    batch_shape = BatchShape(global_batch=GLOBAL, pairs=recipe.mixes, **shape)
    chosen = LoaderOptions(**options)
    return TrainLoader(dataset, plan, batch_shape, recipe, epochs=epochs, device=CPU, options=chosen)


def batches_of(path: Path, recipe: AugmentRecipe = LIGHT, **options: Any) -> list[Batch]:
    with loader(path, recipe, **options) as batches:
        return list(batches.stream())


def assert_equal_batches(found: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def index_of(sizes: list[tuple[int, int]]) -> np.ndarray:
    index = np.zeros(len(sizes), INDEX_DTYPE)
    index["height"], index["width"] = np.array(sizes).T
    return index


SIZES = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=40)


def test_the_seed_chooses_the_samples() -> None:
    index, budget = index_of([(10, 10)] * 100), 4096 + 50 * 300
    layouts = [CacheLayout.of(index, budget=budget, short_side=None, seed=seed) for seed in (0, 0, 1)]
    kept = [layout.keeps(np.arange(100)) for layout in layouts]
    assert kept[0].sum() == 50
    assert kept[0].tolist() == kept[1].tolist()
    assert kept[0].tolist() != kept[2].tolist()
    assert 0 < kept[0][:50].sum() < 50, "not the first samples of the set"


@given(SIZES, st.integers(0, 2_000_000), st.one_of(st.none(), st.integers(1, 300)), st.integers(0, 3))
def test_samples_are_kept_within_the_budget_and_do_not_overlap(
    sizes: list[tuple[int, int]], budget: int, short_side: int | None, seed: int
) -> None:
    index = index_of(sizes)
    try:
        layout = CacheLayout.of(index, budget=budget, short_side=short_side, seed=seed)
    except UserError as error:
        assert "too small for one image" in str(error)  # noqa: PT017
        return
    assert layout.size <= budget
    kept = np.flatnonzero(layout.keeps(np.arange(len(index))))
    assert layout.kept == len(kept) > 0
    starts, ends = layout.offsets[kept], layout.offsets[kept] + 3 * layout.heights[kept] * layout.widths[kept]
    assert starts[0] >= len(index), "the flags come first"
    assert (starts[1:] >= ends[:-1]).all()
    assert ends[-1] == layout.size
    # A larger cache keeps the same samples, and more.
    larger = CacheLayout.of(index, budget=2 * budget, short_side=short_side, seed=seed)
    assert larger.keeps(kept).all()


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 400))
def test_shrunk_images_have_the_short_side_and_keep_their_aspect_ratio(height: int, width: int, side: int) -> None:
    (found,) = np.stack(stored_sizes(np.array([height]), np.array([width]), side), axis=1).tolist()
    short = min(height, width)
    if short <= side:
        assert found == [height, width]
    else:
        assert min(found) == side
        assert np.abs(np.array(found) - np.array([height, width]) * side / short).max() <= 0.5


@given(st.data())
def test_scaled_windows_lie_in_the_stored_image_within_half_a_pixel(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 3000))
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    high, wide = data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x))
    stored = np.stack(stored_sizes(np.array([height]), np.array([width]), data.draw(st.integers(1, 400))), axis=1)
    sides, window = np.array([[height, width]]), np.array([[y, x, high, wide]], np.int32)
    (found,) = scaled_windows(window, sides, stored)
    assert (found[:2] >= 0).all()
    assert (found[2:] >= 1).all()
    assert (found[:2] + found[2:] <= stored[0]).all()
    exact = window[0].reshape(2, 2) * (stored / sides)
    assert np.abs(found[:2] - exact[0]).max() <= 1  # 1 where the window would be empty
    assert (np.abs(found[2:] - exact[1]) <= 1).all() or found[2:].min() == 1
    if (stored == sides).all():
        assert found.tolist() == window[0].tolist()


@pytest.mark.parametrize("budget", [PART, WHOLE_SET])
@pytest.mark.parametrize("recipe", ["light", "fat"])
def test_batches_are_the_same_with_and_without_a_cache(photos: Path, budget: float, recipe: str) -> None:
    """Whole decoding and cutting equals decoding of the window. In both epochs: on misses and on hits."""
    chosen = augment_recipe(recipe, size=64)
    assert_equal_batches(batches_of(photos, chosen, memory_cache=budget), batches_of(photos, chosen))


def test_batches_are_the_same_with_the_feed_process(photos: Path) -> None:
    found = batches_of(photos, memory_cache=PART, feed_process="on")
    assert_equal_batches(found, batches_of(photos))


@pytest.mark.parametrize("mode", ["jpg", "raw", "smart"])
def test_batches_of_a_beton_are_the_same_with_and_without_a_cache(photos: Path, tmp_path: Path, mode: str) -> None:
    """With the FFCV loader, whose pixels are those of the fast inverse DCT, if it is installed."""
    pytest.importorskip("ffcv")
    options = ("--shard-size", "2", "--format", "ffcv", "--write-mode", mode, "--smart-ratio", "5")
    run_pipeline("shard", photos.parent / "images", "--out", tmp_path / "set", *options)
    found = batches_of(tmp_path / "set", loader="ffcv", memory_cache=PART)
    assert_equal_batches(found, batches_of(tmp_path / "set", loader="ffcv"))


@settings(max_examples=4)
@given(
    st.sampled_from([PART / 4, PART, WHOLE_SET]),
    st.sampled_from([(1, 24), (2, 6), (4, 6)]),
    st.sampled_from([None, 32, 80]),
    st.sampled_from(["on", "off"]),
)
def test_global_batches_do_not_depend_on_the_number_of_ranks_with_a_cache(
    photos: Path, budget: float, ranks: tuple[int, int], side: int | None, feed: Any
) -> None:
    """Each rank has its own cache here, so ranks differ in what is cached, but not in pixels."""
    options: Any = {"memory_cache": budget, "memory_cache_short_side": side, "feed_process": feed}
    world, micro = ranks
    expected = batches_of(photos, **options)
    parts = [batches_of(photos, world=world, rank=rank, micro_batch=micro, **options) for rank in range(world)]
    for step, batch in enumerate(expected):
        per_rank = GLOBAL // world // micro
        same_step = [part for rank in parts for part in rank[step * per_rank : (step + 1) * per_rank]]
        assert [i for part in same_step for i in part.ids.tolist()] == batch.ids.tolist()
        assert torch.equal(torch.cat([part.images for part in same_step]), batch.images)


def test_shrunk_images_have_the_same_ids_crops_and_operations(photos: Path) -> None:
    recipe = augment_recipe("fat", size=64, erase=1.0)
    plain, cached = batches_of(photos, recipe), batches_of(photos, recipe, memory_cache=1, memory_cache_short_side=120)
    for a, b in zip(cached, plain, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.equal(a.lam, b.lam)  # type: ignore[arg-type]
        assert 0 < (a.images - b.images).abs().mean() < 0.1
        assert (a.images - b.images).abs().amax(dim=(1, 2, 3)).max() < 8


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """Count how often the bytes at each (file, offset) are read, over all readers from now on."""
    counts: Counter[tuple[int, int]] = Counter()
    read, read_if_cached = LocalFiles.read, LocalFiles.read_if_cached

    def counted(files: LocalFiles, file: int, target: Any, offset: int) -> None:
        counts[file, offset] += 1
        read(files, file, target, offset)

    def counted_if_cached(files: LocalFiles, file: int, target: Any, offset: int) -> bool:
        done = read_if_cached(files, file, target, offset)
        counts[file, offset] += done
        return done

    monkeypatch.setattr(LocalFiles, "read", counted)
    monkeypatch.setattr(LocalFiles, "read_if_cached", counted_if_cached)
    return counts


@pytest.mark.parametrize("budget", [0.008, WHOLE_SET])
def test_cached_samples_are_not_read_again(digits: Path, monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    """Except those that are drawn again, at the start of an epoch, while they are still being decoded."""
    dataset, epochs = ShardSet(digits), 3
    index, recipe = dataset.index("train"), augment_recipe("light", size=32)
    with loader(digits, recipe, memory_cache=budget, epochs=epochs, read_ahead=0) as batches:
        counts = count_reads(monkeypatch)
        drawn = Counter(np.concatenate([batch.ids for batch in batches.stream()]).tolist())
        layout, use = batches._layout, batches.cache_use
        assert layout is not None
        assert use is not None
        assert batches._memory_cache is not None
        stored, stored_bytes = batches._memory_cache.used()
    kept = {i for i in drawn if layout.keeps(np.array([i]))[0]}
    assert stored_bytes == use.stored_bytes
    assert (stored, stored_bytes) == (len(kept), len(kept) * 64 * 64 * 3)
    assert (len(kept) == len(drawn)) == (budget == WHOLE_SET)
    reads = {i: counts[int(index["shard"][i]), int(index["offset"][i])] for i in drawn}
    assert all(reads[i] == drawn[i] for i in drawn.keys() - kept)
    assert use.samples == drawn.total()
    assert sum(reads[i] for i in kept) == sum(drawn[i] for i in kept) - use.hits
    assert sum(reads[i] for i in kept) < 1.2 * len(kept)


def test_a_loader_resumes_in_the_middle_of_an_epoch_with_an_empty_cache(photos: Path) -> None:
    options: Any = {"memory_cache": PART, "memory_cache_short_side": 100}
    with loader(photos, **options) as whole:
        stream = whole.stream()
        for _ in range(2):
            next(stream)
        state = whole.state_dict()
        expected = list(stream)
    with loader(photos, **options) as resumed:
        next(resumed)
        resumed.load_state_dict(state)
        assert_equal_batches(list(resumed.stream()), expected)


def test_the_cache_is_kept_when_the_position_is_set_and_freed_by_close(photos: Path) -> None:
    batches = loader(photos, memory_cache=WHOLE_SET)
    first = list(batches)
    batches.set_epoch(0)
    assert_equal_batches(list(batches), first)
    assert batches.cache_use is not None
    assert batches.cache_use.hits >= sum(len(batch.ids) for batch in first)
    path = batches._memory_cache.path  # type: ignore[union-attr]
    assert os.path.exists(path)
    batches.close()
    assert batches.cache_use is None
    assert not os.path.exists(path)
    batches.set_epoch(0)
    with batches:
        assert_equal_batches(list(batches), first)


def test_a_bad_sample_is_replaced_and_not_stored(photos: Path, tmp_path: Path) -> None:
    """The replacement sample may be cached or not."""
    path = Path(shutil.copytree(photos, tmp_path / "set"))
    dataset = ShardSet(path)
    index, bad = dataset.index("train"), 7
    with dataset.shard_path("train", int(index["shard"][bad])).open("r+b") as file:
        file.seek(int(index["offset"][bad]) + int(index["size"][bad]) // 2)
        file.write(b"\xff\xd9" * 100)
    options: Any = {"bad_samples": "skip:3", "epochs": 3}
    plain, cached = batches_of(path, **options), batches_of(path, **options, memory_cache=WHOLE_SET)
    assert_equal_batches(cached, plain)
    assert not any(bad in batch.ids for batch in cached)
    assert sum(bad in batch.planned for batch in cached) > 0


def test_nothing_is_left_behind(photos: Path) -> None:
    def use() -> None:
        with loader(photos, memory_cache=PART, feed_process="on") as batches:
            next(batches)

    use()
    with nothing_is_left_behind():
        use()
    assert "memfd:decoded-images" not in Path("/proc/self/maps").read_text()


def test_a_budget_above_the_free_memory_is_rejected(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "free_memory", lambda: GIB // 100)
    with pytest.raises(UserError, match=r"--memory-cache: needs 0\.0 GiB of memory, but 0\.0 GiB are free.*smaller"):
        loader(photos, memory_cache=WHOLE_SET)


def test_a_set_that_needs_less_than_the_budget_uses_less(photos: Path) -> None:
    with loader(photos, memory_cache=1000) as batches:  # more than this machine has
        assert batches._layout is not None
        assert batches._layout.keeps_all
        assert batches._layout.size < GIB
        assert "(100.0%)" in batches.resolved["memory cache"]


def test_impossible_options_are_rejected(photos: Path) -> None:
    with pytest.raises(UserError, match="too small for one image"):
        loader(photos, memory_cache=1e-6)
    with pytest.raises(UserError, match="--memory-cache -1"):
        LoaderOptions(memory_cache=-1)
    with pytest.raises(UserError, match="--memory-cache 1 --loader synthetic: synthetic images are neither read nor"):
        LoaderOptions(loader="synthetic", memory_cache=1)
    with pytest.raises(UserError, match="--memory-cache-short-side 256: has no effect without --memory-cache"):
        LoaderOptions(memory_cache_short_side=256)


def test_processes_of_a_machine_need_a_process_group(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it they would fill one cache each, and need the memory several times."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"the 2 processes of this machine .*\.init_process_group"):
        loader(photos, memory_cache=PART, world=2, rank=0)


def test_shared_memory_is_opened_by_path_and_cannot_be_truncated() -> None:
    layout = CacheLayout.of(index_of([(5, 7), (300, 400)]), budget=10**6, short_side=None, seed=0)
    image = np.arange(105, dtype=np.uint8)
    one = SharedPixels(layout, allocate(layout.size))
    other, flags = SharedPixels(layout, open_shared(one.path)), StoredFlags(one.path, 2)
    assert flags.stored(np.array([1, 0])).tolist() == [False, False]
    one.store(0, image.reshape(5, 7, 3))
    assert other.stored(0)
    assert flags.stored(np.array([1, 0])).tolist() == [False, True]
    assert np.array_equal(other.pixels(0), image)
    assert other.used() == (1, 105)
    with pytest.raises(PermissionError):
        os.truncate(one.path, 10)
    path = one.path
    one.close()
    assert np.array_equal(other.pixels(0), image), "the memory lives as long as a process uses it"
    other.close()
    with pytest.raises(UserError, match=r"--memory-cache: cannot open /proc/.*same user"):
        open_shared(path)


def test_shrinking_averages_all_pixels() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::2] = 200
    assert np.abs(resized(pixels, 16, 16).astype(int) - 100).max() <= 10
    assert resized(pixels, 64, 64) is pixels


def test_the_jobs_that_decoders_get_are_complete(photos: Path) -> None:
    """A cached sample is pixels with the stored size; everything else of its job is unchanged."""
    from pipeline.decode.cached import CachedPixels
    from pipeline.decode.job import DecodeJob
    from pipeline.storage.placement import open_storage
    from pipeline.storage.reader import SampleReader

    dataset = ShardSet(photos)
    layout = CacheLayout.of(dataset.index("train"), budget=int(PART * GIB), short_side=100, seed=0)
    cache, ids = SharedPixels(layout, allocate(layout.size)), np.arange(GLOBAL)
    with SampleReader(open_storage(dataset, "train"), stored=StoredFlags(cache.path, len(layout.offsets))) as reader:
        for hit in (False, True):
            encoded = reader.read(ids)
            assert encoded.stored is not None
            assert encoded.stored.tolist() == (layout.keeps(ids) & hit).tolist()
            window = np.stack([ids * 0, ids * 0, encoded.rows["height"], encoded.rows["width"]], axis=1)
            job = DecodeJob(encoded=encoded, window=window.astype(np.int32), size=32, flip=ids % 2 == 0)
            ((found, extra),) = CachedPixels(cache, threads=2, ahead=1).run([(job, "extra")])
            assert extra == "extra"
            assert found.encoded.raw.tolist() == layout.keeps(ids).tolist()
            for row in range(GLOBAL):
                if layout.keeps(ids)[row]:
                    sides = (found.encoded.rows["height"][row], found.encoded.rows["width"][row])
                    assert found.encoded.images[row].size == 3 * int(sides[0]) * int(sides[1])
                    assert min(sides) <= 100
                    assert found.window[row].tolist() == [0, 0, *sides]
                else:
                    assert found.encoded.images[row] is job.encoded.images[row]
                    assert found.window[row].tolist() == job.window[row].tolist()
            labels = [job.encoded.rows["label"].tolist(), found.encoded.rows["label"].tolist()]
            assert labels[0] == labels[1]
            assert dataclasses.replace(found, encoded=job.encoded, window=job.window) == job
    cache.close()


def test_a_loader_can_use_the_cache_of_another_one(photos: Path) -> None:
    with loader(photos, memory_cache=WHOLE_SET) as first:
        expected = list(first.stream())
        second = TrainLoader(
            first._dataset, first._plan, first._phases[0].shape, LIGHT, epochs=2, device=CPU, options=first._options,
            memory_cache=first.memory_cache,
        )  # fmt: skip
        with second:
            assert_equal_batches(list(second.stream()), expected)
            assert second.cache_use is not None
            assert second.cache_use.hits == second.cache_use.samples
        assert first.memory_cache is not None
        assert first.memory_cache.used()[0] > 0
