"""Predict the time of a training step from its parts (docs/capacity.md describes the model).

All times are in seconds, sizes in bytes and rates in bytes/s or images/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from launch.capacity.costs.compute import StepTimes, slowest_of
from launch.capacity.costs.network import Network, Topology, all_gather
from launch.capacity.costs.workload import STATISTICS_BYTES, Bucket, Workload
from pipeline.batch_shape import BatchShape

Limit = Literal["decode", "storage", "compute", "launch", "gradient all-reduce", "BatchNorm collectives"]
LIMITS: tuple[Limit, ...] = get_args(Limit)

FORWARD = 1 / 3
"""Fraction of the time of computing, and of launching, in the forward pass, which has half of the operations of the
backward pass."""
NORMS_FORWARD = 1 / 2
"""Fraction of the time of BatchNorm's collectives in the forward pass: each layer has one in each pass."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """Rates at which batches are prepared."""

    decode: float
    """Images/s that a node reads from memory, decodes and augments."""
    image_bytes: float
    """Bytes of a stored image."""
    storage: float | None = None
    """Bytes/s that a node reads; None: not a limit."""
    storage_total: float | None = None
    """Bytes/s that all nodes read together; None: not a limit."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Everything that the time of a step depends on, except for the numbers of nodes and of images."""

    workload: Workload
    local_ranks: int
    """Ranks per node."""
    times: StepTimes
    input: Input
    network: Network
    zero: int
    """ZeRO stage, 0 to 2."""
    sync_bn: int | None
    """Ranks over which BatchNorm statistics are computed; 0: all ranks; None: each rank alone."""
    overlaps: bool
    """Whether DDP's all-reduces run while the backward pass computes. On CPUs both use the same cores."""
    jitter: float = 0.0
    """Standard deviation of a rank's computing time, relative to its mean."""
    micro_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """Prediction for one number of nodes."""

    nodes: int
    ranks: int
    global_batch: int
    rank_batch: int
    terms: dict[Limit, float]
    """Seconds of each part. Decoding and reading run at the same time as the training, and the host launches kernels
    while the device computes or waits in BatchNorm's collectives. The part of the gradients' all-reduces that the
    backward pass does not hide follows it."""
    all_reduce: float
    """Seconds in which gradients are transferred, hidden or not."""
    seconds: float
    limit: Limit

    @property
    def images_per_second(self) -> float:
        return self.global_batch / self.seconds


def predict(cluster: Cluster, nodes: int, global_batch: int) -> Step:
    """Predict a step.

    Raises:
        PlanError: the global batch cannot be divided among the ranks.
    """
    over = Topology(nodes, cluster.local_ranks)
    shape = BatchShape(global_batch=global_batch, world=over.ranks, micro_batch=cluster.micro_batch, pairs=True)
    passes, launch = shape.accumulation, cluster.times.launch
    one_pass = cluster.times.seconds(shape.micro_rows) * slowest_of(over.ranks, cluster.jitter)
    norms = norm_seconds(cluster, over)
    on_device = one_pass + norms
    running = max(on_device, launch)
    forward = max(FORWARD * one_pass + NORMS_FORWARD * norms, FORWARD * launch)
    transfer, exposed = gradient_seconds(cluster, over, backward=running - forward, passes=passes)
    source = cluster.input
    terms: dict[Limit, float] = {
        "decode": global_batch / (nodes * source.decode),
        "storage": storage_seconds(source, nodes, global_batch),
        "compute": passes * one_pass,
        "launch": passes * launch,
        "gradient all-reduce": exposed,
        "BatchNorm collectives": passes * norms,
    }
    training = passes * running + exposed
    prepared = max(terms["decode"], terms["storage"])
    computing: Limit = "launch" if cluster.times.launch_bound(shape.micro_rows) else "compute"
    candidates: tuple[Limit, ...]
    if prepared > training:
        candidates = ("decode", "storage")
    elif launch > on_device:
        candidates = ("launch", "gradient all-reduce")
    else:
        candidates = (computing, "gradient all-reduce", "BatchNorm collectives")
    return Step(
        nodes=nodes,
        ranks=over.ranks,
        global_batch=global_batch,
        rank_batch=shape.rank_rows,
        terms=terms,
        all_reduce=transfer,
        seconds=max(prepared, training),
        limit=max(candidates, key=terms.__getitem__),
    )


def storage_seconds(source: Input, nodes: int, images: int) -> float:
    """Return the time in which all nodes read the images of a global batch."""
    read = images * source.image_bytes
    own = read / (nodes * source.storage) if source.storage else 0.0
    return max(own, read / source.storage_total if source.storage_total else 0.0)


def gradient_seconds(cluster: Cluster, over: Topology, *, backward: float, passes: int) -> tuple[float, float]:
    """Return (time of the transfer, part of it that follows the backward pass).

    ZeRO 1 and 2 all-reduce the gradients and all-gather the parameters after the backward pass (docs/zero.md). DDP and
    ZeRO 1 reduce the gradients of a step once, after the last of its `passes`; ZeRO 2 those of every micro-batch,
    because a rank keeps only its own partition of them.

    Args:
        backward: time of a backward pass.
        passes: micro-batches of a step.
    """
    workload, network = cluster.workload, cluster.network
    if over.ranks == 1:
        return 0.0, 0.0
    if cluster.zero:
        size = workload.gradient_bytes
        reductions = passes if cluster.zero == 2 else 1
        transfer = reductions * network.all_reduce(size, over) + all_gather(network, size, over)
        return transfer, transfer
    durations = [network.all_reduce(bucket.size, over) for bucket in workload.buckets]
    transfer = sum(durations)
    return transfer, after_backward(workload.buckets, durations, backward) if cluster.overlaps else transfer


def after_backward(buckets: Sequence[Bucket], durations: Sequence[float], backward: float) -> float:
    """Return how long the all-reduces of the buckets take after the end of the backward pass.

    Each begins when its gradients are ready and the previous one has ended.
    """
    end = 0.0
    for bucket, duration in zip(buckets, durations, strict=True):
        end = max(end, bucket.ready * backward) + duration
    return max(0.0, end - backward)


def norm_seconds(cluster: Cluster, over: Topology) -> float:
    """Return the time of BatchNorm's collectives in one forward and backward pass, which nothing overlaps."""
    if cluster.sync_bn is None:
        return 0.0
    group = over.group(cluster.sync_bn) if cluster.sync_bn else over
    return sum(
        cluster.network.all_reduce(per_channel * channels, group)
        for channels in cluster.workload.norm_channels
        for per_channel in STATISTICS_BYTES
    )


def useful_nodes(steps: Sequence[Step], min_efficiency: float) -> int:
    """Return the largest number of nodes up to which each doubling gives enough images/s.

    Args:
        steps: predictions for the same global batch, in ascending order of nodes; at least one.
        min_efficiency: images/s per node of a number of nodes, at least, relative to those of half of it. Between
            numbers that are not doubled, the same geometric mean per doubling is required.
    """
    useful = steps[0]
    for step in steps[1:]:
        more, gain = step.nodes / useful.nodes, step.images_per_second / useful.images_per_second
        if gain < (2 * min_efficiency) ** math.log2(more):
            break
        useful = step
    return useful.nodes
