"""Triton kernels of the sum of each channel of a channels-last feature map, which is the gradient of a bias.

The feature map is a contiguous matrix with one row per position. A program sums some rows of some channels, and a
second kernel adds the partial sums. Sums are fp32 and rounded once.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles

WIDE = (128, 64, 32)  # choices for the number of channels per program: full cache lines or adjacent sectors
IN_FLIGHT, WARPS = 8192, 8  # elements that a program loads at once: 32 per thread, four accesses in half precision
PROGRAMS = 512  # target number of programs: nearly four per H100 multiprocessor, which can run four at a time
MERGED_PARTS, MERGED_CHANNELS, MERGED_WARPS = 512, 16, 8  # tile of the kernel that adds partial sums


@triton.jit(do_not_specialize=("positions", "each"))
def _channel_sums(x, out, positions, channels, each, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [positions, channels] -> out [parts, channels], the sums of `each` rows per part."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    start = part.to(tl.int64) * each
    count = tl.minimum(positions - start, each).to(tl.int32)
    x += start * channels
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (c < channels)[None, :]
        total += tl.load(x + row[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    found = tl.sum(total, axis=0)
    tl.store(out + part * channels + c, found.to(out.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=("parts",))
def _joined_sums(sums, out, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """sums fp32 [parts, channels] -> out [channels]. A program adds all parts of its channels, PARTS at a time."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((PARTS, CHANNELS), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (c < channels)[None, :]
        total += tl.load(sums + part[:, None] * channels + c[None, :], mask=inside, other=0.0)
    tl.store(out + c, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=c < channels)


@cache
def launch_shape(positions: int, channels: int) -> tuple[int, int, int]:
    """Return (channels per program, rows per iteration, rows per program)."""
    wide = tiles.widest(channels, WIDE)
    rows = min(IN_FLIGHT // wide, tiles.power_of_2(positions))
    steps = triton.cdiv(positions, rows)
    parts = min(steps, max(1, PROGRAMS // triton.cdiv(channels, wide)))
    return wide, rows, rows * triton.cdiv(steps, parts)


def channel_sums(x: Tensor, out: Tensor) -> None:
    """Compute the sums into `out` [C]."""
    channels = x.shape[1]
    positions = x.numel() // channels
    wide, rows, each = launch_shape(positions, channels)
    parts = triton.cdiv(positions, each)
    sums = out if parts == 1 else x.new_empty(parts, channels, dtype=torch.float32)
    _channel_sums[(triton.cdiv(channels, wide), parts)](
        x, sums, positions, channels, each, ROWS=rows, CHANNELS=wide, num_warps=WARPS
    )
    if parts > 1:
        merge(sums, out)


def merge(sums: Tensor, out: Tensor) -> None:
    """Add partial sums, fp32 [parts, ...], into `out`, rounded to its dtype. Both tensors are contiguous."""
    parts, numbers = sums.shape[0], out.numel()
    _joined_sums[(triton.cdiv(numbers, MERGED_CHANNELS),)](
        sums,
        out,
        parts,
        numbers,
        PARTS=min(MERGED_PARTS, tiles.power_of_2(parts)),
        CHANNELS=MERGED_CHANNELS,
        num_warps=MERGED_WARPS,
    )
