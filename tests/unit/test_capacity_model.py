"""The cost model of `pipeline capacity`: each limit, hand-computed cases, and properties."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.capacity.costs.compute import StepTimes, slowest_of
from launch.capacity.costs.network import LinkNetwork, MeasuredNetwork, SplitNetwork, Topology, all_gather
from launch.capacity.costs.step import Cluster, Input, Step, after_backward, predict, useful_nodes
from launch.capacity.costs.workload import Bucket, Workload, gradient_buckets
from launch.models.specification import ModelSpec
from pipeline.batch_shape import PlanError

MB = 10**6
FAST = LinkNetwork(latency=1e-6, bandwidth=1e12, local_latency=1e-6, local_bandwidth=1e12)
SLOW = replace(FAST, bandwidth=1e9)
DISTANT = replace(FAST, latency=1e-3)
WORKLOAD = Workload(
    model="test",
    parameters=25 * MB,
    buckets=(Bucket(20 * MB, 0.25), Bucket(80 * MB, 1.0)),
    norm_channels=(64,) * 10,
)


def cluster(**changes: Any) -> Cluster:
    """Return 8 ranks per node that compute 1 ms per image; nothing else limits them."""
    plain = Cluster(
        workload=WORKLOAD,
        local_ranks=8,
        times=StepTimes(((100, 0.1),)),
        input=Input(decode=1e6, image_bytes=1e5),
        network=FAST,
        zero=0,
        sync_bn=0,
        overlaps=True,
    )
    return replace(plain, **changes)


LIMITED = {
    "compute": {},
    "launch": {"times": StepTimes(((100, 0.1),), launch=0.2)},
    "decode": {"input": Input(decode=1000, image_bytes=1e5)},
    "storage": {"input": Input(decode=1e6, image_bytes=1e5, storage_total=1e7)},
    "gradient all-reduce": {"network": SLOW, "zero": 1},
    "BatchNorm collectives": {"network": DISTANT, "zero": 0},
}


@pytest.mark.parametrize("limit", LIMITED)
def test_each_limit_is_named(limit: str) -> None:
    found = predict(cluster(**LIMITED[limit]), 4, 32 * 32)
    assert found.limit == limit
    assert found.seconds >= found.terms[limit] > 0


def test_a_measured_step_that_waits_for_its_launch_is_not_limited_by_computing() -> None:
    """More nodes would not help, as they would if the limit was compute."""
    points = ((16, 0.017), (256, 0.080))
    for times, limit in (
        (StepTimes(points, launch=0.0168), "launch"),
        (StepTimes(points, launch=0.010), "compute"),
        (StepTimes(((16, 0.017),), launch=0.0168), "compute"),  # perhaps the queue was full
    ):
        assert predict(cluster(times=times), 1, 8 * 16).limit == limit
        assert predict(cluster(times=times, network=DISTANT), 2, 16 * 16).limit == "BatchNorm collectives"


def test_storage_of_each_node_scales_and_that_of_all_nodes_does_not() -> None:
    own = cluster(input=Input(decode=1e9, image_bytes=1e5, storage=1e6))
    total = cluster(input=Input(decode=1e9, image_bytes=1e5, storage_total=1e6))
    assert predict(own, 1, 64).seconds == pytest.approx(6.4)
    assert predict(own, 2, 64).seconds == pytest.approx(3.2)
    assert predict(total, 1, 64).seconds == predict(total, 2, 64).seconds == pytest.approx(6.4)


def test_hand_computed_step_with_zero() -> None:
    """100 MB: an all-reduce of 2 x 15/16 x 100 MB at 1 GB/s, and an all-gather of half of that."""
    network = LinkNetwork(latency=0, bandwidth=1e9, local_latency=0, local_bandwidth=1e12)
    found = predict(cluster(network=network, zero=1, sync_bn=None), 2, 1600)
    assert found.terms["compute"] == pytest.approx(0.1)
    assert found.terms["gradient all-reduce"] == pytest.approx(0.1875 + 0.09375)
    assert found.seconds == pytest.approx(0.1 + 0.28125)
    assert found.images_per_second == pytest.approx(1600 / 0.38125)
    assert (found.ranks, found.rank_batch, found.limit) == (16, 100, "gradient all-reduce")


def test_hand_computed_overlap_of_ddp() -> None:
    """The first bucket is reduced during the backward pass, the second one only when the pass has ended."""
    buckets = (Bucket(1, 0.25), Bucket(1, 1.0))
    assert after_backward(buckets, (3.0, 2.0), backward=4.0) == 2.0  # 1 to 4, then 4 to 6
    assert after_backward(buckets, (5.0, 2.0), backward=4.0) == 4.0  # 1 to 6, then 6 to 8
    assert after_backward(buckets, (1.0, 0.0), backward=4.0) == 0.0


def test_hand_computed_step_with_ddp() -> None:
    """The backward pass takes two thirds of 0.1 s; 80 MB are ready after a quarter of it, and take 0.15 s."""
    network = LinkNetwork(latency=0, bandwidth=1e9, local_latency=0, local_bandwidth=1e12)
    workload = replace(WORKLOAD, buckets=(Bucket(80 * MB, 0.25), Bucket(20 * MB, 1.0)))
    found = predict(cluster(network=network, workload=workload, sync_bn=None), 2, 1600)
    assert found.terms["gradient all-reduce"] == pytest.approx(0.1 / 6 + 0.15 + 0.0375 - 0.2 / 3)
    assert found.seconds == pytest.approx(0.1 + found.terms["gradient all-reduce"])


def test_every_node_decodes() -> None:
    slow = cluster(input=Input(decode=1000, image_bytes=1e5))
    assert [predict(slow, nodes, 64).terms["decode"] for nodes in (1, 2)] == pytest.approx([0.064, 0.032])


def test_on_cpus_nothing_overlaps() -> None:
    found = predict(cluster(network=SLOW, overlaps=False), 2, 1600)
    assert found.terms["gradient all-reduce"] == found.all_reduce
    assert predict(cluster(network=SLOW), 2, 1600).terms["gradient all-reduce"] < found.all_reduce


def test_gradients_are_reduced_once_and_norms_in_every_micro_batch() -> None:
    whole, micro = predict(cluster(zero=1), 2, 1600), predict(cluster(zero=1, micro_batch=20), 2, 1600)
    assert micro.terms["gradient all-reduce"] == whole.terms["gradient all-reduce"]
    assert micro.terms["BatchNorm collectives"] == pytest.approx(5 * whole.terms["BatchNorm collectives"])
    assert micro.terms["compute"] == pytest.approx(whole.terms["compute"])
    assert micro.seconds == pytest.approx(
        micro.terms["compute"] + micro.terms["BatchNorm collectives"] + micro.terms["gradient all-reduce"]
    )


def test_zero_2_reduces_the_gradients_of_every_micro_batch() -> None:
    """DeepSpeed's stage_1_and_2.py: with partitioned gradients, every backward pass ends with a reduction."""
    network = LinkNetwork(latency=0, bandwidth=1e9, local_latency=0, local_bandwidth=1e12)
    one, two = (predict(cluster(network=network, zero=zero, micro_batch=20), 2, 1600) for zero in (1, 2))
    assert one.terms["gradient all-reduce"] == pytest.approx(0.1875 + 0.09375)
    assert two.terms["gradient all-reduce"] == pytest.approx(5 * 0.1875 + 0.09375)


def test_groups_of_batch_norm_within_a_node_do_not_use_the_network() -> None:
    groups = predict(cluster(network=DISTANT, sync_bn=8), 64, 8 * 64 * 4)
    assert groups.terms["BatchNorm collectives"] == predict(cluster(), 1, 64).terms["BatchNorm collectives"]
    assert predict(cluster(network=DISTANT, sync_bn=None), 64, 2048).terms["BatchNorm collectives"] == 0


def test_a_batch_that_cannot_be_divided_is_an_error() -> None:
    with pytest.raises(PlanError, match="world size 24 does not divide"):
        predict(cluster(), 3, 1024)


# -- time of a step ----------------------------------------------------------------------------------------------------


def test_step_times_are_linear_between_measured_points_and_beyond() -> None:
    times = StepTimes.of([(32, 0.5), (8, 0.2), (8, 0.3)])
    assert times.points == ((8, 0.2), (32, 0.5))
    assert times.seconds(20) == pytest.approx(0.35)
    assert times.seconds(64) == pytest.approx(0.9)
    assert times.seconds(4) == pytest.approx(0.15)
    assert StepTimes.of([(8, 0.2)]).seconds(4) == pytest.approx(0.1)
    assert StepTimes.of([(8, 0.1), (32, 0.8)]).seconds(4) == pytest.approx(0.05)  # not negative
    assert times.at_size(112, 224).seconds(8) == pytest.approx(0.05)


@pytest.mark.parametrize(("ranks", "expected"), [(1, 0.0), (2, 0.564), (4, 1.029), (16, 1.766), (512, 3.037)])
def test_the_slowest_of_several_ranks(ranks: int, expected: float) -> None:
    """Expected maxima of standard normal values (Harter 1961)."""
    assert slowest_of(ranks, 0.1) == pytest.approx(1 + 0.1 * expected, abs=0.1 * 0.06)


# -- network -----------------------------------------------------------------------------------------------------------


def test_links_of_a_tree_and_of_a_ring() -> None:
    tree = LinkNetwork(latency=5e-6, bandwidth=50e9, local_latency=1e-6, local_bandwidth=400e9, base_latency=7e-6)
    assert tree.all_reduce(0, Topology(1, 8)) == pytest.approx(7e-6 + 2 * 7e-6)
    assert tree.all_reduce(0, Topology(8, 8)) == pytest.approx(7e-6 + 2 * (7e-6 + 15e-6))
    assert tree.all_reduce(800 * MB, Topology(1, 8)) == pytest.approx(21e-6 + 1400 * MB / 400e9)
    assert tree.all_reduce(800 * MB, Topology(2, 8)) == pytest.approx(31e-6 + 1500 * MB / 50e9)
    assert replace(tree, algorithm="ring").all_reduce(0, Topology(4, 1)) == pytest.approx(7e-6 + 6 * 5e-6)
    assert tree.all_reduce(MB, Topology(1, 1)) == 0
    assert all_gather(tree, MB, Topology(2, 8)) == tree.all_reduce(MB, Topology(2, 8)) / 2


def test_topology_of_groups() -> None:
    assert Topology(4, 8).group(4) == Topology(1, 4)
    assert Topology(4, 8).group(16) == Topology(2, 8)
    assert Topology(1, 8).group(6) == Topology(1, 6)
    assert Topology(3, 8).group(6) == Topology(2, 3)  # ranks 6 to 11 are on two nodes
    assert Topology(3, 8).group(12) == Topology(2, 6)


def measured(**changes: Any) -> MeasuredNetwork:
    """Return two ranks with a latency of 1 ms and 100 MB/s."""
    points = tuple((size, 1e-3 + size / 1e8) for size in (1 << 16, 1 << 20, 1 << 24))
    plain = MeasuredNetwork(
        measured=Topology(2, 1), latency=1e-3, points=points, message_latency=1e-4, algorithm="ring"
    )
    return replace(plain, **changes)


def test_a_measured_ring_is_extrapolated_to_other_ranks_and_sizes() -> None:
    network = measured()
    assert network.all_reduce(8, Topology(2, 1)) == pytest.approx(1e-3, rel=1e-3)
    assert network.all_reduce(1 << 20, Topology(2, 1)) == pytest.approx(1e-3 + (1 << 20) / 1e8)
    assert network.all_reduce(1 << 26, Topology(2, 1)) == pytest.approx(1e-3 + (1 << 26) / 1e8)
    assert network.all_reduce(1 << 20, Topology(4, 1)) == pytest.approx(3e-3 + 1.5 * (1 << 20) / 1e8)
    assert network.all_reduce(1 << 20, Topology(1, 1)) == 0
    assert measured(points=()).all_reduce(1 << 20, Topology(2, 1)) == pytest.approx(1e-3)


def test_a_measured_tree_grows_with_the_doublings_of_nodes() -> None:
    network = SplitNetwork(within=FAST, between=measured(algorithm="tree"))
    assert network.all_reduce(0, Topology(16, 1)) == pytest.approx(1e-3 + 3 * 2e-4)
    assert network.all_reduce(MB, Topology(1, 8)) == FAST.all_reduce(MB, Topology(1, 8))


# -- model -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "layers", "buckets"), [("b0", 35, 2), ("b3", 71, 6)])
def test_workload_of_fat(variant: Any, layers: int, buckets: int) -> None:
    """Layers as in docs/slurm.md; DDP's all-reduces as counted with B3 (docs/zero.md)."""
    found = Workload.of(ModelSpec.of_variant(variant), size=224, classes=1000, graphs=False)
    assert len(found.norm_channels) == layers
    assert len(found.buckets) == buckets
    assert sum(bucket.size for bucket in found.buckets) == found.gradient_bytes
    ready = [bucket.ready for bucket in found.buckets]
    assert ready == sorted(ready)
    assert 0 < ready[0] < 0.2  # the classifier's gradients are ready first
    assert ready[-1] == 1


def test_gradients_of_a_part_are_ready_when_its_cuda_graph_ends() -> None:
    """B3: the head, then 50 MB of stage 4 (15 % of the operations), and 54 MB of stage 3 (52 %)."""
    spec = ModelSpec.of_variant("b3")
    eager, graphs = (Workload.of(spec, size=224, classes=1000, graphs=graphs).buckets for graphs in (False, True))
    assert [bucket.size for bucket in graphs] == [bucket.size for bucket in eager]
    assert all(late.ready >= early.ready for late, early in zip(graphs, eager, strict=True))
    assert [bucket.ready for bucket in graphs] == pytest.approx([0, 0.145, 0.145, 0.665, 0.665, 1], abs=0.01)


def test_a_model_that_is_one_cuda_graph_has_its_gradients_at_the_end() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 600_000, 1), torch.nn.Conv2d(600_000, 3, 1)).to("meta")
    eager, graphs = (gradient_buckets(model, 8, graphs=graphs) for graphs in (False, True))
    assert [bucket.ready for bucket in eager] == pytest.approx([0.5, 1])
    assert [bucket.ready for bucket in graphs] == [1, 1]


# -- useful nodes ------------------------------------------------------------------------------------------------------


def step(nodes: int, rate: float) -> Step:
    return Step(
        nodes=nodes, ranks=nodes, global_batch=100, rank_batch=1, terms={}, all_reduce=0, seconds=100 / rate,
        limit="compute",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 100, 2: 190, 4: 300, 8: 310}, 4),
        ({1: 100, 2: 120, 4: 300}, 1),  # a doubling that gains too little ends it
        ({1: 100, 4: 200}, 4),  # 1.414 per doubling
        ({1: 100, 4: 190}, 1),
        ({2: 100}, 2),
    ],
)
def test_useful_nodes(rates: dict[int, float], expected: int) -> None:
    assert useful_nodes([step(nodes, rate) for nodes, rate in rates.items()], 0.7) == expected


# -- properties --------------------------------------------------------------------------------------------------------


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    network = replace(FAST, latency=draw(st.floats(1e-7, 1e-2)), bandwidth=draw(st.floats(1e7, 1e12)))
    return cluster(
        network=network,
        zero=draw(st.sampled_from((0, 1))),
        overlaps=draw(st.booleans()),
        jitter=draw(st.floats(0, 0.3)),
        times=StepTimes(((64, draw(st.floats(1e-6, 1e3))),), draw(st.floats(0, 1))),
        input=Input(decode=draw(st.floats(10, 1e6)), image_bytes=1e5, storage=1e9),
    )


@given(plain=clusters(), nodes=st.integers(0, 5).map(lambda exponent: 2**exponent))
def test_laws(plain: Cluster, nodes: int) -> None:
    """A step takes at least each of its parts, and no part becomes shorter on a worse cluster."""
    network, times = plain.network, plain.times
    assert isinstance(network, LinkNetwork)
    found = predict(plain, nodes, 4096)
    assert found.seconds >= max(found.terms.values()) * (1 - 1e-12)
    assert found.terms["gradient all-reduce"] <= found.all_reduce * (1 + 1e-9)
    assert found.seconds >= found.terms[found.limit]
    for worse in (
        {"network": replace(network, latency=2 * network.latency)},
        {"network": replace(network, bandwidth=network.bandwidth / 2)},
        {"times": replace(times, points=((64, 2 * times.seconds(64)),))},
        {"times": replace(times, launch=2 * times.launch)},
        {"input": replace(plain.input, decode=plain.input.decode / 2)},
        {"input": replace(plain.input, storage=1e3)},
        {"jitter": plain.jitter + 0.1},
    ):
        assert predict(replace(plain, **worse), nodes, 4096).seconds >= found.seconds * (1 - 1e-9)
    more = predict(plain, 2 * nodes, 4096)
    assert more.terms["compute"] <= found.terms["compute"] * slowest_of(more.ranks, plain.jitter)
    assert more.all_reduce >= found.all_reduce
