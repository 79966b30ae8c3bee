"""The benchmarks of kernels run completely and write all results (their times are meaningless in the interpreter)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import augment, kernel_jobs, sweep
from benchmarks import kernels as benchmark
from fat.kernels.impl import tiles


@pytest.mark.slow
def test_every_kernel_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "kernels.json"
    options = ["--variants", "fat_b0", "--stages", "1", "--batch", "1", "--size", "8", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *options, "--out", str(out)])
    benchmark.main()
    found = json.loads(out.read_text())
    assert found["copy GB/s"] > 0
    rows = {row["kernel"]: row for row in found["results"]}
    for kernel in ("depthwise 3x3 + x", "depthwise 5x5 + x weight gradient", "depthwise 5x5 s2 input gradient"):
        assert set(rows[kernel]) >= {"ours", "channels-last", "contiguous"}
    for kernel in ("depthwise 3x3 + x weight gradient", "depthwise 5x5 s2 weight gradient + statistics"):
        assert set(rows[kernel]) >= {"ours", "other form"}
    for kernel in ("gate", "gate gradient", "norm", "add and norm", "norm gradient + residual"):
        assert set(rows[kernel]) >= {"ours", "channels-last"}
    assert any("BatchNorm" in kernel for kernel in rows)
    assert rows["gate"]["bytes"] == 3 * 2 * 32 * 2 * 2


class Device:
    """A replacement of torch.cuda that records how long the device sleeps before each timed call."""

    def __init__(self) -> None:
        self.cycles: list[int] = []

    def Event(self, *, enable_timing: bool) -> Device:
        return self

    def _sleep(self, cycles: int) -> None:
        self.cycles.append(cycles)

    def elapsed_time(self, end: Device) -> float:
        return 1.0

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize(("host_seconds", "least"), [(0.0, benchmark.LEAST_CYCLES), (0.02, benchmark.LEAST_CYCLES)])
def test_the_device_sleeps_while_the_host_launches(
    host_seconds: float, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, device = benchmark.Clock(3), Device()
    monkeypatch.setattr(benchmark, "DEVICE", "cuda")
    monkeypatch.setattr(torch, "cuda", device)
    assert clock.measure({"way": lambda: time.sleep(host_seconds)}, least) == {"way": 1e-3}
    assert len(device.cycles) == 3
    assert min(device.cycles) >= max(least, host_seconds * benchmark.CYCLES_PER_SECOND)


def test_the_device_sleeps_at_least_ten_milliseconds_for_the_largest_job() -> None:
    (job,) = kernel_jobs.norm_of_the_batch_jobs((1, 32, 4, 4), 3, 16, torch.float32)
    assert benchmark.head_start(0.0, job.head_start) == 20_000_000
    assert benchmark.head_start(1.0, job.head_start) == benchmark.MARGIN * benchmark.CYCLES_PER_SECOND


def test_a_gpu_or_the_interpreter_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "no CUDA device" in capsys.readouterr().err


def test_the_other_form_is_the_one_that_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (5, 1, 28, 28, 64)
    other = kernel_jobs.in_the_other_form(lambda: tiles.weight_gradient(*shape))
    assert (tiles.weight_gradient(*shape), other()) == (tiles.patches(*shape), tiles.strips(*shape))
    monkeypatch.setattr(tiles, "STRIPS", frozenset({(5, 1, 28)}))
    assert (tiles.weight_gradient(*shape), other()) == (tiles.strips(*shape), tiles.patches(*shape))


def test_the_sweep_times_distinct_tiles_and_restores_the_default() -> None:
    used: list[tiles.Tile] = []
    before = tiles.depthwise(3, 56, 56, 64)
    found = benchmark.sweep(benchmark.Clock(1), lambda: used.append(tiles.depthwise(3, 56, 56, 64)))
    assert len({(tile.rows, tile.cols, tile.channels, tile.warps) for tile in used}) == len(found) > 10
    assert [entry["us"] for entry in found] == sorted(entry["us"] for entry in found)
    assert tiles.depthwise(3, 56, 56, 64) == before


def test_all_implementations_that_are_compared_give_the_same_results() -> None:
    for job in kernel_jobs.depthwise_jobs((1, 16, 5, 5), 3, 1, torch.float32):
        results = {way: call() for way, call in job.ways.items()}
        if kernel_jobs.OTHER_FORM in results:
            torch.testing.assert_close(results["ours"], results[kernel_jobs.OTHER_FORM], rtol=1e-4, atol=1e-4)
        if "statistics" in job.name:
            assert set(results) == {"ours", kernel_jobs.OTHER_FORM}
        elif "gradient" not in job.name:
            torch.testing.assert_close(results["ours"], results["channels-last"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(results["ours"], results["contiguous"], rtol=1e-4, atol=1e-4)
        elif "input" in job.name:
            torch.testing.assert_close(results["ours"], results["contiguous"], rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(results["ours"][0], results["contiguous"][1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(results["ours"][1], results["contiguous"][2], rtol=1e-4, atol=1e-4)


def test_the_report_compares_augmentation_by_pytorch_and_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that need a GPU are replaced: time of a step, number of launches, device time."""
    monkeypatch.setattr(augment.OnGpu, "step_seconds", lambda self: 0.02)
    monkeypatch.setattr(augment, "on_the_device", lambda work: (5, 1e-3))
    report = augment.OnGpu(augment.Bench(6, 16, 1, torch.device("cpu"))).report()
    rows = {(row["part"], row["way"]): row for row in report["rows"]}
    assert set(rows) == {(part, way) for part in ("RandAugment", "all") for way in ("torch", "kernels")}
    for row in rows.values():
        assert (row["launches"], row["device ms"], row["share of a step"]) == (5, 1.0, 0.05)
        assert row["ms"] > 0
    assert report["RandAugment's bytes"] % (16 * 16 * 3) == 0
    assert 2 * 6 * 16 * 16 * 3 <= report["RandAugment's bytes"] <= 6 * 6 * 16 * 16 * 3
    augment.show(
        {"machine": {}, "settings": {}, "unit": "", "operations": {}, "recipes": {}, "draws": {}, "on a GPU": report}
    )


def test_candidates_of_a_sweep_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sweep.json"
    monkeypatch.setattr(sweep, "CALLS", [sweep.Call("gradient", 3, 8, 8), sweep.Call("stride 2 gradient", 3, 8, 8)])
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--batch", "1", "--rounds", "1", "--out", str(out)])
    assert sweep.main() == 0
    gradient, spread = json.loads(out.read_text())["results"]
    assert {"chosen", "columns", "blocks 7x7", "blocks 4x7/2"} <= {row["candidate"] for row in gradient["candidates"]}
    assert {"chosen", "columns"} <= {row["candidate"] for row in spread["candidates"]}
    assert all(row["us"] > 0 for row in gradient["candidates"] + spread["candidates"])
