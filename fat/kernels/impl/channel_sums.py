"""Triton: sums of a channels-last map over everything but its channels, which are the gradients of biases.

The map is a dense matrix of one row per position. A program sums some rows of some channels; a second kernel adds what
the programs have found. All of it in fp32, rounded once.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.kernels.impl import tiles

WIDE = (128, 64, 32)  # channels of a program: whole cache lines or sectors side by side
AT_ONCE, WARPS = 8192, 8  # elements that a program has on their way, 32 a thread in half precision: four accesses
PROGRAMS = 512  # nearly four for each of an H100's multiprocessors, which hold four of them at a time
JOINED_PARTS, JOINED_CHANNELS, JOINED_WARPS = 512, 16, 8


@triton.jit(do_not_specialize=("positions", "each"))
def _channel_sums(x, out, positions, channels, each, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [positions, channels] -> out [parts, channels], sums of `each` rows."""
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
    """sums fp32 [parts, channels] -> out [channels]; all of a channel's by one program, PARTS at once."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((PARTS, CHANNELS), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (c < channels)[None, :]
        total += tl.load(sums + part[:, None] * channels + c[None, :], mask=inside, other=0.0)
    tl.store(out + c, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=c < channels)


@cache
def launch_shape(positions: int, channels: int) -> tuple[int, int, int]:
    """(channels of a program, rows at once, rows of a program)."""
    wide = tiles.widest(channels, WIDE)
    rows = min(AT_ONCE // wide, tiles.power_of_2(positions))
    steps = triton.cdiv(positions, rows)
    parts = min(steps, max(1, PROGRAMS // triton.cdiv(channels, wide)))
    return wide, rows, rows * triton.cdiv(steps, parts)


def channel_sums(x: Tensor, out: Tensor) -> None:
    """Fills `out` [C]."""
    channels = x.shape[1]
    positions = x.numel() // channels
    wide, rows, each = launch_shape(positions, channels)
    parts = triton.cdiv(positions, each)
    sums = out if parts == 1 else x.new_empty(parts, channels, dtype=torch.float32)
    _channel_sums[(triton.cdiv(channels, wide), parts)](
        x, sums, positions, channels, each, ROWS=rows, CHANNELS=wide, num_warps=WARPS
    )
    if parts > 1:
        join(sums, out)


def join(sums: Tensor, out: Tensor) -> None:
    """sums fp32 [parts, ...], dense -> `out`, dense: the sum over parts, rounded to its dtype."""
    parts, numbers = sums.shape[0], out.numel()
    _joined_sums[(triton.cdiv(numbers, JOINED_CHANNELS),)](
        sums,
        out,
        parts,
        numbers,
        PARTS=min(JOINED_PARTS, tiles.power_of_2(parts)),
        CHANNELS=JOINED_CHANNELS,
        num_warps=JOINED_WARPS,
    )
