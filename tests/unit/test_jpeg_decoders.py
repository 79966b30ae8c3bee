"""The comparison of a GPU's two JPEG decoders (benchmarks/jpeg_decoders.py), tested without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.jpeg_decoders import Comparison, compare, first_batch, main
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from pipeline.decode.dali import DaliDecoder
from pipeline.decode.hardware import JpegEngine

CPU = torch.device("cpu")


class Rounding:
    """A decoder whose engine changes the blue channel of its part of the batch; decoding advances a simulated clock."""

    def __init__(self, clock: list[float], load: float) -> None:
        self._clock, self._load = clock, load

    def decode(self, jobs: Iterable[tuple[Any, None]]) -> Iterator[tuple[torch.Tensor, Any, None]]:
        images_per_second = {0.0: 100.0, 0.9: 220.0, 1.0: 200.0}[self._load]
        for job, extra in jobs:
            images = torch.full((8, 4, 4, 3), 254, dtype=torch.uint8)
            images[: round(8 * self._load), :, :, 2] -= 253
            self._clock[0] += len(images) / images_per_second
            yield images, job, extra


def test_pixels_and_speed_are_compared() -> None:
    clock = [0.0]
    job: Any = None
    found = compare(lambda load: Rounding(clock, load), job, seconds=10, now=lambda: clock[0])
    assert (found.images, found.mean, found.max) == (8, pytest.approx(253 / 3), 253)
    assert found.differing == pytest.approx(1 / 3)
    assert found.rates == pytest.approx({"0": 100, "1": 200, "0.9": 220})
    assert "max 253 levels, 33.3% of the values differ" in str(found)
    assert "0: 100, 1: 200, 0.9: 220" in str(found)


@pytest.mark.parametrize(
    ("greatest", "engine", "unused"), [(0, 101.0, True), (0, 99.0, True), (0, 150.0, False), (1, 100.0, False)]
)
def test_equal_pixels_at_equal_speed_are_reported_as_an_unused_engine(
    greatest: int, engine: float, unused: bool
) -> None:
    found = Comparison(images=8, mean=0.0, max=greatest, differing=0.0, rates={"0": 100.0, "1": engine, "0.9": 99.0})
    assert found.unused is unused
    assert ("appears not to be used" in str(found)) is unused


def test_the_compared_batch_is_the_first_batch_of_training(digits: Path) -> None:
    small = ("--size", "32", "--global-batch", "16", "--augment", "light")
    feed = Feed.of(parse(["--data", str(digits), *small]), World(0, 1, 0, 1, CPU, cores=2))
    job = first_batch(feed)
    with feed.train_loader(step=0, dtype=torch.float32) as loader:
        batch = next(loader)
    assert job.encoded.ids.tolist() == batch.ids.tolist()
    images, _, _ = next(DaliDecoder(batch=16, device=CPU, threads=1).decode([(job, None)]))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (feed.augment.mean, feed.augment.std))
    shown = ((batch.images * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(shown - images.numpy()).max() < 1e-3


def run(monkeypatch: pytest.MonkeyPatch, out: Path, dataset: Path) -> dict[str, Any]:
    small = ("--batch", "16", "--size", "32", "--seconds", "0.05")
    monkeypatch.setattr(sys, "argv", ["jpeg_decoders.py", str(dataset), *small, "--out", str(out)])
    main()
    return json.loads(out.read_text())


def test_the_lack_of_an_engine_is_reported(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, tmp_path / "out.json", digits)["decoders"] == "not compared: no GPU"


def test_the_results_are_written(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU decoder replaces both GPU decoders."""
    monkeypatch.setattr("benchmarks.jpeg_decoders.find_jpeg_engine", lambda _: JpegEngine(usable=True, found="none"))
    found = run(monkeypatch, tmp_path / "out.json", digits)
    assert (found["images"], found["max"]) == (16, 0)
    assert set(found["rates"]) == {"0", "1", "0.9"}
