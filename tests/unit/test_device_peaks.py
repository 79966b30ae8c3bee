"""Peak arithmetic and bandwidth of devices, and the utilization that a run logs (launch/machine/device_peaks.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fat
from launch.machine.device_peaks import COPIED, device_peaks, measured_bandwidth, random_bytes, stated_arithmetic
from launch.train import main as train
from tests.support.commands import SMALL, run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("Some other GPU", None),
    ],
)
def test_vendor_peak_is_found_by_device_name(name: str, tera: float | None) -> None:
    assert stated_arithmetic(name) == (None if tera is None else tera * 1e12)


def test_cpu_peaks_are_measured_once() -> None:
    peaks = device_peaks(CPU, "fp32")
    assert not peaks.stated
    assert 1e9 < peaks.arithmetic < 1e14
    assert 1e8 < peaks.bandwidth < 1e13
    assert measured_bandwidth(CPU) is measured_bandwidth(CPU)


def test_bandwidth_is_measured_with_random_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(random_bytes(1 << 16, CPU)) == 1 << 16
    assert (random_bytes(1 << 16, CPU).long().bincount(minlength=256) > 100).all()
    sizes: list[int] = []

    def recorded(count: int, device: torch.device) -> torch.Tensor:
        sizes.append(count)
        return random_bytes(count, device)

    monkeypatch.setattr("launch.machine.device_peaks.random_bytes", recorded)
    assert measured_bandwidth.__wrapped__(CPU) > 1e8
    assert sizes == [COPIED["cpu"]]


def test_run_logs_utilization_and_resolved_options(tmp_path: Path, digits: Path) -> None:
    out = tmp_path / "run"
    options = ("--stop-after", "2", "--log-every", "1", "--verbose")
    assert run(train, *SMALL, "--data", digits, "--out", out, *options) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    picks = next(line for line in lines if line["kind"] == "resolved")
    assert picks["compile"] == "off"
    assert picks["channels-last"] == "weights and activations"
    assert picks["loader"] == "dali on CPUs"
    line = [line for line in lines if line["kind"] == "train"][-1]
    cost, peaks = fat.count(fat.create_model("fat_b0", num_classes=10), 32), device_peaks(CPU, "fp32")
    rate = line["images_per_second"]
    bounds = {"rel": 0.02 + 0.05 / rate, "abs": 1e-4}  # the log rounds the rate to one decimal
    assert line["mfu"] == pytest.approx(6 * cost.macs * rate / peaks.arithmetic, **bounds)
    assert line["bandwidth"] == pytest.approx(cost.fused_bytes(4) * rate / peaks.bandwidth, **bounds)
