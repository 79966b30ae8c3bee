"""Random plans for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pipeline.plan import TrainPlan

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@st.composite
def plans(draw: st.DrawFn) -> TrainPlan:
    """Draw small plans with edge cases: empty shards, shuffle blocks that do not divide a lane, one or many lanes."""
    sizes = draw(shard_sizes)
    global_batch = draw(st.integers(1, min(24, sum(sizes))))
    lanes = draw(st.sampled_from([d for d in range(1, global_batch + 1) if global_batch % d == 0]))
    block = draw(st.integers(1, 20))
    return TrainPlan(
        sizes, global_batch=global_batch, seed=draw(st.integers(-(2**63), 2**63)), lanes=lanes, shuffle_block_size=block
    )


@st.composite
def balanced_plans(draw: st.DrawFn) -> TrainPlan:
    """Draw small plans with class balance, of classes of very different sizes or without samples."""
    plan = draw(plans())
    weights = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any))
    labels = np.repeat(np.arange(len(weights)), weights)
    labels = np.random.default_rng(draw(st.integers(0, 100))).choice(labels, plan.samples)
    return TrainPlan(
        plan._counts,
        global_batch=plan.global_batch,
        seed=plan.seed,
        lanes=plan.lanes,
        shuffle_block_size=plan.shuffle_block_size,
        class_balance=draw(st.sampled_from([0.25, 0.5, 1.0])),
        labels=labels,
    )
