"""`pipeline bench` with known results: on a simulated clock the loader or the model is slower, and the measured rates,
the verdict and the chart must show it."""

from __future__ import annotations

import itertools
import json
import statistics
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
from launch.bench.one_rank import one_rank
from launch.bench.phases import compare, predict
from launch.bench.run import _reading, describe_machine
from launch.bench.verdict import Figures, Phase, bottleneck
from launch.cli import main as pipeline
from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.device_peaks import DevicePeaks
from launch.machine.world import World
from launch.monitor.roofline import Roofline
from shards.files.output import MARK

BATCH = 2
CPU = torch.device("cpu")


def run(tmp_path: Path, data: Path, *options: str) -> dict[str, Any]:
    own = ("--steps", "3", "--json", tmp_path / "bench.json", "--chart", tmp_path / "bench.png")
    sizes = ("--size", "32", "--global-batch", str(BATCH))
    shallow = ("--read-ahead", "1", "--decode-ahead", "1", "--ready", "1")
    assert pipeline([str(arg) for arg in ("bench", data, *own, "--", *sizes, *shallow, *options)]) == 0
    assert Image.open(tmp_path / "bench.png").width > 500
    assert MARK.encode() in (tmp_path / "bench.png").read_bytes()[:4096]
    return json.loads((tmp_path / "bench.json").read_text())


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.bench.run.ROUNDS", 1)


def test_bench_prints_and_writes_its_results(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, digits, "--augment", "light")
    assert found["verdict"] in capsys.readouterr().out
    assert (
        min(found["reading"], found["decoding"], *(found[phase]["rate"] for phase in ("loader", "model", "both"))) > 0
    )
    assert found["both_of_model"] == pytest.approx(found["both"]["rate"] / found["model"]["rate"], rel=0.01)
    assert 0 < found["model_of_roofline"] < 1
    assert 0 < found["mfu"] < 1


def test_one_size_is_measured_with_a_filled_memory_cache(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--size-schedule", "0:64,50:32", "--micro-batch-schedule", "64:1")
    model = ("--model", "tests.support.models:with_classifier", "--augment", "light")
    found = run(tmp_path, digits, *sizes, *model, "--memory-cache", "0.1")
    assert "--size-schedule: images of --size 32 are measured" in capsys.readouterr().err
    assert (found["settings"]["batch"], found["settings"]["size"], found["read"]) == (BATCH, 32, 0.0)
    assert "1,437 of 1,437 images (100.0%)" in found["settings"]["memory cache"]
    assert "memory cache" in found["decode_paths"]


@pytest.mark.parametrize(
    ("ranks", "batch", "rows", "noted"),
    [
        (2, ("--global-batch", "32", "--micro-batch", "8", "--lanes", "16"), 8, False),
        (4, ("--global-batch", "96"), 24, False),
        (1, ("--global-batch", "1024"), 1024, False),
        (2, (), 16, True),
        (128, (), 8, False),
    ],
)
def test_the_micro_batch_of_one_rank_is_measured(
    *,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ranks: int,
    batch: tuple[str, ...],
    rows: int,
    noted: bool,
) -> None:
    seen: list[Feed] = []
    resolved: list[dict[str, Any]] = []

    def measured(feed: Feed, *_: object) -> Figures:
        seen.append(feed)
        return figures()

    # Options that depend on the number of ranks require a GPU.
    monkeypatch.setattr("launch.bench.one_rank.Execution.of", lambda *_, **options: resolved.append(options))
    monkeypatch.setattr("launch.bench.run._figures", measured)
    monkeypatch.setattr("launch.bench.run.Engine", lambda *_, **__: SimpleNamespace(notes=[], resolved={}))
    monkeypatch.setattr("launch.bench.chart.write_chart", lambda *_: None)
    arguments = ("bench", str(digits), "--ranks", str(ranks), "--", "--size", "32", "--augment", "light", *batch)
    assert pipeline(arguments) == 0
    assert seen[0].shape.micro_rows == rows
    assert (resolved[0]["ranks"], resolved[0]["accumulation"]) == (ranks, seen[0].shape.accumulation)
    assert (f"measuring {rows} images per forward pass" in capsys.readouterr().err) is noted


def test_a_batch_that_the_ranks_do_not_divide_is_rejected(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["bench", str(digits), "--ranks", "3", "--", "--global-batch", "100"]) == 2
    assert "world size 3 does not divide the global batch of 100" in capsys.readouterr().err


def test_the_model_alone_is_measured_without_the_cache_of_decoded_images(tmp_path: Path, digits: Path) -> None:
    found = run(tmp_path, digits, "--augment", "light", "--gpu-cache", "0.01")
    assert found["model"]["rate"] > 0


def test_reading_is_measured_without_decoding(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.decode.dali import DaliDecoder

    monkeypatch.setattr(DaliDecoder, "_inputs", lambda *_: pytest.fail("an image was decoded"))
    recipe = parse(["--data", str(digits), "--size", "32", "--global-batch", "2"])
    assert _reading(Feed.of(recipe, World(0, 1, 0, 1, CPU)), steps=3, ahead=1) > 0


class Host:
    """Simulated machine whose loader takes `loading` seconds per batch, and whose model `training` seconds per step."""

    def __init__(self, patch: pytest.MonkeyPatch, *, loading: float, training: float, ahead: int) -> None:
        self.now, self.loading, self.training, self.ahead = 0.0, loading, training, ahead
        patch.setattr("launch.bench.phases.time.perf_counter", lambda: self.now)
        patch.setattr("launch.bench.phases.time.sleep", lambda seconds: setattr(self, "now", self.now + seconds))

    @contextmanager
    def loader(self) -> Iterator[Iterator[Any]]:
        def batches() -> Iterator[Any]:
            made, taken = self.now, list[float]()
            while True:
                # A batch is begun when the previous one is ready and fewer than `ahead` are waiting.
                begun = max(made, taken[-self.ahead] if len(taken) >= self.ahead else 0.0)
                made = begun + self.loading
                self.now = max(self.now, made)
                taken.append(self.now)
                yield None

        yield batches()

    @contextmanager
    def resident(self) -> Iterator[Iterator[Any]]:
        yield itertools.repeat(None)

    def step(self, _: Any) -> None:
        self.now += self.training


@pytest.mark.parametrize(
    ("loading", "training", "expected", "waiting"),
    [(0.6, 0.2, "input-bound: ", 2 / 3), (0.1, 0.5, "model-bound: ", 0.0)],
)
def test_the_verdict_finds_the_slower_of_loader_and_model(
    monkeypatch: pytest.MonkeyPatch, loading: float, training: float, expected: str, waiting: float
) -> None:
    host = Host(monkeypatch, loading=loading, training=training, ahead=2)
    loader, model, both = compare(
        host.loader, host.resident, host.step, batch=BATCH, steps=10, ahead=2, device=CPU, rounds=2
    )
    assert loader.rate == pytest.approx(BATCH / loading)
    assert model.rate == pytest.approx(BATCH / training)
    assert both.rate == pytest.approx(BATCH / max(loading, training))
    assert both.waiting == pytest.approx(waiting)
    assert model.waiting == 0
    assert predict(loader, model, cores=None) == pytest.approx(both.rate)
    assert figures(loader=loader, model=model, both=both).verdict.startswith(expected)


def test_invalid_sizes_are_rejected(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["bench", str(digits), "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err


def figures(**changes: Any) -> Figures:
    """Return results of a GPU that waits for its decoder, with changes."""
    usual: dict[str, Any] = {
        "machine": {"device": "GPU", "cores": 16, "load": 1.0},
        "settings": {"model": "fat_b0", "batch": 256, "loader": "dali on the GPU, JPEG engine"},
        "reading": 50_000.0,
        "decoding": 5_100.0,
        "decode_paths": {},
        "loader": Phase(rate=5_000.0, cpu=1e-3, waiting=1.0),
        "model": Phase(rate=8_000.0, cpu=1e-3, waiting=0.0),
        "both": Phase(rate=4_900.0, cpu=2e-3, waiting=0.31),
        "predicted": 5_000.0,
        "roofline": ROOFLINE,
        "memory": {"torch_peak": 1, "in_use": 2, "total": 3},
    }
    return Figures(**(usual | changes))


# Memory bandwidth limits the model to 40,000 images/s; the arithmetic peak would allow 80,000.
ROOFLINE = Roofline(10**9, 10**8, DevicePeaks(arithmetic=80e12, stated=True, bandwidth=4e12))
READY = Phase(rate=7_990.0, cpu=2e-3, waiting=0.001)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "input-bound: decode on the GPU, 31% of the time"),
        ({"decoding": 9_000.0}, "input-bound: augmentation, 31%"),
        ({"reading": 5_200.0}, "input-bound: reading, 31%"),
        ({"reading": 2_500.0, "read": 0.5}, "input-bound: reading, 31%"),
        ({"reading": 2_500.0, "read": 0.1}, "input-bound: decode on the GPU, 31% of the time"),
        ({"loader": Phase(12_000.0, 1e-3, 1.0)}, "input-bound: contention, 31%"),
        ({"both": READY}, "model-bound: the device never waits (both/model 1.00); the model reaches 20%"),
        ({"both": Phase(7_000.0, 2e-3, 0.001, host=0.035)}, "host-bound: "),
        (
            {"both": Phase(7_000.0, 2e-3, 0.001, host=0.020)},
            "device-bound: the loader's work on the GPU takes 12% of the device (both/model 0.88)",
        ),
        (  # measured with B3 on an H200: every other step overlaps with the decoding of two batches
            {"loader": Phase(18_408.0, 1.6e-4, 1.0), "model": Phase(3_210.0, 2.6e-4, 0.0)}
            | {"both": Phase(2_846.0, 5.1e-4, 0.069, host=0.017)},
            "device-bound: the loader's work on the GPU takes 11% of the device (both/model 0.89)",
        ),
        ({"both": Phase(8_800.0, 2e-3, 0.4)}, "unsteady: training was faster than the model alone (both/model 1.10)"),
        ({"both": Phase(8_800.0, 2e-3, 0.0), "memory": {}}, "model-bound: the device never waits (both/model 1.10)"),
        ({"both": Phase(7_000.0, 2e-3, 0.001), "memory": {}}, "model-bound: batches are always ready"),
    ],
)
def test_the_verdict_names_the_bottleneck(changes: dict[str, Any], expected: str) -> None:
    assert figures(**changes).verdict.startswith(expected)


class Gpu:
    """Simulated GPU for `compare`: its first steps are slow, and it records the time of each step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.done, self.number, self.batches = 0.0, 0.0, 0, 0
        patch.setattr("launch.bench.phases.synchronize", lambda _: self.synchronize())
        patch.setattr("launch.bench.phases.timed_event", lambda _: self.mark())
        patch.setattr("pipeline.data_wait.timed_event", lambda _: self.mark())
        patch.setattr("launch.bench.phases.time.perf_counter", lambda: self.now)
        patch.setattr("launch.bench.phases.time.sleep", lambda _: None)

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    def mark(self) -> Any:
        at = max(self.now, self.done)
        return SimpleNamespace(at=at, query=lambda: self.now >= at, elapsed_time=lambda other: 1000 * (other.at - at))

    @contextmanager
    def loader(self, ready: float) -> Iterator[Iterator[Any]]:
        """Loader whose batches are ready `ready` seconds before the host gets them. Opening it slows the GPU down."""
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


def test_steps_of_a_gpu_are_timed_once_their_rate_is_steady(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_decoding_on_cpus_has_different_remedies() -> None:
    on_cpu = figures(settings={"loader": "dali on CPUs"})
    assert bottleneck(on_cpu) == "decode"
    assert "--decode-threads" in on_cpu.verdict


def test_the_chart_shows_the_results() -> None:
    speeds, shares = draw(figures()).axes
    assert [bar.get_width() for bar in speeds.patches] == [5_000, 8_000, 5_000, 4_900]
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([4_900 / 8_000, 0.31, 0.2, 0.1])


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (None, 10.0),  # a GPU: the slower of the two determines the rate
        (16, 10.0),  # enough cores for both
        (2, 2 / 0.28),  # 0.18 s of the model's and 0.1 s of the loader's CPU time on two cores
    ],
)
def test_the_prediction_accounts_for_shared_cores(cores: int | None, expected: float) -> None:
    loader, model = Phase(rate=20.0, cpu=0.1, waiting=1.0), Phase(rate=10.0, cpu=0.18, waiting=0.0)
    assert predict(loader, model, cores=cores) == pytest.approx(expected)


def test_the_loader_does_not_run_out_of_batches_on_a_small_set(digits: Path) -> None:
    epoch = ("--size", "32", "--global-batch", "512", "--epochs", "1", "--warmup-epochs", "0", "--augment", "light")
    with one_rank(parse(["--data", str(digits), *epoch, "--stop-after", "1"]), ranks=1) as (feed, _):
        assert feed.plan.steps_per_epoch == 2
        with feed.train_loader(step=0, dtype=torch.float32) as loader:
            assert [next(loader).position.epoch for _ in range(5)] == [0, 0, 1, 1, 2]


def test_the_cores_of_the_measured_rank_are_recorded() -> None:
    """`cores` are those of a NUMA node, which the rank divides with others."""
    world = World(rank=0, size=1, local_rank=0, local_size=8, device=torch.device("cpu"), cores=16)
    found = describe_machine(world, 64)
    assert (found["cores"], found["rank_cores"]) == (64, 16)
