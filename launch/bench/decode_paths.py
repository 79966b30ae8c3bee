"""Host cost of each decode path: CPU time per image until a batch is on the device, without further augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from launch.bench.phases import run
from launch.bench.verdict import PathCost
from launch.feed import Feed
from pipeline.batch_shape import BatchShape
from pipeline.decode.choose import make_decoder, resolve_loader
from pipeline.decode.decoded_cache import image_bytes
from pipeline.plan import TrainPlan
from pipeline.stage_trace import StageTrace
from pipeline.storage.placement import stored_pixels
from shards.errors import UserError
from shards.memory import GIB


@dataclass(frozen=True)
class DecodePath:
    """One way to get from stored samples to batches."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Changes of `LoaderOptions` and `DaliOptions`; fields that are not named keep their values."""
    repeats: bool = False
    """Whether to measure the second time that the same samples are delivered, when a cache has them."""


def measure_paths(feed: Feed, *, dtype: torch.dtype, steps: int) -> dict[str, PathCost]:
    """Measure all decode paths that the set and the device allow, by name.

    Args:
        dtype: dtype of the batches.
        steps: timed batches per path.
    """
    return {path.name: measure(feed, path, dtype=dtype, steps=steps) for path in decode_paths(feed, steps)}


def decode_paths(feed: Feed, steps: int) -> list[DecodePath]:
    """Return the decode paths that the set and the device allow.

    Args:
        steps: batches that a path with a cache repeats.
    """
    options, split = feed.recipe.data.loader, feed.dataset.split("train")
    loader = resolve_loader(options, split)
    if loader == "synthetic":
        return []
    no_cache: dict[str, Any] = {"memory_cache": 0.0, "memory_cache_short_side": None, "gpu_cache": None}
    paths = []
    if stored_pixels(split, beton=loader == "ffcv") == "all":
        paths.append(DecodePath("stored pixels", no_cache))
    else:
        if loader == "dali":
            window = no_cache | {"loader": "dali", "decode": "window", "cpu_decode": 0.0}
            whole = window | {"decode": "whole"}
            cached = whole | {"gpu_cache": cache_for(feed, steps)}
            paths += [DecodePath("window", window), DecodePath("whole", whole)]
            paths.append(DecodePath("whole, cached", cached, repeats=True))
            if feed.world.device.type == "cuda":
                paths.append(DecodePath("window, CPU", window | {"cpu_decode": 1.0}))
        if _ffcv_is_installed(feed):
            paths.append(DecodePath("whole, FFCV", no_cache | {"loader": "ffcv"}))
    if options.memory_cache:
        paths.append(DecodePath("memory cache", {}, repeats=True))
    return paths


def cache_for(feed: Feed, steps: int) -> float:
    """Return the GiB of a cache of decoded images that holds the first `steps` batches' worth of samples."""
    index = feed.dataset.index("train")[: steps * feed.shape.micro_rows]
    sizes = image_bytes(index["height"].astype(np.int64), index["width"].astype(np.int64))
    return float(sizes.sum() / GIB)


def measure(feed: Feed, path: DecodePath, *, dtype: torch.dtype, steps: int) -> PathCost:
    """Measure one decode path in its steady state."""
    rows, device = feed.shape.micro_rows, feed.world.device
    feed = without_augmentation(with_loader_options(feed, {**path.options, "feed_process": "off"}))
    if path.repeats:
        feed = repeating(feed, steps)
    ahead = feed.loader_options.settings.ahead
    with feed.train_loader(step=0, dtype=dtype) as batches:
        for _ in range(ahead + steps * path.repeats):
            next(batches)
        found = run(batches, None, steps=steps, batch=rows, device=device)
    return PathCost(rate=found.rate, cpu=found.cpu)


def without_augmentation(feed: Feed) -> Feed:
    """Return a feed whose images are only cropped, flipped and normalized."""
    light = replace(feed.recipe.data, augment="light", rand_augment=None, erase=None, mixup=None, cutmix=None)
    return replace(feed, augment=light.augmentation())


def with_loader_options(feed: Feed, values: Mapping[str, Any]) -> Feed:
    """Return the feed with changed values of `LoaderOptions` and `DaliOptions`."""
    dali = feed.recipe.data.loader.dali
    of_dali = {name: value for name, value in values.items() if hasattr(dali, name)}
    others = {name: value for name, value in values.items() if name not in of_dali}
    return feed.with_loader(**others, dali=replace(dali, **of_dali))


def repeating(feed: Feed, steps: int) -> Feed:
    """Return a feed whose epochs consist of the first `steps` batches' worth of samples."""
    rows, counts = feed.shape.micro_rows, feed.dataset.shard_samples("train")
    ends = np.minimum(np.cumsum(counts), steps * rows)
    first = np.diff(ends, prepend=0)
    pairs = feed.augment.mixes
    plan = TrainPlan(first[first > 0], global_batch=rows, seed=feed.recipe.run.seed, pairs=pairs)
    return replace(feed, plan=plan, shape=BatchShape(global_batch=rows, world=1, rank=0, pairs=pairs))


def _ffcv_is_installed(feed: Feed) -> bool:
    try:
        make_decoder(
            "ffcv",
            feed.loader_options,
            batch=1,
            device=feed.world.device,
            evaluation=False,
            normalization=None,
            cache=None,
            trace=StageTrace(),
        )
    except UserError:
        return False
    return True
