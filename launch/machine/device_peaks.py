"""Peak arithmetic throughput and memory bandwidth of a device, to which the speed of a run is compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

# Dense bf16 FLOP/s of tensor cores with fp32 accumulation, from NVIDIA's data sheets, by a part of the device's name;
# the first match applies. MFU is customarily relative to these.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
)
REPEATS = 5
# Rows of the square matrices: enough to saturate the device, few enough to take a tenth of a second.
MATRIX = {"cuda": 8192, "cpu": 768}
COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes to copy: more than any cache holds


@dataclass(frozen=True)
class DevicePeaks:
    """Peaks of one device at one precision."""

    arithmetic: float
    """FLOP/s of matrix products."""
    stated: bool
    """Whether `arithmetic` is the manufacturer's figure; otherwise it was measured with large matrix products."""
    bandwidth: float
    """Measured bandwidth of a copy on the device, in bytes/s: bytes read plus bytes written."""


def device_peaks(device: torch.device, precision: str) -> DevicePeaks:
    """Return the peaks of a device. The first call measures them, which takes some tenths of a second.

    Args:
        precision: "bf16" or "fp32" (TF32 if torch.backends allows it).
    """
    stated = stated_arithmetic(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if precision != "bf16":
        stated = None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    arithmetic = measured_arithmetic(device, dtype) if stated is None else stated
    return DevicePeaks(arithmetic=arithmetic, stated=stated is not None, bandwidth=measured_bandwidth(device))


def stated_arithmetic(name: str) -> float | None:
    """Return the manufacturer's bf16 FLOP/s of a device by its name; None if unknown."""
    return next((flops for part, flops in PEAK_FLOPS if part in name), None)


@cache
def measured_arithmetic(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a product of large square matrices."""
    side = MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


@cache
def measured_bandwidth(device: torch.device) -> float:
    """Measure the bytes/s that a copy reads plus writes."""
    source = random_bytes(COPIED[device.type], device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def random_bytes(count: int, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return random data to copy: uint8 [count], where `count` is a multiple of 8.

    Copying constant data would switch fewer bits, so a GPU would draw less power and run at a higher clock than with
    the feature maps to which the copy is compared.
    """
    return torch.randint(2**63 - 1, (count // 8,), device=device, generator=generator).view(torch.uint8)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)  # slower repetitions were disturbed by other work


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
