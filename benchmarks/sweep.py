"""Time alternative forms and launch configurations of the most expensive depthwise kernels of FAT-B0 and FAT-B3.

    python benchmarks/sweep.py [--kernels REGEX] [--batch 256] [--rounds 5] [--seconds 45] [--out FILE.json]

Needs a CUDA device. Use it after a change of these kernels, to update fat/kernels/impl/tiles.py. The calls are in the
order of their fraction of a training step at 224 pixels. For each candidate, the table shows microseconds, and the
minimum memory traffic divided by the time, as a fraction of the bandwidth of a copy. `fastest` marks the best
candidate; `chosen` is the choice of tiles.py. The script ends after --seconds. Run `benchmarks/prefill.py
--work sweep` first, or most of the time is spent compiling kernels.

Names of candidates: "columns": a thread computes a column of outputs with 4 or 8 channels; "blocks RxA": R rows by A
columns; "/2": with two channels; "w8": eight warps per program. For weight gradients: "strips", or the parameters of a
walk (fat/kernels/impl/tiles.py) and the rows of a tile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import kernel_jobs
from benchmarks.kernel_jobs import feature_maps, rand
from benchmarks.kernels import Clock, copy_bandwidth
from fat.kernels import ops
from fat.kernels.impl import tiles

CHOSEN = "chosen"
Candidate = tuple[str, AbstractContextManager[object]]


@dataclass(frozen=True)
class Call:
    """An operator at one shape: kernel size, channels and side of the larger feature map."""

    operator: str
    kernel: int
    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.operator} {self.kernel}x{self.kernel} {self.channels}x{self.side}x{self.side}"

    def make(self, batch: int) -> tuple[Callable[[], object], int]:
        """Return a function that makes the call, and its minimum memory traffic in bytes."""
        shape = (batch, self.channels, self.side, self.side)
        x, other = (feature_maps(shape, torch.bfloat16) for _ in range(2))
        weight = torch.randn(self.channels, 1, self.kernel, self.kernel, device=kernel_jobs.DEVICE)
        bias, size = rand(self.channels), x.numel() * x.element_size()
        half = feature_maps((*shape[:2], self.side // 2, self.side // 2), torch.bfloat16)
        sides = self.side, self.side
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "weight gradient": (
                lambda: ops.depthwise_stats_gradient(x, x, other, bias, bias, bias, self.kernel, 1),
                4 * size,
            ),
            "plain weight gradient": (lambda: ops.depthwise_weight_gradient(x, other, self.kernel, 1), 2 * size),
            "stride 2 weight gradient": (
                lambda: ops.depthwise_stats_gradient(half, x, half, bias, bias, bias, self.kernel, 2),
                size + 3 * size // 4,
            ),
            "moments": (lambda: ops.depthwise_stats(x, None, weight, bias, 1, True), 2 * size),
            "GELU gradient": (lambda: ops.depthwise_input_gradient(x, weight, other, *sides, 1, True), 3 * size),
            "gradient": (lambda: ops.depthwise_input_gradient(x, weight, None, *sides, 1, True), 2 * size),
            "forward": (lambda: ops.depthwise(x, weight, bias, 1, True), 2 * size),
            "gate": (lambda: ops.depthwise_gate(x, weight, bias, other), 3 * size),
            "gate gradient": (lambda: ops.depthwise_gate_gradient(x, other, weight, bias, other), 5 * size),
            "stride 2": (lambda: ops.depthwise(x, weight, bias, 2, False), size + size // 4),
            "stride 2 gradient": (
                lambda: ops.depthwise_input_gradient(half, weight, None, *sides, 2, False),
                size + size // 4,
            ),
        }
        return calls[self.operator]


CALLS = [
    *(
        Call(name, 5, c, side)
        for c, side in ((256, 56), (1024, 14), (512, 28))
        for name in ("moments", "GELU gradient", "weight gradient")
    ),
    *(Call(name, 7, 256, 14) for name in ("gradient", "gate")),
    Call("gate gradient", 5, 128, 28),
    Call("gate gradient", 3, 64, 56),
    Call("gate", 3, 64, 56),
    Call("moments", 5, 320, 28),
    Call("gradient", 9, 512, 7),
    Call("plain weight gradient", 7, 256, 14),
    Call("stride 2 weight gradient", 5, 64, 56),
    Call("plain weight gradient", 9, 512, 7),
    Call("plain weight gradient", 3, 64, 56),
    Call("stride 2 gradient", 5, 64, 56),
    Call("stride 2", 5, 64, 56),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=re.compile, default=re.compile(""), metavar="REGEX", help="calls to time")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if kernel_jobs.DEVICE != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("PyTorch finds no CUDA device; set TRITON_INTERPRET=1 to run on the CPU (times are meaningless)")

    end = time.monotonic() + options.seconds
    clock = Clock(options.rounds)
    bandwidth = copy_bandwidth(clock)
    device = torch.cuda.get_device_name() if kernel_jobs.DEVICE == "cuda" else "CPU, interpreted"
    setting = {"device": device, "copy GB/s": round(bandwidth / 1e9, 1), "batch": options.batch}
    print(", ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    results: list[dict[str, Any]] = []
    for call in CALLS:
        if not options.kernels.search(str(call)):
            continue
        if time.monotonic() > end:
            print(f"stopped before {call}: --seconds {options.seconds:g} are over")
            break
        run, least = call.make(options.batch)
        rows: list[dict[str, Any]] = []
        for label, shaped in candidates(call):
            try:
                with shaped:
                    seconds = clock.measure({"ours": run})["ours"]
            except Exception as error:  # a candidate may exceed the resources of the device; continue with the others
                rows.append({"candidate": label, "failed": f"{type(error).__name__}: {error}"[:200]})
                continue
            fraction = least / seconds / bandwidth
            rows.append({"candidate": label, "us": round(seconds * 1e6, 1), "share": round(fraction, 3)})
        best = min((row["us"] for row in rows if "us" in row), default=None)
        print(f"{call}, {least / 1e6:.0f} MB")
        for row in rows:
            figures = row.get("failed") or f"{row['us']:9.1f} us {row['share']:6.3f}" + " fastest" * (row["us"] == best)
            print(f"  {row['candidate']:16} {figures}", flush=True)
        results.append({"call": str(call), "bytes": least, "candidates": rows})
        if options.out:
            options.out.write_text(json.dumps({**setting, "results": results}, indent=1) + "\n")
    return 0


def candidates(call: Call) -> Iterator[Candidate]:
    """Yield names of candidates, and contexts in which the call uses them."""
    yield CHOSEN, nullcontext()
    if "weight gradient" in call.operator:
        stride = 2 if call.operator.startswith("stride 2") else 1
        out = call.side // stride
        yield "strips", mock.patch.object(tiles, "weight_gradient", tiles.strips)
        for form in tiles.other_patches(call.kernel, stride, out, out, call.channels):
            walk = form.walk
            label = f"{walk.each} {walk.together}{' early' * walk.early} {walk.resident} rows {form.rows}"
            yield label, mock.patch.object(tiles, "weight_gradient", lambda *_, form=form: form)
        return
    if call.operator == "stride 2 gradient":
        yield "columns", mock.patch.object(tiles, "spread", tiles.columns)
        yield "blocks 1x7", mock.patch.object(tiles, "spread", partial(tiles.spread_blocks, rows=1))
        return
    yield "columns", mock.patch.object(tiles, "depthwise", tiles.columns)
    out = call.side // 2 if call.operator == "stride 2" else call.side
    for rows, lanes, warps in ((7, 1, 4), (4, 1, 4), (4, 2, 4), (4, 2, 8)):
        if rows <= out and (call.kernel < 7 or (rows, lanes) == (7, 1)):
            label = f"blocks {rows}x7" + f"/{lanes}" * (lanes > 1) + f" w{warps}" * (warps != tiles.MAX_WARPS)
            changed = partial(tiles.blocks, rows=rows, lanes=lanes, most_warps=warps)
            yield label, mock.patch.object(tiles, "depthwise", changed)


if __name__ == "__main__":
    sys.exit(main())
