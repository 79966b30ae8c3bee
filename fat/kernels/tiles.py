"""Launch shapes of the kernels, chosen from the maps' shapes alone: the same on every device and at every call, so that
split reductions add in one order. Reasons and byte counts: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

LANES = {3: 8, 5: 8, 7: 4, 9: 4}  # elements per thread, by kernel size: 8 is one 16-byte access in half precision;
# with 8, the weights of a column of 7 or 9 taps and the sums leave no registers for occupancy
WARP = 32
MAX_WARPS = 4
ROWS = (7, 8, 6, 5, 4)  # rows per thread, best first: 7 divides every map of a 224 image
PROGRAMS = 1056  # of a split reduction: two for each of the four scheduling slots of an H100's 132 multiprocessors
FLAT, FLAT_WARPS = 4096, 8  # elements of one program of a kernel that reads maps flat: 16 a thread
COLUMN_SUMS = 4  # tiles of FLAT elements that a program of a reduction over positions walks over
MAX_PARTS = 256  # partial results that are joined at once
JOINED_EACH = 128  # parts of a channel's moments that a program joins: two rounds for up to 16384 tiles
JOINED_ROWS, JOINED_CHANNELS, JOINED_WARPS = 32, 32, 4  # at once
FOLDED_ROWS, FOLDED_CHANNELS, FOLDED_WARPS = 32, 16, 4  # of 1x1 weights: 128 to 2048 channels are 8 to 128 programs


@dataclass(frozen=True)
class Tile:
    """What one program of a depthwise kernel works on: `rows` x `cols` positions of `channels` channels."""

    rows: int
    cols: int
    channels: int
    warps: int


@cache
def depthwise(kernel: int, height: int, width: int, channels: int) -> Tile:
    """For a kernel that writes maps of that size: each thread keeps some channels of a column of `rows` positions, so
    a row that has been read serves all kernel rows."""
    wide = widest(channels)
    lanes = LANES[kernel]
    cols = min(power_of_2(width), MAX_WARPS * WARP * lanes // wide)
    # Where there are more threads than channels, Triton loads a weight in every thread that needs it; else in one, and
    # hands it to the others through shared memory, with a barrier for each.
    lanes = min(lanes, max(1, cols // 2))
    return Tile(best(height), cols, wide, warps(cols * wide // lanes))


@cache
def weight_gradient(kernel: int, height: int, width: int, channels: int) -> tuple[Tile, int]:
    """For the weight gradient from a gradient map of that size, and how many kernel columns a program takes: a thread
    keeps one sum for each tap of these and each of its channels, which bounds both."""
    wide = widest(channels)
    lanes, columns, rows = {3: (8, 3, 7), 5: (4, 5, 4), 7: (4, 4, 4), 9: (4, 3, 4)}[kernel]
    cols = min(power_of_2(width), MAX_WARPS * WARP * lanes // wide)
    return Tile(min(best(height), rows), cols, wide, warps(cols * wide // lanes)), columns


def splits(tiles: int, programs_each: int) -> int:
    """Into how many parts `tiles` are split when each part is worked on by `programs_each` programs."""
    return max(1, min(tiles // 2, PROGRAMS // programs_each))


def column_sums(positions: int, channels: int) -> tuple[int, int]:
    """Positions at once, and positions of one program, of a reduction over a sample's positions for each channel."""
    rows = max(1, min(FLAT // power_of_2(channels), power_of_2(positions)))
    return rows, rows * COLUMN_SUMS


def joined(parts: int) -> int:
    return min(MAX_PARTS, power_of_2(parts))


def widest(channels: int) -> int:
    """The channels of a tile: of 64 and 32, which are whole cache sectors side by side, the one that leaves fewer lanes
    idle."""
    if channels <= 16:
        return 16
    return min((64, 32), key=lambda wide: (-(-channels // wide) * wide, -wide))


def best(height: int) -> int:
    """The rows of a tile that leave the fewest rows idle."""
    if height < ROWS[0]:
        return height
    return min(ROWS, key=lambda rows: -(-height // rows) * rows)


def warps(threads: int) -> int:
    return max(1, min(8, threads // WARP))


def power_of_2(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << (number - 1).bit_length()
