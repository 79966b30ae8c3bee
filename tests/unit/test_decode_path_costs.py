"""Host cost of the decode paths in `pipeline bench`, and the decoders that `pipeline tune` varies on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.bench import decode_paths
from launch.bench.decode_paths import DecodePath, measure, measure_paths
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from launch.tuning import loader as tuning
from launch.tuning.loader import candidates, cpu_shares, tune_loader
from pipeline.decode.decoded_cache import DecodedCache
from shards.progress import Phases

CPU = torch.device("cpu")
SMALL = ("--size", "32", "--global-batch", "40", "--augment", "light", "--epochs", "1000", "--warmup-epochs", "0")
SHALLOW = ("--read-ahead", "1", "--decode-ahead", "1", "--ready", "1", "--decode-threads", "1")


def feed_of(data: Path, *options: str, device: torch.device = CPU) -> Feed:
    return Feed.of(parse(["--data", str(data), *SMALL, *SHALLOW, *options]), World(0, 1, 0, 1, device, cores=2))


def test_every_decode_path_of_the_machine_is_measured(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_paths, "_ffcv_is_installed", lambda _: False)
    feed = feed_of(digits, "--augment", "fat", "--memory-cache", "0.1")
    found = measure_paths(feed, dtype=torch.float32, steps=2)
    assert list(found) == ["window", "whole", "whole, cached", "memory cache"]
    assert all(cost.rate > 0 and 0 < cost.cpu < 1 for cost in found.values())


def test_paths_that_the_machine_does_not_have_are_left_out(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_paths, "_ffcv_is_installed", lambda _: True)
    names = [path.name for path in decode_paths.decode_paths(feed_of(digits, "--loader", "ffcv"), 1)]
    assert names == ["whole, FFCV"]
    assert decode_paths.decode_paths(feed_of(digits, "--loader", "synthetic"), 1) == []
    with_memory_cache = decode_paths.decode_paths(feed_of(digits, "--memory-cache", "0.1"), 1)
    assert [path.name for path in with_memory_cache if path.repeats] == ["whole, cached", "memory cache"]
    gpu = feed_of(digits, device=torch.device("cuda", 0))
    assert "window, CPU" in [path.name for path in decode_paths.decode_paths(gpu, 1)]


def test_a_cached_path_is_measured_when_the_cache_has_all_images(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hits: list[np.ndarray] = []
    real = DecodedCache.take

    def take(cache: DecodedCache, ids: Any) -> Any:
        found = real(cache, ids)
        hits.append(found[0])
        return found

    monkeypatch.setattr(DecodedCache, "take", take)
    feed = feed_of(digits)
    cached = [path for path in decode_paths.decode_paths(feed, 3) if path.repeats]
    assert len(cached) == 1
    measure(feed, cached[0], dtype=torch.float32, steps=3)
    assert not np.concatenate(hits[:3]).any()
    assert np.concatenate(hits[4:]).all()


def test_options_of_a_path_leave_the_others_as_they_are(digits: Path) -> None:
    feed = decode_paths.with_loader_options(feed_of(digits, "--read-threads", "3"), {"decode": "whole", "ready": 4})
    loader = feed.recipe.data.loader
    assert (loader.dali.decode, loader.ready, loader.read_threads) == ("whole", 4, 3)
    assert DecodePath("window").options == {}


def tried(feed: Feed) -> dict[str, list[Any]]:
    return {name: [values[name] for values in stage] for stage in candidates(feed) for name in stage[0]}


def test_tuning_on_gpus_varies_the_decoders(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "decodes_on_gpu", lambda _: True)
    found = tried(feed_of(digits, "--hw-decoder-load", "0.65"))
    assert found["hw_decoder_load"] == [0.65, 1.0, 0.8]
    assert found["decode"] == ["window", "whole"]
    assert tried(feed_of(digits, "--hw-decoder-load", "1"))["hw_decoder_load"] == [1.0, 0.8]
    assert "hw_decoder_load" not in tried(feed_of(digits, "--hw-decoder-load", "0"))  # no JPEG engine
    assert "decode" not in tried(feed_of(digits, "--gpu-cache", "1"))  # the cache needs whole images


@pytest.mark.parametrize(("gpu", "cpu", "fraction"), [(9000.0, 1000.0, 0.1), (1000.0, 1000.0, 0.5), (1e6, 1.0, 0.0)])
def test_the_cpus_share_follows_the_measured_rates(gpu: float, cpu: float, fraction: float) -> None:
    stage = cpu_shares(lambda values: cpu if values["cpu_decode"] else gpu, Phases("tune"))
    assert [values["cpu_decode"] for values in stage] == list(dict.fromkeys((0.0, fraction)))


def test_given_decoders_are_not_varied(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feed has values of all decoders, chosen or given; only the chosen ones are varied."""
    monkeypatch.setattr(tuning, "decodes_on_gpu", lambda _: True)
    monkeypatch.setattr(tuning, "rate", lambda *_, **__: 100.0)
    requested = parse(["--data", "SET", "--decode", "window", "--cpu-decode", "0", *SHALLOW]).data.loader
    feed = feed_of(digits, "--decode", "window", "--cpu-decode", "0", "--hw-decoder-load", "0.65")
    found = tune_loader(feed, requested, dtype=torch.float32, seconds=1.0, progress=Phases("tune"))
    assert {"decode", "cpu_decode"}.isdisjoint(found)
    assert found["hw_decoder_load"].value == 0.65
    unset = parse(["--data", "SET"]).data.loader
    found = tune_loader(feed, unset, dtype=torch.float32, seconds=1.0, progress=Phases("tune"))
    assert {"decode", "cpu_decode", "hw_decoder_load"} <= found.keys()
