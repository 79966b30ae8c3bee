"""Schedule RandAugment as passes over the batch: determine the operation of each sample in each pass.

A pass applies the next operation of every sample that has one left, regardless of the layer it was drawn for. A sample
without an operation in a pass is neither read nor written. The host computes the passes from the drawn parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams
from pipeline.augment.torch_impl import geometry, tables

COPY, FLIP = -1, -2  # codes of operations in addition to the values of `Op`
NO_TABLE = -1
BLENDS = (Op.COLOR, Op.SHARPNESS, Op.CONTRAST)


def _is_one_of(ops: Sequence[Op]) -> NDArray[np.bool_]:
    """Return a bool array that is True at the codes of `ops`. COPY and FLIP index its last two elements (False)."""
    found = np.zeros(len(Op) + 2, np.bool_)
    found[list(ops)] = True
    return found


_BY_TABLE, _NEEDS_HISTOGRAM, _BLENDS = _is_one_of(tables.OPS), _is_one_of(tables.HISTOGRAM_OPS), _is_one_of(BLENDS)


@dataclass(frozen=True)
class OpPass:
    """A pass over the batch: one operation on each of n samples, t of which use a lookup table."""

    jobs: NDArray[np.int32]
    """int32 [n, 4]: operation (a value of `Op`, COPY or FLIP); index of the sample in the source; index of the result
    in the workspace; index of its table, or NO_TABLE."""
    numbers: NDArray[np.float64]
    """float64 [n, 6]: the affine map from output to source (geometric operations), or the blending factor in the first
    column (Color, Sharpness, Contrast)."""
    histogram_jobs: NDArray[np.int32]
    """int32 [m]: indices of the jobs whose tables are computed from the sample's histogram, on the device."""
    tables: NDArray[np.uint8]
    """uint8 [t, 3, 256]: new value of each old value, per channel. The tables of `histogram_jobs` are not set yet."""

    def arrays(self) -> list[NDArray[Any]]:
        """Return the arrays to upload to the device, in the order of the fields."""
        return [self.jobs, self.numbers, self.histogram_jobs, self.tables]


def plan_passes(params: SampleParams, height: int, width: int, *, flip: bool) -> list[OpPass]:
    """Return the passes of a batch of B samples: as many as the largest number of operations on one sample.

    The source of the first pass is the batch. The source of later passes is the workspace, which has memory for 2 B
    samples. After the last pass, the first half of the workspace contains all samples, those without an operation as
    copies.

    Args:
        params: parameters of the B samples.
        height, width: size of the samples in pixels.
        flip: whether to apply the flips, before all other operations.
    """
    batch, codes, arguments, applied = len(params), params.ops, params.arguments, params.applied
    if flip:
        codes = np.column_stack([np.full(batch, FLIP), codes])
        arguments = np.column_stack([np.zeros(batch), arguments])
        applied = np.column_stack([params.flips, applied])
    applied_first = np.argsort(~applied, axis=1, kind="stable")
    codes = np.take_along_axis(codes, applied_first, axis=1)
    arguments = np.take_along_axis(arguments, applied_first, axis=1)
    count = applied.sum(axis=1)
    passes = []
    for done in range(int(count.max(initial=0))):
        code = np.where(count > done, codes[:, done], COPY)
        rows = np.flatnonzero(code != COPY) if done else np.arange(batch)
        # Rotations first: they are the slowest, and the device would be underused if a pass ended with a few of them.
        rows = rows[np.argsort(code[rows] != Op.ROTATE, kind="stable")]
        half = np.maximum(count[rows] - 1 - done, 0) % 2  # alternate between halves; the last pass writes the first
        source = rows + batch * (1 - half) if done else rows
        jobs = np.stack([code[rows], source, rows + batch * half], axis=1)
        passes.append(_make_pass(jobs, arguments[rows, done], height, width))
    return passes


def _make_pass(jobs: NDArray[np.int64], arguments: NDArray[np.float64], height: int, width: int) -> OpPass:
    """Return the pass that runs jobs, int64 [n, 3] (operation, source, target), with arguments, float64 [n]."""
    codes = jobs[:, 0]
    by_table = _BY_TABLE[codes]
    table = np.where(by_table, np.cumsum(by_table) - 1, NO_TABLE)
    numbers = geometry.matrices(codes, arguments, height, width)
    numbers[:, 0] = np.where(_BLENDS[codes], arguments, numbers[:, 0])
    host_tables = tables.host_tables(codes[by_table], arguments[by_table])
    return OpPass(
        jobs=np.column_stack([jobs, table]).astype(np.int32),
        numbers=numbers,
        histogram_jobs=np.flatnonzero(_NEEDS_HISTOGRAM[codes]).astype(np.int32),
        tables=np.repeat(host_tables[:, None], 3, axis=1),
    )
