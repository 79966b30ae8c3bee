"""FAT's own kernels against the library's way, as shares of the bandwidth at which the device copies memory.

    python benchmarks/kernels.py [--variants fat_b0 fat_b3] [--stages 1 2 3 4] [--batch 256] [--size 224]
                                 [--dtype bfloat16] [--rounds 10] [--sweep] [--out FILE.json]

For every depthwise convolution, gate and norm of the chosen stages (a stage at its own resolution), forward and
gradients: the median time of the rounds, ways taking turns, the cache emptied before each call; and the least bytes,
every map that must be read or written counted once, over that time and over the copy's bandwidth (a copy reads and
writes: twice its size). A share of 1 is what a copy of as many bytes would take.

  ours           fat.kernels
  channels-last  torch (cuDNN for convolutions), channels-last maps and weights, as FAT runs without kernels
  contiguous     the same with NCHW maps, as the released implementation runs

--sweep also tries other launch shapes for the depthwise kernels and prints the fastest beside the one that
fat/kernels/tiles.py chooses. Needs a CUDA device; with TRITON_INTERPRET=1 it runs on the CPU, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import fat
from fat.blocks import POOL_KERNEL
from fat.config import VARIANTS
from fat.kernels import ops, tiles

Ways = dict[str, Callable[[], object]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLUSH = 256 << 20  # bytes that are overwritten before each call: more than any second-level cache
COPY = 1 << 30  # bytes of the copy
SLOW = 0.05  # seconds of a call from which three rounds are enough
HEAD_START = 4_000_000  # cycles, two milliseconds: longer than the host takes to launch the most kernels of one call
EPS = 1e-5


@dataclass(frozen=True)
class Job:
    """One kernel at one shape: what is compared, and the least bytes that it must move."""

    name: str
    shape: tuple[int, int, int, int]
    bytes: int
    ways: Ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=fat.list_models(), default=["fat_b0", "fat_b3"])
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sweep", action="store_true", help="try other launch shapes for the depthwise kernels")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()

    clock = Clock(options.rounds)
    bandwidth = copy_bandwidth(clock)
    setting = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, interpreted",
        "torch": torch.__version__,
        "copy GB/s": round(bandwidth / 1e9, 1),
        **{name: getattr(options, name) for name in ("batch", "size", "dtype", "rounds")},
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    ways = ("ours", "channels-last", "contiguous")
    print(f"{'':46} {'MB':>8} " + " ".join(f"{way + ' us':>17} {'share':>6}" for way in ways))
    results: list[dict[str, Any]] = []
    for job in jobs(options):
        seconds = clock.measure(job.ways)
        row: dict[str, Any] = {"kernel": job.name, "shape": job.shape, "bytes": job.bytes}
        for way, taken in seconds.items():
            row[way] = {"us": round(taken * 1e6, 1), "share": round(job.bytes / taken / bandwidth, 3)}
        if options.sweep and "depthwise" in job.name:
            row["sweep"] = sweep(clock, job.ways["ours"], "weight" in job.name)
        results.append(row)
        cells = [row.get(way, {"us": "", "share": ""}) for way in ways]
        label = f"{job.name} {'x'.join(map(str, job.shape[1:]))}"
        print(
            f"{label:46} {job.bytes / 1e6:8.1f} " + " ".join(f"{c['us']:>17} {c['share']:>6}" for c in cells),
            flush=True,
        )
        if "sweep" in row:
            print(f"{'':46} best of sweep: {row['sweep'][0]}")
        if options.out:
            options.out.write_text(json.dumps({**setting, "results": results}, indent=1) + "\n")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Each shape once, though variants share it."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for variant, stage in itertools.product(options.variants, options.stages):
        config = VARIANTS[variant]
        side, width, kernel = options.size >> (stage + 1), config.widths[stage - 1], config.kernels[stage - 1]
        hidden = width * config.ffn_ratio
        shape, wide = (options.batch, width, side, side), (options.batch, hidden, side, side)
        dtype = getattr(torch, options.dtype)
        found = {
            ("position", shape): depthwise_jobs(shape, kernel, 1, dtype),
            ("feed-forward", wide): depthwise_jobs(wide, config.ffn_kernel, 1, dtype),
            ("gate", shape): gate_jobs(shape, kernel, dtype),
            ("norm", shape): norm_jobs(shape, dtype),
        }
        if config.windows[stage - 1] > 1:
            found["pool", shape] = depthwise_jobs(shape, POOL_KERNEL, 2, dtype)
        for key, some in found.items():
            if key not in seen:
                seen.add(key)
                yield from some


def depthwise_jobs(shape: tuple[int, int, int, int], kernel: int, stride: int, dtype: torch.dtype) -> Iterator[Job]:
    """Stride 1 is x + depthwise(x), for the library too."""
    _, channels, height, width = shape
    residual = stride == 1
    x, weight, bias = maps(shape, dtype), torch.randn(channels, 1, kernel, kernel, device=DEVICE), rand(channels)
    out = ops.depthwise(x, weight, bias, stride, residual)
    gradient = maps(tuple(out.shape), dtype)
    half, half_bias = weight.to(dtype), bias.to(dtype)
    size, small = x.numel() * x.element_size(), out.numel() * out.element_size()
    name = f"depthwise {kernel}x{kernel}" + (" s2" if stride == 2 else " + x")

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv2d(x, weight, half_bias, stride, kernel // 2, groups=channels)
        return x + y if residual else y

    def backward(gradient: Tensor, x: Tensor, weight: Tensor, which: tuple[bool, bool, bool]) -> object:
        geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], channels)
        found = torch.ops.aten.convolution_backward(gradient, x, weight, [channels], *geometry, which)
        return found[0] + gradient if residual and which[0] else found

    def ways(ours: Callable[[], object], library: Callable[..., object], *tensors: Tensor) -> Ways:
        plain = [tensor.contiguous() for tensor in tensors]
        last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
        return {"ours": ours, "channels-last": lambda: library(*last), "contiguous": lambda: library(*plain)}

    yield Job(
        name, shape, size + small, ways(lambda: ops.depthwise(x, weight, bias, stride, residual), forward, x, half)
    )
    yield Job(
        f"{name} input gradient",
        shape,
        size + small,
        ways(
            lambda: ops.depthwise_input_gradient(gradient, weight, None, height, width, stride, residual),
            lambda g, x, w: backward(g, x, w, (True, False, False)),
            gradient,
            x,
            half,
        ),
    )
    yield Job(
        f"{name} weight gradient",
        shape,
        size + small,
        ways(
            lambda: ops.depthwise_weight_gradient(gradient, x, kernel, stride),
            lambda g, x, w: backward(g, x, w, (False, True, True)),
            gradient,
            x,
            half,
        ),
    )


def gate_jobs(shape: tuple[int, int, int, int], kernel: int, dtype: torch.dtype) -> Iterator[Job]:
    channels = shape[1]
    q, other, gradient = (maps(shape, dtype) for _ in range(3))
    weight, bias = torch.randn(channels, 1, kernel, kernel, device=DEVICE), rand(channels)
    half, half_bias = weight.to(dtype), bias.to(dtype)
    size = q.numel() * q.element_size()

    def local() -> Tensor:
        return F.silu(F.conv2d(q, half, half_bias, 1, kernel // 2, groups=channels)) * F.silu(other)

    yield Job(
        "gate", shape, 3 * size, {"ours": lambda: ops.gate(q, other), "channels-last": lambda: silu_gate(q, other)}
    )
    own = {
        "ours": lambda: ops.gate_gradient(gradient, q, other),
        "channels-last": backward_of(silu_gate, q, other, gradient),
    }
    yield Job("gate gradient", shape, 5 * size, own)
    own = {"ours": lambda: ops.depthwise_gate(q, weight, bias, other), "channels-last": local}
    yield Job(f"depthwise {kernel}x{kernel} and gate", shape, 3 * size, own)
    own = {"ours": lambda: ops.depthwise_gate_gradient(gradient, q, weight, bias, other)}
    yield Job(f"depthwise {kernel}x{kernel} and gate, gradient", shape, 5 * size, own)


def norm_jobs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Job]:
    batch, channels = shape[:2]
    x, branch, gradient, residual = (maps(shape, dtype) for _ in range(4))
    weight, bias, scale = rand(channels), rand(channels), torch.full((batch,), 1.1, device=DEVICE)
    size = x.numel() * x.element_size()
    _, mean, rstd = ops.norm(x, weight, bias, EPS)
    plain = x.contiguous()
    half, half_bias = weight.to(dtype), bias.to(dtype)

    def rows(x: Tensor) -> Tensor:
        """FAT's way without kernels."""
        flat = x.permute(0, 2, 3, 1).flatten(1)
        normal = F.layer_norm(flat, flat.shape[1:], eps=EPS).view(x.permute(0, 2, 3, 1).shape)
        return torch.addcmul(half_bias, normal, half).permute(0, 3, 1, 2)

    def added() -> Tensor:
        total = torch.addcmul(x, branch, scale.to(dtype).view(-1, 1, 1, 1))
        return rows(total)

    own: Ways = {
        "ours": lambda: ops.norm(x, weight, bias, EPS),
        "channels-last": lambda: rows(x),
        "contiguous": lambda: F.group_norm(plain, 1, half, half_bias, EPS),
    }
    yield Job("norm", shape, 2 * size, own)
    own = {"ours": lambda: ops.add_norm(x, branch, scale, weight, bias, EPS), "channels-last": added}
    yield Job("add and norm", shape, 4 * size, own)
    own = {
        "ours": lambda: ops.norm_gradient(gradient, x, mean, rstd, weight, residual),
        "channels-last": backward_of(rows, x, gradient),
    }
    yield Job("norm gradient + residual", shape, 4 * size, own)


def silu_gate(local: Tensor, other: Tensor) -> Tensor:
    return F.silu(local) * F.silu(other)


def backward_of(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    """The backward pass alone; the last tensor is the cotangent."""
    *inputs, cotangent = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)


def sweep(clock: Clock, call: Callable[[], object], weights: bool) -> list[dict[str, Any]]:
    """Launch shapes by time, the fastest first."""
    found: list[dict[str, Any]] = []
    for rows, cols, channels, warps in itertools.product((2, 4, 7, 8), (8, 16, 32), (32, 64), (2, 4, 8)):
        if cols * channels // (32 * warps) not in (2, 4, 8, 16):
            continue
        tile = tiles.Tile(rows, cols, channels, warps)

        def chosen(kernel: int, *_: int, tile: tiles.Tile = tile) -> Any:
            return (tile, {3: 3, 5: 5, 7: 4, 9: 3}[kernel]) if weights else tile

        with mock.patch.object(tiles, "weight_gradient" if weights else "depthwise", chosen):
            seconds = clock.measure({"ours": call})["ours"]
        found.append({**asdict(tile), "us": round(seconds * 1e6, 1)})
    return sorted(found, key=lambda entry: entry["us"])


class Clock:
    """Seconds of calls that take turns."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.flush = torch.empty(FLUSH if DEVICE == "cuda" else 1, dtype=torch.uint8, device=DEVICE)

    def measure(self, ways: Ways) -> dict[str, float]:
        first = {way: self._once(call) for way, call in ways.items()}  # compiles, and chooses algorithms
        del first
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(self.rounds):
            for way, call in ways.items():
                if number < 3 or median(times[way]) < SLOW:
                    times[way].append(self._once(call))
        return {way: median(taken) for way, taken in times.items()}

    def _once(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        if DEVICE != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)  # the host runs ahead, so that launching is not part of the time
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read and written."""
    # Not zeros, which a device may move faster than other bytes.
    source = torch.randint(256, (COPY if DEVICE == "cuda" else 1 << 20,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.measure({"copy": lambda: target.copy_(source)})["copy"]


def maps(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def rand(channels: int) -> Tensor:
    return torch.randn(channels, device=DEVICE)


if __name__ == "__main__":
    main()
