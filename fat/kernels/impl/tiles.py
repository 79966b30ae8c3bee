"""Launch shapes of the kernels. They depend only on the shapes of the feature maps, so that they are the same on every
device and at every call, and split reductions always add in the same order. docs/kernels.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# Channels per thread, by kernel size. In half precision, 8 channels are one 16-byte access. With 7x7 and 9x9 kernels,
# the weights of a kernel column and the sums of 8 channels would need too many registers for high occupancy.
LANES = {3: 8, 5: 8, 7: 4, 9: 4}
STRIDE_2_LANES = 4  # channels per thread of a forward pass at stride 2
# Kernel sizes that use blocks at stride 1. For 7x7, blocks take 40 to 100 s to compile, because Triton's coalescing
# pass is quadratic in the size of their unrolled code. For 9x9, 81 weights leave too few registers for sums.
IN_BLOCKS = frozenset({3, 5})
SPREAD_ROWS = (2, 1)  # choices for the gradient rows of a thread's block in the input gradient at stride 2
WARP = 32  # threads per warp
MAX_WARPS = 4
ROWS = (7, 8, 6, 5, 4)  # choices for the rows per thread, best first; 7 divides every feature map of 224-pixel images
MULTIPROCESSORS = 132  # number of multiprocessors of an H100 or H200
PROGRAMS = 1056  # target number of programs of a split reduction: two per warp scheduler of an H100
ACROSS = (7, 8, 6, 5, 4)  # choices for columns of a patch, best first; 7 divides every feature map of 224-pixel images
PATCH_ROWS = 14  # rows of a tile of patches; with fewer, a larger part of the gradient is loaded twice
TAP_ROWS = {3: 3, 5: 5, 7: 7, 9: 3}  # kernel rows per program; all 9 rows of 9x9 would need 81 sums per thread
STRIPS: frozenset[tuple[int, int, int]] = frozenset()
"""(kernel size, stride, width of the gradient) for which strips compute the weight gradient faster than patches."""
SUMMED_PARTS, SUMMED_COLUMNS = (16, 128), 32  # minimum and maximum parts, and columns, that a program adds at once
FLAT, FLAT_WARPS = 4096, 8  # elements per program of kernels that process flat arrays: 16 per thread
COLUMN_SUMS = 4  # tiles of FLAT elements per program of a reduction over positions
MIN_PARTS, MAX_PARTS = WARP, 256  # partial results merged per iteration; a warp merges 32 in the time of one
MERGED_EACH = 128  # parts of a channel's statistics that a program merges: two rounds for up to 16384 tiles
MERGED_ROWS, MERGED_CHANNELS, MERGED_WARPS = 32, 32, 4  # parts and channels merged per iteration
RUNNING_STATS_CHANNELS, RUNNING_STATS_WARPS = 128, 1  # channels per program when running statistics are updated
FOLDED_ROWS, FOLDED_CHANNELS, FOLDED_WARPS = 32, 16, 4  # tile of 1x1 weights
MIN_DOT_SIZE = 16  # minimum rows, columns and depth of tl.dot
ATTENTION_ROWS, ATTENTION_GRADIENT_ROWS, ATTENTION_WARPS = 128, 64, 4  # queries per iteration
MAX_KEYS, MAX_HEAD = 64, 64  # maximum keys per sample (49 at 224 pixels) and channels per head (16 or 32)


@dataclass(frozen=True)
class Tile:
    """Outputs of one program of a depthwise kernel: `rows` x `cols` positions of `channels` channels, in columns."""

    rows: int
    cols: int
    channels: int
    warps: int


@dataclass(frozen=True)
class Blocks(Tile):
    """Outputs of one program in blocks: a thread computes `rows` x `across` positions of one or two channels, and a
    tile has `cols` such blocks."""

    across: int


def depthwise(kernel: int, height: int, width: int, channels: int, stride: int = 1) -> Tile | Blocks:
    """Choose the form and launch shape of a depthwise kernel whose result has this size."""
    form = blocks if kernel in IN_BLOCKS and stride == 1 else columns
    return form(kernel, height, width, channels, stride)


@cache
def blocks(
    kernel: int,
    height: int,
    width: int,
    channels: int,
    stride: int = 1,
    *,
    rows: int | None = None,
    lanes: int | None = None,
    most_warps: int = MAX_WARPS,
) -> Blocks:
    """Return the blocks of a depthwise kernel: 4 x 7 positions of two channels if they fit, else about 7 x 7 of one.
    With their sums, k^2 weights and a row of x, a thread keeps 100 to 140 numbers.

    lanes: channels per thread.
    """
    if rows is None:
        rows = 4 if kernel <= 5 and height % 4 == 0 else best(height)
        lanes = lanes or (2 if rows == 4 and kernel <= 5 else 1)
    lanes = lanes or 1
    wide, across = widest(channels), best(width)
    cols = min(power_of_2(-(-width // across)), max(1, most_warps * WARP // wide))
    return Blocks(min(height, rows), cols, wide, warps(cols * wide // lanes), across)


def spread(kernel: int, height: int, width: int, channels: int) -> Tile | Blocks:
    """Choose the form and launch shape of the input gradient at stride 2, from a gradient of this size."""
    return spread_blocks(kernel, height, width, channels)


@cache
def spread_blocks(
    kernel: int, height: int, width: int, channels: int, *, rows: int | None = None, most_warps: int = MAX_WARPS
) -> Blocks:
    """Return the blocks of the input gradient at stride 2. 2 x 7 gradient positions have 4 x 14 outputs: 56 sums."""
    del kernel
    wide, across = widest(channels), best(width)
    cols = min(power_of_2(-(-width // across)), max(1, most_warps * WARP // wide))
    return Blocks(min(height, rows or best(height, SPREAD_ROWS)), cols, wide, warps(cols * wide), across)


@cache
def columns(kernel: int, height: int, width: int, channels: int, stride: int = 1) -> Tile:
    """Return the tile of a depthwise kernel in columns: a thread computes `rows` positions of some channels, and uses
    each loaded row for all kernel rows."""
    wide = widest(channels)
    # At stride 2 a column of outputs reads twice as many rows; with 8 channels each, registers allow only 8 warps.
    lanes = LANES[kernel] if stride == 1 else STRIDE_2_LANES
    cols = min(power_of_2(width), MAX_WARPS * WARP * lanes // wide)
    # If there are more threads than channels, Triton loads each weight in every thread that needs it. Otherwise it
    # loads the weight in one thread and distributes it through shared memory, with a barrier for each weight.
    lanes = min(lanes, max(1, cols // 2))
    return Tile(best(height), cols, wide, warps(cols * wide // lanes))


@dataclass(frozen=True)
class Grid:
    """Programs of a weight gradient. The row_tiles x col_tiles tiles are divided into `parts` of up to `tiles_each`.
    Each part is processed by programs / parts programs, for different channels and kernel rows or columns."""

    programs: int
    parts: int
    tiles_each: int
    row_tiles: int
    col_tiles: int
    channel_tiles: int


@dataclass(frozen=True)
class Strips(Tile):
    """Weight gradient in strips: a thread processes a column of `rows` positions, with sums for `columns` kernel
    columns."""

    columns: int

    def grid(self, kernel: int, batch: int, height: int, width: int, channels: int) -> Grid:
        row_tiles, col_tiles = -(-height // self.rows), -(-width // self.cols)
        channel_tiles = -(-channels // self.channels)
        count, together = batch * row_tiles * col_tiles, channel_tiles * -(-kernel // self.columns)
        return _grid(
            count, together, max(1, min(count // 2, PROGRAMS // together)), row_tiles, col_tiles, channel_tiles
        )

    @property
    def constants(self) -> dict[str, int]:
        """Constexpr arguments of the kernel."""
        return {"COLUMNS": self.columns, "ROWS": self.rows, "COLS": self.cols, "CHANNELS": self.channels}


@dataclass(frozen=True)
class Walk:
    """How threads iterate over the rows of patches."""

    each: int
    """Channels per thread."""
    together: int
    """Rows that a thread loads at once."""
    early: bool
    """Whether rows are loaded while the previous rows are processed."""
    resident: int
    """Programs that a multiprocessor can run at a time, which is limited by their registers. The grid has as many
    programs as can run at a time, because all take equally long."""


WALKS: dict[tuple[int, int], tuple[Walk, ...]] = {
    (3, 1): (Walk(1, 1, False, 8), Walk(1, 2, False, 5), Walk(2, 1, False, 5), Walk(2, 2, False, 3)),
    (5, 1): (
        *(Walk(2, 2, False, 2), Walk(2, 1, True, 2), Walk(2, 1, False, 2)),
        *(Walk(1, 1, False, 4), Walk(1, 2, False, 3)),
    ),
    (5, 2): (Walk(1, 1, False, 4), Walk(2, 1, False, 2), Walk(2, 2, False, 2)),
    (7, 1): (Walk(1, 1, False, 3), Walk(1, 2, False, 2), Walk(2, 1, False, 2)),
    (9, 1): (Walk(1, 2, False, 4), Walk(1, 1, False, 4), Walk(2, 1, False, 3), Walk(2, 2, False, 3)),
}
"""(kernel size, stride) -> choices of `Walk`. The first is used; benchmarks/sweep.py compares it with the others."""


@dataclass(frozen=True)
class Patches(Tile):
    """Weight gradient in patches: a thread processes `rows` rows of `across` columns, with sums for `tap_rows` kernel
    rows. A tile has `cols` such patches."""

    across: int
    tap_rows: int
    walk: Walk

    def grid(self, kernel: int, batch: int, height: int, width: int, channels: int) -> Grid:
        row_tiles, col_tiles = -(-height // self.rows), -(-width // self.across)  # number of patches per sample
        channel_tiles = -(-channels // self.channels)
        count, together = row_tiles * -(-batch * col_tiles // self.cols), channel_tiles * -(-kernel // self.tap_rows)
        parts = max(1, min(count, MULTIPROCESSORS * self.walk.resident // together))
        return _grid(count, together, parts, row_tiles, col_tiles, channel_tiles)

    @property
    def constants(self) -> dict[str, int]:
        """Constexpr arguments of the kernel."""
        sizes = {"ACROSS": self.across, "COLS": self.cols, "CHANNELS": self.channels}
        walk = {"TOGETHER": self.walk.together, "EARLY": self.walk.early}
        return {"TAP_ROWS": self.tap_rows, **walk, **sizes}


def _grid(count: int, together: int, parts: int, *tiles: int) -> Grid:
    each = -(-count // parts)
    parts = -(-count // each)
    return Grid(parts * together, parts, each, *tiles)


def weight_gradient(kernel: int, stride: int, height: int, width: int, channels: int) -> Strips | Patches:
    """Choose strips or patches, and the launch shape, of the weight gradient for an output gradient of this size."""
    form = strips if (kernel, stride, width) in STRIPS else patches
    return form(kernel, stride, height, width, channels)


@cache
def strips(kernel: int, stride: int, height: int, width: int, channels: int) -> Strips:
    """Return the weight gradient's strips. A thread has one sum per tap of its kernel columns and per channel, so the
    number of registers limits both."""
    del stride
    wide = widest(channels)
    lanes, columns, rows = {3: (8, 3, 7), 5: (4, 5, 4), 7: (4, 4, 4), 9: (4, 3, 4)}[kernel]
    cols = min(power_of_2(width), MAX_WARPS * WARP * lanes // wide)
    return Strips(min(best(height), rows), cols, wide, warps(cols * wide // lanes), columns)


@cache
def patches(
    kernel: int,
    stride: int,
    height: int,
    width: int,
    channels: int,
    walk: Walk | None = None,
    most_rows: int = PATCH_ROWS,
) -> Patches:
    """Return the weight gradient's patches. For one channel, a thread keeps its sums, DEPTH rows of the gradient and a
    row of x: 60 to 110 numbers."""
    walk = walk or walks(kernel, stride)[0]
    wide = widest(channels, (32, 16) if walk.each == 1 else (64, 32, 16))
    tap_rows = TAP_ROWS[kernel] if stride == 1 else kernel
    cols = MAX_WARPS * WARP * walk.each // wide
    return Patches(min(height, most_rows), cols, wide, MAX_WARPS, best(width, ACROSS), tap_rows, walk)


def walks(kernel: int, stride: int) -> tuple[Walk, ...]:
    """Return the walks for a kernel size and stride. The first one is used; the others are for comparison."""
    return WALKS.get((kernel, stride), (Walk(1, 1, False, 3),))


def other_patches(kernel: int, stride: int, height: int, width: int, channels: int) -> list[Patches]:
    """Return launch shapes to compare: every walk, with tiles of several heights."""
    shape, heights = (kernel, stride, height, width, channels), (PATCH_ROWS, 2 * PATCH_ROWS, height)
    return list(dict.fromkeys(patches(*shape, walk, most) for walk in walks(kernel, stride) for most in heights))


def sum_parts_shape(parts: int) -> tuple[int, int, int]:
    """Return parts per iteration, columns and warps of a program that adds a weight gradient's parts. A thread loads up
    to 16 values at once, so that few loads wait for each other."""
    rows = max(SUMMED_PARTS[0], min(SUMMED_PARTS[1], power_of_2(parts)))
    return rows, SUMMED_COLUMNS, warps(rows * SUMMED_COLUMNS // 8)


def attention_fits(depth: int, keys: int) -> bool:
    """Return whether all keys of a head of `depth` channels fit into one tile."""
    return depth <= MAX_HEAD and keys <= MAX_KEYS


def column_sums(positions: int, channels: int) -> tuple[int, int]:
    """Return positions per iteration and per program, for a reduction over a sample's positions per channel."""
    rows = max(1, min(FLAT // power_of_2(channels), power_of_2(positions)))
    return rows, rows * COLUMN_SUMS


def merge_block(parts: int) -> int:
    """Return how many partial results of a sample are merged per iteration."""
    return max(MIN_PARTS, min(MAX_PARTS, power_of_2(parts)))


def widest(channels: int, choices: tuple[int, ...] = (64, 32)) -> int:
    """Choose a tile's number of channels so that the fewest threads are idle. All choices are whole cache sectors."""
    if channels <= 16:
        return 16
    return min(choices, key=lambda wide: (-(-channels // wide) * wide, -wide))


def best(length: int, choices: tuple[int, ...] = ROWS) -> int:
    """Choose a tile's number of rows (or columns) so that the fewest are outside the feature map."""
    if length < choices[0]:
        return length
    return min(choices, key=lambda rows: -(-length // rows) * rows)


def warps(threads: int) -> int:
    return max(1, min(8, threads // WARP))


def power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least `number`."""
    return 1 << (number - 1).bit_length()
