"""The cost model of `pipeline capacity` agrees with a discrete-event simulation (benchmarks/cluster_simulation.py)."""

from __future__ import annotations

import pytest

from benchmarks.cluster_simulation import SimulatedCluster, compare, step_seconds
from launch.capacity.options import Capacity

TOLERANCE = 0.05
CASES = [
    ("launch", Capacity(variant="b3"), 16),
    ("compute", Capacity(variant="b3", zero=0), 128),
    ("compute", Capacity(variant="b0", zero=0, sync_bn="off", jitter=0.05), 256),
    ("gradient all-reduce", Capacity(variant="b0", zero=0, network="5 Gbit/s"), 256),
    ("gradient all-reduce", Capacity(variant="b0", network="5 Gbit/s"), 256),
    ("BatchNorm collectives", Capacity(variant="b0", zero=0, network_latency=300), 128),
    ("decode", Capacity(variant="b0", cores_per_node=8), 128),
    ("storage", Capacity(variant="b0", storage="500 MB/s"), 128),
    ("storage", Capacity(variant="b0", storage_total="1 GB/s"), 128),
]


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("limit", "options", "rank_batch"), CASES)
def test_model_and_simulation_agree(limit: str, options: Capacity, rank_batch: int, nodes: int) -> None:
    found = compare(options, rank_batch, nodes, steps=8, warm_up=3)
    assert found["limit"] == limit
    assert found["ratio"] == pytest.approx(1, abs=TOLERANCE), found


def test_one_rank_of_the_simulation() -> None:
    """Without communication and input, a step takes the time of computing, or of launching."""
    computing = SimulatedCluster(nodes=1, local_ranks=1, rank_batch=8, compute=0.1)
    launching = SimulatedCluster(nodes=1, local_ranks=1, rank_batch=8, compute=0.1, launch=0.3)
    assert step_seconds(computing) == pytest.approx(0.1)
    assert step_seconds(launching) == pytest.approx(0.3, rel=0.02)


def test_a_ring_of_the_simulation_by_hand() -> None:
    """Four nodes: 6 messages of 1/4 of 100 bytes, at 50 bytes/s, which arrive 1 s later."""
    ring = SimulatedCluster(
        nodes=4, local_ranks=1, rank_batch=1, compute=10, buckets=((100, 1.0),), network_bandwidth=50, network_latency=1
    )
    assert step_seconds(ring) == pytest.approx(10 + 6 * (25 / 50 + 1))


def test_a_tree_of_the_simulation_by_hand() -> None:
    """Two nodes of two ranks: a message within and one between the nodes, up and down, and the time of a collective."""
    tree = SimulatedCluster(
        nodes=2, local_ranks=2, rank_batch=1, compute=10, norms=3, network_latency=1, local_latency=0.25,
        collective_latency=0.5,
    )  # fmt: skip
    assert step_seconds(tree) == pytest.approx(10 + 6 * (0.5 + 2 * 1.25))
