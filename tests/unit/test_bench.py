"""`pipeline bench` where it is known what must come out: one part is made slow, and the figures, the verdict and the
chart must say so."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from launch.bench.chart import draw
from launch.bench.run import MOST_STRETCHES, STRETCH, _long_enough, compare, predict
from launch.bench.verdict import Figures, Phase, bottleneck, verdict
from launch.cli import main as pipeline
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World

pytestmark = pytest.mark.timed

BATCH = 2
DELAY = 0.6  # seconds a batch, far above what these small images take, also on a busy machine


def slow(patch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """Make a method take longer, at no CPU time."""
    real = getattr(owner, method)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(DELAY)
        return real(*args, **kwargs)

    patch.setattr(owner, method, slowed)


def run(tmp_path: Path, data: Path, *options: str) -> dict[str, Any]:
    sizes = ("--size", "32", "--batch-size", str(BATCH), "--steps", "3")
    shallow = ("--read-ahead", "1", "--decode-ahead", "1", "--ready", "1")
    files = ("--json", tmp_path / "bench.json", "--chart", tmp_path / "bench.png")
    assert pipeline([str(arg) for arg in ("bench", data, *sizes, *shallow, *files, *options)]) == 0
    assert Image.open(tmp_path / "bench.png").width > 500
    return json.loads((tmp_path / "bench.json").read_text())


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.bench.run.ROUNDS", 1)


def test_a_slow_decoder_is_found_out(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.decode.dali import DaliDecoder

    slow(monkeypatch, DaliDecoder, "_inputs")
    found = run(tmp_path, photos)
    assert found["verdict"].startswith("input-bound: decode, ")
    assert found["verdict"] in capsys.readouterr().out
    assert found["loader"]["rate"] == pytest.approx(BATCH / DELAY, rel=0.3)
    assert found["both"]["rate"] == pytest.approx(BATCH / DELAY, rel=0.3)
    assert found["predicted"] == pytest.approx(found["loader"]["rate"], rel=0.1)
    assert found["both_of_model"] < 0.8
    assert found["both"]["waiting"] > 0.2
    assert found["reading"] > 5 * found["decoding"]
    assert found["decoders"]["skipped"] == "only a GPU has two, and only DALI uses them"


def test_a_slow_model_is_found_out(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.engine.engine import Engine

    slow(monkeypatch, Engine, "step")
    found = run(tmp_path, digits, "--augment", "light", "--no-decoder-check")  # many times as fast as that
    assert found["decoders"]["skipped"] == "--no-decoder-check"
    assert found["verdict"].startswith("model-bound: ")
    assert found["both"]["waiting"] < 0.02
    assert BATCH / DELAY / 4 < found["model"]["rate"] < BATCH / DELAY
    assert found["model"]["rate"] < found["loader"]["rate"]
    assert 0 < found["model_of_roofline"] < 1
    assert 0 < found["mfu"] < 1


def test_sizes_that_make_no_sense_are_refused(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["bench", str(digits), "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err


def figures(**changes: Any) -> Figures:
    """A GPU that waits for its decoder; with changes."""
    usual: dict[str, Any] = {
        "machine": {"device": "GPU", "cores": 16, "load": 1.0},
        "settings": {"variant": "b0", "batch": 256, "loader": "dali on the GPU, JPEG engine"},
        "reading": 50_000.0,
        "decoding": 5_100.0,
        "loader": Phase(rate=5_000.0, cpu=1e-3, waiting=1.0),
        "model": Phase(rate=8_000.0, cpu=1e-3, waiting=0.0),
        "both": Phase(rate=4_900.0, cpu=2e-3, waiting=0.31),
        "predicted": 5_000.0,
        "roofline": 40_000.0,
        "mfu": 0.1,
        "peak": 989e12,
        "peak_stated": True,
        "bytes_per_second": 1e12,
        "bandwidth": 4e12,
        "memory": {"torch_peak": 1, "in_use": 2, "total": 3},
    }
    return Figures(**(usual | changes))


READY = Phase(rate=7_990.0, cpu=2e-3, waiting=0.001)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "input-bound: decode on the GPU, 31% of the time"),
        ({"decoding": 9_000.0}, "input-bound: augmentation, 31%"),
        ({"reading": 5_200.0}, "input-bound: reading, 31%"),
        ({"loader": Phase(12_000.0, 1e-3, 1.0)}, "input-bound: contention, 31%"),
        ({"both": READY}, "model-bound: the device never waits (both/model 1.00); the model uses 20%"),
        ({"both": Phase(7_000.0, 2e-3, 0.001, host=0.035)}, "host-bound: "),
        (
            {"both": Phase(7_000.0, 2e-3, 0.001, host=0.020)},
            "device-bound: the loader's work on the GPU takes 12% of the device (both/model 0.88)",
        ),
        (  # B3 on an H200: of two steps, one stands beside the decoding of two batches
            {"loader": Phase(18_408.0, 1.6e-4, 1.0), "model": Phase(3_210.0, 2.6e-4, 0.0)}
            | {"both": Phase(2_846.0, 5.1e-4, 0.069, host=0.017)},
            "device-bound: the loader's work on the GPU takes 11% of the device (both/model 0.89)",
        ),
        ({"both": Phase(8_800.0, 2e-3, 0.4)}, "unsteady: training was faster than the model alone (both/model 1.10)"),
        ({"both": Phase(8_800.0, 2e-3, 0.0), "memory": {}}, "model-bound: the device never waits (both/model 1.10)"),
        ({"both": Phase(7_000.0, 2e-3, 0.001), "memory": {}}, "model-bound: batches are always ready"),
    ],
)
def test_the_verdict_names_what_limits(changes: dict[str, Any], expected: str) -> None:
    assert verdict(figures(**changes)).startswith(expected)


class Gpu:
    """What `compare` sees of a GPU: it steps slowly at first, and knows the time of each step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.done, self.number, self.batches = 0.0, 0.0, 0, 0
        patch.setattr("launch.bench.run.settle", lambda _: self.settle())
        patch.setattr("launch.bench.run.timed_event", lambda _: self.mark())
        patch.setattr("launch.run.data_wait.timed_event", lambda _: self.mark())
        patch.setattr("launch.bench.run.time.perf_counter", lambda: self.now)
        patch.setattr("launch.bench.run.time.sleep", lambda _: None)

    def settle(self) -> None:
        self.now = max(self.now, self.done)

    def mark(self) -> Any:
        at = max(self.now, self.done)
        return SimpleNamespace(at=at, query=lambda: self.now >= at, elapsed_time=lambda other: 1000 * (other.at - at))

    @contextmanager
    def loader(self, ready: float) -> Iterator[Iterator[Any]]:
        """A loader whose batches are whole so many seconds before the host gets them; opened, the device cools down."""
        self.number = 0

        def batches() -> Iterator[Any]:
            while True:
                self.now += 0.001
                at = self.now - ready
                yield SimpleNamespace(ready=SimpleNamespace(at=at, query=lambda at=at: self.now >= at))

        yield batches()

    def step(self, _: Any) -> None:
        self.now += 0.002
        self.done = max(self.now, self.done) + (0.2 if self.number < 3 else 0.05)
        self.number += 1


def test_steps_of_a_gpu_are_timed_when_they_have_become_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    opener = partial(gpu.loader, 0.0)
    _, model, both = compare(
        opener, opener, gpu.step, batch=10, steps=20, ahead=1, device=torch.device("cuda", 0), rounds=2
    )
    for phase in (model, both):
        assert phase.rate == pytest.approx(10 / 0.05, rel=0.01)
        assert phase.host == pytest.approx(0.002)
        assert len(phase.times) == 40
        assert statistics.median(phase.times) == pytest.approx(50.0)
        assert phase.waiting < 0.01


def test_decoding_on_cpus_has_other_remedies() -> None:
    on_cpu = figures(settings={"loader": "dali on CPUs"})
    assert bottleneck(on_cpu) == "decode"
    assert "--decode-threads" in verdict(on_cpu)


def test_the_chart_shows_the_figures() -> None:
    found = dataclasses.replace(figures(), verdict="input-bound: decode")
    speeds, shares = draw(found).axes
    assert [bar.get_width() for bar in speeds.patches] == [5_000, 8_000, 5_000, 4_900]
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([4_900 / 8_000, 0.31, 0.2, 0.1])


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (None, 10.0),  # a GPU: the slower of the two
        (16, 10.0),  # cores enough for both
        (2, 2 / 0.28),  # .18 s of the model's and .1 s of the loader's CPU time, on two cores
    ],
)
def test_predictions_share_out_the_cores(cores: int | None, expected: float) -> None:
    loader, model = Phase(rate=20.0, cpu=0.1, waiting=1.0), Phase(rate=10.0, cpu=0.18, waiting=0.0)
    assert predict(loader, model, cores=cores) == pytest.approx(expected)


def test_the_loader_lasts_however_small_the_set(digits: Path) -> None:
    recipe = parse(
        ["--data", str(digits), "--size", "32", "--global-batch", "512", "--epochs", "1", "--warmup-epochs", "0"]
    )
    feed = Feed.of(recipe, World(0, 1, 0, 1, torch.device("cpu")))
    assert feed.plan.steps_per_epoch < 5
    longer = _long_enough(feed, 40)
    assert longer.last_step >= 40 + MOST_STRETCHES * STRETCH
    assert longer.plan == feed.plan
