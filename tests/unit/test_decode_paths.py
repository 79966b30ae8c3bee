"""Decode paths: the crop window only, whole images, a cache of decoded images, CPU and GPU decoders sharing a batch.

All deliver the same samples, crops and operations; with one decoder, also the same pixels.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.augment.recipe import AugmentRecipe, augment_recipe
from pipeline.batch import Batch
from pipeline.batch_shape import BatchShape
from pipeline.decode.cached import CacheUse
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.decoded_cache import DecodedCache, describe_capacity, image_bytes
from pipeline.decode.hardware import rows_decoded_on_cpu
from pipeline.loader import TrainLoader
from pipeline.options import DaliOptions, LoaderOptions, LoaderSettings
from pipeline.plan import Position, TrainPlan
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.memory import GIB
from tests.support.dali_on_cpu import decoded_at_sizes, job_of

CPU = torch.device("cpu")
GLOBAL = 360  # 3 steps per epoch of digits
LIGHT = augment_recipe("light", size=32)
PHOTOS = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea")]
WINDOWS = np.array([[3, 5, 101, 77], [0, 1, 400, 599], [150, 200, 33, 12]], np.int32)
FLIPS = np.array([True, False, True])


def batches_of(
    path: Path,
    dali: DaliOptions,
    *,
    recipe: AugmentRecipe = LIGHT,
    world: int = 1,
    epochs: int = 2,
    start: Position | None = None,
) -> list[list[Batch]]:
    """Return the batches of every rank."""
    dataset = ShardSet(path)
    plan = TrainPlan(
        dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, shuffle_block_size=16, pairs=recipe.mixes
    )
    found = []
    for rank in range(world):
        shape = BatchShape(global_batch=GLOBAL, world=world, rank=rank, pairs=recipe.mixes)
        options = LoaderOptions(dali=dali, decode_threads=1, feed_process="off")
        with TrainLoader(
            dataset, plan, shape, recipe, epochs=epochs, device=CPU, options=options, start=start
        ) as loader:
            found.append(list(loader.stream()))
    return found


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.ids.tolist() == b.ids.tolist()
        and a.position == b.position
        and torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        for a, b in zip(left, right, strict=True)
    )


@settings(max_examples=6, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3]),
    mib=st.sampled_from([0.0, 0.01, 0.3, 0.9, 100.0]),
    resumed=st.booleans(),
    recipe=st.sampled_from(["light", "fat"]),
)
def test_every_path_delivers_the_same_batches(digits: Path, world: int, mib: float, resumed: bool, recipe: str) -> None:
    """Property over world sizes, cache sizes (none, some images, all) and a start within an epoch."""
    start = Position(0, 2) if resumed else None
    options: dict[str, Any] = {"recipe": augment_recipe(recipe, size=32), "world": world, "start": start}
    expected = batches_of(digits, DaliOptions(), **options)
    for dali in (DaliOptions(decode="whole", gpu_cache=mib / 1024), DaliOptions(cpu_decode=0.5)):
        for rank, batches in enumerate(batches_of(digits, dali, **options)):
            assert same(batches, expected[rank])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), quality=st.sampled_from([30, 95]))
def test_cropping_whole_images_gives_the_bytes_of_decoded_windows(seed: int, quality: int) -> None:
    """Except for windows that are one pixel wide: libjpeg-turbo upsamples the colors of some of them differently."""
    rng = np.random.default_rng(seed)
    photos, windows = [], []
    for _ in range(4):
        height, width = int(rng.integers(1, 90)), int(rng.integers(2, 90))
        coarse = rng.integers(0, 256, (*rng.integers(1, 80, 2), 3), np.uint8)
        photos.append(Image.fromarray(coarse).resize((width, height)))
        y, x = int(rng.integers(height)), int(rng.integers(width - 1))
        windows.append((y, x, rng.integers(1, height - y + 1), rng.integers(2, width - x + 1)))
    job = job_of(photos, size=16, window=np.array(windows, np.int32), flip=rng.random(4) < 0.5)
    window, whole = (
        next(DaliDecoder(4, CPU, 1, settings=LoaderSettings(decode=path)).decode([(job, None)]))[0]
        for path in ("window", "whole")
    )
    assert torch.equal(window, whole)


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("cpu_decode", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", ["window", "whole"])
def test_the_graph_for_gpus_gives_the_same_pixels_on_every_path(path: Any, cpu_decode: float, evaluation: bool) -> None:
    """With the CPU's operators: on a GPU, the decoders round differently."""
    region = np.array([[1.5, 2, 90, 70], [0, 0, 400, 599], [3, 3, 20, 8]], np.float64)
    job: dict[str, Any] = {"window": WINDOWS, **({"region": region} if evaluation else {"flip": FLIPS})}
    expected = decoded_at_sizes([32, 48], PHOTOS, evaluation=evaluation, **job)
    chosen = LoaderSettings(decode=path, cpu_decode=cpu_decode)
    found = decoded_at_sizes([32, 48], PHOTOS, evaluation=evaluation, settings=chosen, **job)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cpu_decode", [0.0, 0.5])
@pytest.mark.parametrize("mib", [0.01, 1.2, 10])
def test_the_graph_for_gpus_gives_the_same_pixels_with_a_cache(mib: float, cpu_decode: float) -> None:
    sizes = [32] * 6
    expected = decoded_at_sizes(sizes, PHOTOS, evaluation=False, window=WINDOWS, flip=FLIPS)
    cache = DecodedCache(int(mib * 2**20), CPU)
    chosen = LoaderSettings(decode="whole", cpu_decode=cpu_decode)
    found = decoded_at_sizes(
        sizes, PHOTOS, evaluation=False, window=WINDOWS, flip=FLIPS, settings=chosen, cache=cache
    )
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (cache.use.hits > 0) == (mib > 1)


@pytest.mark.parametrize("cached", [False, True])
def test_the_gpu_decodes_all_rows_of_the_first_batch(cached: bool) -> None:
    """The first batch fixes how many images the JPEG engine may get (pipeline/decode/hardware.py)."""
    decoder = DaliDecoder(
        3,
        torch.device("cuda", 0),
        1,
        settings=LoaderSettings(decode="whole", cpu_decode=0.0 if cached else 0.9),
        cache=DecodedCache(10 << 20, CPU) if cached else None,
    )
    in_flight: deque[Any] = deque()
    fed = list(decoder._batches([(job_of(PHOTOS, size=32), n) for n in range(2)], in_flight))
    assert [batch.warms_up for batch in fed] == [True, False, False]
    assert not fed[0].inputs[-1].any()
    assert fed[0].reserved == []
    assert list(in_flight) == fed


# -- cache ----


def test_the_first_images_that_fit_stay_and_are_the_only_hits() -> None:
    heights, widths = np.array([10, 20, 400, 10]), np.array([30, 40, 400, 10])
    ids = np.array([7, 3, 9, 1])
    size = image_bytes(10, 30) + image_bytes(20, 40) + image_bytes(10, 10)
    cache = DecodedCache(size, CPU)
    assert cache.take(ids)[0].tolist() == [False] * 4
    assert cache.reserve(ids, heights, widths) == [0, 1, 3]  # the third does not fit
    assert not cache.take(ids)[0].any()  # reserved, but not decoded yet
    assert cache.reserve(ids, heights, widths) == []
    pixels = {}
    for row in (0, 1, 3):
        pixels[row] = torch.randint(0, 256, (heights[row], widths[row], 3), dtype=torch.uint8)
        cache.store(int(ids[row]), pixels[row])
    hit, images = cache.take(ids[::-1].copy())
    assert hit.tolist() == [True, False, True, True]
    assert np.array_equal(np.asarray(images[0]), pixels[3].numpy())
    assert np.array_equal(np.asarray(images[3]), pixels[0].numpy())
    assert cache.use == CacheUse(samples=12, hits=3, stored_bytes=size)


@pytest.mark.parametrize("world", [1, 2])
def test_the_hits_are_those_that_the_plan_predicts(digits: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """In the second epoch, a rank finds the images that it stored in the first one."""
    caches: list[DecodedCache] = []
    real = DecodedCache.__init__

    def recorded(cache: DecodedCache, *arguments: Any) -> None:
        real(cache, *arguments)
        caches.append(cache)

    monkeypatch.setattr(DecodedCache, "__init__", recorded)
    size = 120 << 10
    found = batches_of(digits, DaliOptions(decode="whole", gpu_cache=size / GIB), world=world)
    index = ShardSet(digits).index("train")
    for cache, batches in zip(caches, found, strict=True):
        stored, used, hits = set[int](), 0, 0
        for batch in batches:
            hits += sum(sample in stored for sample in batch.ids.tolist())
            for sample in batch.ids.tolist():
                need = image_bytes(int(index["height"][sample]), int(index["width"][sample]))
                if sample not in stored and used + need <= size:
                    stored.add(sample)
                    used += need
        assert 0 < len(stored) < len(index)
        requested = sum(len(batch.ids) for batch in batches)
        assert cache.use == CacheUse(samples=requested, hits=hits, stored_bytes=used)
        assert hits > 0


def test_the_expected_rate_of_hits_follows_the_size_and_the_number_of_ranks() -> None:
    heights, widths = np.full(1000, 256), np.full(1000, 320)
    quarter = 250 * image_bytes(256, 320)
    one = describe_capacity(quarter, heights, widths, world=1)
    assert "about 250 of 1,000 images; expected hit rate 25.0% from the second epoch on" in one
    assert "25.0% after about 3 epochs" in describe_capacity(quarter, heights, widths, world=8)
    assert "expected hit rate 100.0%" in describe_capacity(1 << 40, heights, widths, world=1)


def test_the_loader_reports_its_cache(digits: Path) -> None:
    dataset, shape = ShardSet(digits), BatchShape(global_batch=GLOBAL, world=1, rank=0)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5)
    options = LoaderOptions(dali=DaliOptions(gpu_cache=0.1))
    with TrainLoader(dataset, plan, shape, LIGHT, epochs=2, device=CPU, options=options) as loader:
        assert "expected hit rate 100.0%" in loader.resolved["cache of decoded images"]
        assert loader.resolved["loader"] == "dali on CPUs, whole images"
        assert loader.cache_use is None
        for _ in range(2 * plan.steps_per_epoch - 1):
            next(loader)
        use = loader.cache_use
        assert use is not None
        assert 0 < 2 * use.hits <= use.samples
        assert use.stored_bytes > 0
    with TrainLoader(dataset, plan, shape, LIGHT, device=CPU) as loader:
        assert "cache of decoded images" not in loader.resolved
        assert loader.cache_use is None


# -- rows decoded on the CPU ----


@given(fraction=st.floats(0, 1), more=st.floats(0, 1))
def test_the_decoder_of_a_sample_depends_on_its_id_alone(fraction: float, more: float) -> None:
    ids = np.arange(20_000)
    chosen = rows_decoded_on_cpu(ids, fraction)
    assert abs(chosen.mean() - fraction) < 0.02
    assert np.array_equal(rows_decoded_on_cpu(ids[::-1], fraction)[::-1], chosen)
    low, high = sorted([fraction, more])
    assert not (rows_decoded_on_cpu(ids, low) & ~rows_decoded_on_cpu(ids, high)).any()


# -- options ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DaliOptions(gpu_cache=1, decode="window"), "--gpu-cache 1 --decode window: the cache holds complete"),
        (lambda: DaliOptions(gpu_cache=-1), "--gpu-cache -1: expected a number from 0 to 1,048,576"),
        (lambda: DaliOptions(cpu_decode=1.5), "--cpu-decode 1.5: expected a number from 0 to 1"),
        (lambda: DecodedCache(1 << 60, CPU), "--gpu-cache 1.07374e+09: cpu cannot allocate this memory"),
    ],
)
def test_invalid_options_are_rejected_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("+", r"\+")) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_cache_needs_dali(digits: Path) -> None:
    dataset, shape = ShardSet(digits), BatchShape(global_batch=GLOBAL, world=1, rank=0)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5)
    options = LoaderOptions(loader="ffcv", dali=DaliOptions(gpu_cache=1))
    with pytest.raises(UserError, match="--gpu-cache 1: only --loader dali caches images; omit this option"):
        TrainLoader(dataset, plan, shape, LIGHT, device=CPU, options=options)


def test_a_cache_implies_whole_images() -> None:
    assert LoaderOptions().settings.decode == "window"
    assert LoaderOptions(dali=DaliOptions(gpu_cache=1)).settings.decode == "whole"
    assert LoaderOptions(dali=DaliOptions(decode="whole")).settings.decode == "whole"
