"""Random plans for property tests."""

from __future__ import annotations

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
