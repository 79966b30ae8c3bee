"""Passes of RandAugment (pipeline/augment/triton_impl/passes.py): every sample gets its operations in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.augment.ops import Op
from pipeline.augment.params import SampleParams, draw
from pipeline.augment.recipe import augment_recipe
from pipeline.augment.torch_impl.tables import HISTOGRAM_OPS, OPS
from pipeline.augment.triton_impl.passes import COPY, FLIP, NO_TABLE, plan_passes


def drawn(batch: int, seed: int, layers: int, probability: float = 0.5) -> SampleParams:
    recipe = augment_recipe("fat", size=24, rand_augment=f"rand-m9-mstd0.5-inc1-n{layers}-p{probability}")
    sides = np.full(batch, 64)
    return draw(recipe, seed=seed, epoch=0, ids=np.arange(batch), heights=sides, widths=sides)


@given(st.integers(1, 40), st.integers(0, 2**20), st.integers(0, 4), st.booleans())
def test_operations_are_in_order_and_end_in_the_first_half(batch: int, seed: int, layers: int, flip: bool) -> None:
    params = drawn(batch, seed, layers)
    work: list[tuple[int, list[int]] | None] = [None] * (2 * batch)  # (sample, its operations so far)
    source: list[tuple[int, list[int]] | None] = [(i, []) for i in range(batch)]
    passes = plan_passes(params, 24, 24, flip=flip)
    for number, each in enumerate(passes):
        before = list(source)
        for code, place, target, _ in each.jobs.tolist():
            found = before[place]
            assert found is not None
            assert number == 0 or place not in each.jobs[:, 2], "one program would read what another program writes"
            work[target] = (found[0], [*found[1], code])
        assert len(set(each.jobs[:, 2].tolist())) == len(each.jobs)
        source = work
    wanted = [[FLIP] * int(flip and params.flips[i]) + params.ops[i][params.applied[i]].tolist() for i in range(batch)]
    assert len(passes) == max(map(len, wanted))
    if passes:
        assert work[:batch] == [(i, codes or [COPY]) for i, codes in enumerate(wanted)]


def test_a_sample_is_only_read_and_written_if_it_has_an_operation() -> None:
    """Except in the first pass, which copies samples without an operation."""
    params = drawn(256, 1, 2)
    first, second = plan_passes(params, 24, 24, flip=False)
    assert len(first.jobs) == 256
    assert np.count_nonzero(first.jobs[:, 0] == COPY) == np.count_nonzero(~params.applied.any(axis=1))
    assert len(second.jobs) == np.count_nonzero(params.applied.all(axis=1))
    assert COPY not in second.jobs[:, 0]


def test_tables_are_numbered_and_those_from_histograms_are_listed() -> None:
    for each in plan_passes(drawn(300, 2, 2), 24, 24, flip=True):
        codes, table = each.jobs[:, 0], each.jobs[:, 3]
        by_table = np.isin(codes, OPS)
        assert np.array_equal(np.sort(table[by_table]), np.arange(len(each.tables)))
        assert (table[~by_table] == NO_TABLE).all()
        assert np.array_equal(np.flatnonzero(np.isin(codes, HISTOGRAM_OPS)), each.histogram_jobs)
        inverted = table[codes == Op.INVERT]
        assert (each.tables[inverted] == np.arange(255, -1, -1)).all()
        assert each.tables.shape[1:] == (3, 256)


def test_rotations_come_first() -> None:
    codes = plan_passes(drawn(300, 2, 2), 24, 24, flip=False)[0].jobs[:, 0] == Op.ROTATE
    assert codes.any()
    assert not np.diff(codes.astype(int)).max() > 0


@pytest.mark.parametrize("layers", [0, 2])
def test_without_operations_there_is_no_pass(layers: int) -> None:
    assert plan_passes(drawn(4, 0, layers, probability=0.0), 24, 24, flip=False) == []
