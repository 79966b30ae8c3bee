"""RandAugment for kernels: which operation every sample meets in which launch, and where it lies in between.

A round does the next operation of every sample that has one left, whichever layer that was drawn for; a sample is
neither read nor written in a round that does nothing to it. All is known from the draws, so the host decides it.
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

COPY, FLIP = -1, -2  # what can happen to a sample beside the values of `Op`
NO_TABLE = -1
BLENDS = (Op.COLOR, Op.SHARPNESS, Op.CONTRAST)


def _is_one_of(ops: Sequence[Op]) -> NDArray[np.bool_]:
    """bool, indexed by a code: whether it is one of `ops`. COPY and FLIP index the last two places, which are False."""
    found = np.zeros(len(Op) + 2, np.bool_)
    found[list(ops)] = True
    return found


_BY_TABLE, _NEEDS_HISTOGRAM, _BLENDS = _is_one_of(tables.OPS), _is_one_of(tables.HISTOGRAM_OPS), _is_one_of(BLENDS)


@dataclass(frozen=True)
class OpPass:
    """One operation on each of n samples, t of them by a table."""

    jobs: NDArray[np.int32]
    """int32 [n, 4]: the operation, or COPY or FLIP; the sample's place in the source; its place in the work space;
    its table, or NO_TABLE."""
    numbers: NDArray[np.float64]
    """float64 [n, 6]: a geometric operation's map from output to source, a blend's factor in the first place."""
    measured: NDArray[np.int32]
    """int32 [m]: the jobs whose tables depend on the sample."""
    tables: NDArray[np.uint8]
    """uint8 [t, 3, 256]: a new value for each old one of each channel; those of measured jobs are yet to be made."""

    def arrays(self) -> list[NDArray[Any]]:
        """All that goes to the device, in the order above."""
        return [self.jobs, self.numbers, self.measured, self.tables]


def plan_passes(params: SampleParams, height: int, width: int, *, flip: bool) -> list[OpPass]:
    """The passes of a batch of B samples, as many as the busiest sample has operations; none if nothing is to be done.

    The first round's source is the batch itself, and that of the others the work space: room for 2 B samples. At the
    end all samples lie in its first half, those without any operation as copies.

    Args:
        params: the draws.
        height, width: of the samples.
        flip: whether flips are to be done, before all else.
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
        # The slowest first, so that the device does not end a round with a few of them.
        rows = rows[np.argsort(code[rows] != Op.ROTATE, kind="stable")]
        half = np.maximum(count[rows] - 1 - done, 0) % 2  # by turns, and the first half for the last operation
        source = rows + batch * (1 - half) if done else rows
        jobs = np.stack([code[rows], source, rows + batch * half], axis=1)
        passes.append(_make_pass(jobs, arguments[rows, done], height, width))
    return passes


def _make_pass(jobs: NDArray[np.int64], arguments: NDArray[np.float64], height: int, width: int) -> OpPass:
    """For jobs (operation, source, target) and what their operations are called with."""
    codes = jobs[:, 0]
    by_table = _BY_TABLE[codes]
    table = np.where(by_table, np.cumsum(by_table) - 1, NO_TABLE)
    numbers = geometry.matrices(codes, arguments, height, width)
    numbers[:, 0] = np.where(_BLENDS[codes], arguments, numbers[:, 0])
    made = tables.host_tables(codes[by_table], arguments[by_table])
    return OpPass(
        jobs=np.column_stack([jobs, table]).astype(np.int32),
        numbers=numbers,
        measured=np.flatnonzero(_NEEDS_HISTOGRAM[codes]).astype(np.int32),
        tables=np.repeat(made[:, None], 3, axis=1),
    )
