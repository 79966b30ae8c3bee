"""Launch shapes of the kernels, chosen from the maps' shapes alone: the same on every device and at every call, so that
split reductions add in one order. Reasons and byte counts: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

LANES = {3: 8, 5: 8, 7: 4, 9: 4}  # elements per thread, by kernel size: 8 is one 16-byte access in half precision;
# with 8, the weights of a column of 7 or 9 taps and the sums leave no registers for occupancy
STRIDE_2_LANES = 4  # the same of a forward pass at stride 2
IN_BLOCKS = frozenset({3, 5})  # kernel sizes whose maps are computed in blocks. Of 7x7 the blocks take 40 to 100 s to
# compile (Triton's coalescing pass is quadratic in their unrolled code); 81 weights leave little for sums
SPREAD_ROWS = (2, 1)  # rows of the gradient of a thread's block, at stride 2
WARP = 32
MAX_WARPS = 4
ROWS = (7, 8, 6, 5, 4)  # rows per thread, best first: 7 divides every map of a 224 image
MULTIPROCESSORS = 132  # of an H100 and an H200
PROGRAMS = 1056  # of a split reduction: two for each of the four scheduling slots of an H100's multiprocessors
ACROSS = (7, 8, 6, 5, 4)  # columns of a patch, best first, as ROWS
PATCH_ROWS = 14  # that a thread walks down before it begins anew: fewer read more of the gradient twice
TAP_ROWS = {3: 3, 5: 5, 7: 7, 9: 3}  # kernel rows of one program: 81 sums in a thread leave 8 warps a multiprocessor
STRIPS: frozenset[tuple[int, int, int]] = frozenset()
"""(kernel, stride, width of the gradient's map) whose weight gradients a device has computed faster in strips."""
ADDED_ROWS, ADDED_COLUMNS = (16, 128), 32  # least and most, of the parts of a weight gradient that are added at once
FLAT, FLAT_WARPS = 4096, 8  # elements of one program of a kernel that reads maps flat: 16 a thread
COLUMN_SUMS = 4  # tiles of FLAT elements that a program of a reduction over positions walks over
MIN_PARTS, MAX_PARTS = WARP, 256  # partial results that are joined at once; a warp takes 32 in the time of one
JOINED_EACH = 128  # parts of a channel's moments that a program joins: two rounds for up to 16384 tiles
JOINED_ROWS, JOINED_CHANNELS, JOINED_WARPS = 32, 32, 4  # at once
FOLLOWED, FOLLOWED_WARPS = 128, 1  # running statistics that a program moves
FOLDED_ROWS, FOLDED_CHANNELS, FOLDED_WARPS = 32, 16, 4  # of 1x1 weights: 128 to 2048 channels are 8 to 128 programs
LEAST_PRODUCT = 16  # rows, columns and depth of a product by the matrix units
ATTENTION_ROWS, ATTENTION_GRADIENT_ROWS, ATTENTION_WARPS = 128, 64, 4  # queries of one head at once
MAX_KEYS, MAX_HEAD = 64, 64  # of attention: keys of a sample (49 at 224 pixels), channels of a head (16 or 32)


@dataclass(frozen=True)
class Tile:
    """What one program of a depthwise kernel works on: `rows` x `cols` positions of `channels` channels."""

    rows: int
    cols: int
    channels: int
    warps: int


@dataclass(frozen=True)
class Blocks(Tile):
    """The other form: a thread has `rows` x `across` positions of one channel or two, a tile `cols` such blocks."""

    across: int


def depthwise(kernel: int, height: int, width: int, channels: int, stride: int = 1) -> Tile | Blocks:
    """The form and launch shape of a depthwise kernel that writes maps of that size."""
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
    """4 x 7 positions of two channels where they fit, else about 7 x 7 of one: their sums, k^2 weights and a row of x
    are 100 to 140 numbers of a thread."""
    if rows is None:
        rows = 4 if kernel <= 5 and height % 4 == 0 else best(height)
        lanes = lanes or (2 if rows == 4 and kernel <= 5 else 1)
    lanes = lanes or 1
    wide, across = widest(channels), best(width)
    cols = min(power_of_2(-(-width // across)), max(1, most_warps * WARP // wide))
    return Blocks(min(height, rows), cols, wide, warps(cols * wide // lanes), across)


def spread(kernel: int, height: int, width: int, channels: int) -> Tile | Blocks:
    """The form and launch shape of the gradient by the input at stride 2, from a gradient map of that size."""
    return spread_blocks(kernel, height, width, channels)


@cache
def spread_blocks(
    kernel: int, height: int, width: int, channels: int, *, rows: int | None = None, most_warps: int = MAX_WARPS
) -> Blocks:
    """A position of the gradient makes four of the map: 2 x 7 of them are 56 sums."""
    del kernel
    wide, across = widest(channels), best(width)
    cols = min(power_of_2(-(-width // across)), max(1, most_warps * WARP // wide))
    return Blocks(min(height, rows or best(height, SPREAD_ROWS)), cols, wide, warps(cols * wide), across)


@cache
def columns(kernel: int, height: int, width: int, channels: int, stride: int = 1) -> Tile:
    """Each thread keeps some channels of a column of `rows` positions, so a row that has been read serves all kernel
    rows."""
    wide = widest(channels)
    # At stride 2 a column of outputs reads twice the rows: with 8 channels each, they leave room for 8 warps only.
    lanes = LANES[kernel] if stride == 1 else STRIDE_2_LANES
    cols = min(power_of_2(width), MAX_WARPS * WARP * lanes // wide)
    # Where there are more threads than channels, Triton loads a weight in every thread that needs it; else in one, and
    # hands it to the others through shared memory, with a barrier for each.
    lanes = min(lanes, max(1, cols // 2))
    return Tile(best(height), cols, wide, warps(cols * wide // lanes))


@dataclass(frozen=True)
class Grid:
    """Programs of a weight gradient: `parts`, each of up to `tiles_each` of the row_tiles x col_tiles tiles, times the
    programs that share a part."""

    programs: int
    parts: int
    tiles_each: int
    row_tiles: int
    col_tiles: int
    channel_tiles: int


@dataclass(frozen=True)
class Strips(Tile):
    """A form of the weight gradient: a thread has a column of `rows` positions, and sums for some kernel columns."""

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
        """Of the kernel."""
        return {"COLUMNS": self.columns, "ROWS": self.rows, "COLS": self.cols, "CHANNELS": self.channels}


@dataclass(frozen=True)
class Walk:
    """How threads walk down the rows of patches."""

    each: int
    """Channels of a thread."""
    together: int
    """Rows that it reads at once."""
    early: bool
    """It reads rows while it works on those before them."""
    resident: int
    """Programs of one multiprocessor at a time, by the registers that these take: as many as there are in all, since
    they take equally long."""


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
"""(kernel, stride) -> walks, the one that is taken first; benchmarks/sweep.py compares them."""


@dataclass(frozen=True)
class Patches(Tile):
    """The other form: a thread has `across` columns and walks down `rows` rows, with sums for `tap_rows` kernel rows. A
    tile has `cols` such patches."""

    across: int
    tap_rows: int
    walk: Walk

    def grid(self, kernel: int, batch: int, height: int, width: int, channels: int) -> Grid:
        row_tiles, col_tiles = -(-height // self.rows), -(-width // self.across)  # patches side by side in one map
        channel_tiles = -(-channels // self.channels)
        count, together = row_tiles * -(-batch * col_tiles // self.cols), channel_tiles * -(-kernel // self.tap_rows)
        parts = max(1, min(count, MULTIPROCESSORS * self.walk.resident // together))
        return _grid(count, together, parts, row_tiles, col_tiles, channel_tiles)

    @property
    def constants(self) -> dict[str, int]:
        """Of the kernel."""
        sizes = {"ACROSS": self.across, "COLS": self.cols, "CHANNELS": self.channels}
        walk = {"TOGETHER": self.walk.together, "EARLY": self.walk.early}
        return {"TAP_ROWS": self.tap_rows, **walk, **sizes}


def _grid(count: int, together: int, parts: int, *tiles: int) -> Grid:
    each = -(-count // parts)
    parts = -(-count // each)
    return Grid(parts * together, parts, each, *tiles)


def weight_gradient(kernel: int, stride: int, height: int, width: int, channels: int) -> Strips | Patches:
    """The form and launch shape of the weight gradient from a gradient map of that size."""
    form = strips if (kernel, stride, width) in STRIPS else patches
    return form(kernel, stride, height, width, channels)


@cache
def strips(kernel: int, stride: int, height: int, width: int, channels: int) -> Strips:
    """A thread keeps one sum for each tap of its kernel columns and each of its channels, which bounds both."""
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
    """A thread with one channel has its sums, DEPTH rows of the gradient and a row of x: 60 to 110 numbers."""
    walk = walk or walks(kernel, stride)[0]
    wide = widest(channels, (32, 16) if walk.each == 1 else (64, 32, 16))
    tap_rows = TAP_ROWS[kernel] if stride == 1 else kernel
    cols = MAX_WARPS * WARP * walk.each // wide
    return Patches(min(height, most_rows), cols, wide, MAX_WARPS, best(width, ACROSS), tap_rows, walk)


def walks(kernel: int, stride: int) -> tuple[Walk, ...]:
    """The first is taken, the others are for comparison."""
    return WALKS.get((kernel, stride), (Walk(1, 1, False, 3),))


def other_patches(kernel: int, stride: int, height: int, width: int, channels: int) -> list[Patches]:
    """Launch shapes to compare: every walk, over tiles of several heights."""
    shape, heights = (kernel, stride, height, width, channels), (PATCH_ROWS, 2 * PATCH_ROWS, height)
    return list(dict.fromkeys(patches(*shape, walk, most) for walk in walks(kernel, stride) for most in heights))


def added_parts(parts: int) -> tuple[int, int, int]:
    """Parts at once, columns and warps of a program that adds a weight gradient's parts: up to 16 values a thread, so
    that few reads wait for one another."""
    rows = max(ADDED_ROWS[0], min(ADDED_ROWS[1], power_of_2(parts)))
    return rows, ADDED_COLUMNS, warps(rows * ADDED_COLUMNS // 8)


def attention_fits(depth: int, keys: int) -> bool:
    """Whether all keys of a head of `depth` channels fit into one tile."""
    return depth <= MAX_HEAD and keys <= MAX_KEYS


def column_sums(positions: int, channels: int) -> tuple[int, int]:
    """Positions at once, and positions of one program, of a reduction over a sample's positions for each channel."""
    rows = max(1, min(FLAT // power_of_2(channels), power_of_2(positions)))
    return rows, rows * COLUMN_SUMS


def joined(parts: int) -> int:
    """How many of the partial results of a sample are joined at once."""
    return max(MIN_PARTS, min(MAX_PARTS, power_of_2(parts)))


def widest(channels: int, choices: tuple[int, ...] = (64, 32)) -> int:
    """The channels of a tile: of the choices, which are whole cache sectors side by side, the one that leaves fewest
    lanes idle."""
    if channels <= 16:
        return 16
    return min(choices, key=lambda wide: (-(-channels // wide) * wide, -wide))


def best(length: int, choices: tuple[int, ...] = ROWS) -> int:
    """The rows (or columns) of a tile that leave the fewest idle."""
    if length < choices[0]:
        return length
    return min(choices, key=lambda rows: -(-length // rows) * rows)


def warps(threads: int) -> int:
    return max(1, min(8, threads // WARP))


def power_of_2(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << (number - 1).bit_length()
