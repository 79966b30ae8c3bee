"""Time of collectives by their size and by the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol


@dataclass(frozen=True)
class Topology:
    """Ranks of a collective: the same number on every node."""

    nodes: int
    local: int
    """Ranks per node."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.local

    def group(self, size: int) -> Topology:
        """Return the topology of groups of `size` consecutive ranks: that of a group which uses the most nodes."""
        if self.nodes == 1 or self.local % size == 0:
            return Topology(1, size)
        nodes = max(2, math.ceil(size / self.local))
        return Topology(nodes, math.ceil(size / nodes))


class Network(Protocol):
    """Predicts the duration of collectives."""

    def all_reduce(self, size: float, over: Topology) -> float:
        """Return the seconds of an all-reduce of `size` bytes; 0 for one rank."""


def all_gather(network: Network, size: float, over: Topology) -> float:
    """Return the seconds of an all-gather of `size` bytes in total: the second half of a ring all-reduce."""
    return network.all_reduce(size, over) / 2


def ring_bytes(size: float, ranks: int) -> float:
    """Return the bytes that each rank sends in a ring all-reduce."""
    return 2 * (ranks - 1) / ranks * size


@dataclass(frozen=True, kw_only=True)
class LinkNetwork:
    """A network described by the latency and bandwidth of its links.

    Bandwidth: a ring over all ranks, through which each link carries 2 (n - 1) / n of the bytes; the slowest link
    limits it. Latency: a tree (NCCL), or the ring (gloo).
    """

    latency: float
    """Seconds of a message between nodes."""
    bandwidth: float
    """Bytes/s of a node's network in each direction."""
    local_latency: float
    """Seconds of a message between ranks of a node."""
    local_bandwidth: float
    """Bytes/s between ranks of a node, per rank and direction."""
    base_latency: float = 0.0
    """Seconds of a collective in addition to its messages."""
    algorithm: Literal["tree", "ring"] = "tree"

    def all_reduce(self, size: float, over: Topology) -> float:
        if over.ranks == 1:
            return 0.0
        narrowest = self.local_bandwidth if over.nodes == 1 else self.bandwidth
        if over.nodes > 1 and over.local > 1:
            narrowest = min(self.bandwidth, self.local_bandwidth)
        return self._latency(over) + ring_bytes(size, over.ranks) / narrowest

    def _latency(self, over: Topology) -> float:
        if self.algorithm == "ring":
            slowest = self.local_latency if over.nodes == 1 else self.latency
            return self.base_latency + 2 * (over.ranks - 1) * slowest
        # Up and down a tree: a chain of the ranks of a node, and a binary tree of the nodes, as NCCL assumes
        # (src/graph/tuning.cc).
        return self.base_latency + 2 * ((over.local - 1) * self.local_latency + math.log2(over.nodes) * self.latency)


@dataclass(frozen=True, kw_only=True)
class MeasuredNetwork:
    """All-reduces that were measured over some ranks, and their extrapolation to other numbers of ranks.

    The measured time t(S) of S bytes over m ranks consists of the latency, which is the time of a few KiB, and a rest.
    The rest is a function of the bytes that a rank sends in a ring, 2 (m - 1) / m S, which is used for every number of
    ranks n. The latency of a ring (gloo) is in proportion to n - 1; that of a tree (NCCL) grows by 2 messages
    between nodes per doubling of the nodes.
    """

    measured: Topology
    latency: float
    """Seconds of a small all-reduce."""
    points: tuple[tuple[int, float], ...]
    """Measured (bytes, seconds), in ascending order of bytes."""
    message_latency: float
    """Seconds of a message between nodes."""
    algorithm: Literal["tree", "ring"]

    def all_reduce(self, size: float, over: Topology) -> float:
        if over.ranks == 1:
            return 0.0
        return self._latency(over) + self._transfer(ring_bytes(size, over.ranks))

    def _latency(self, over: Topology) -> float:
        if self.algorithm == "ring":
            return self.latency * (over.ranks - 1) / (self.measured.ranks - 1)
        doublings = math.log2(over.nodes / self.measured.nodes)
        return max(0.0, self.latency + 2 * doublings * self.message_latency)

    def _transfer(self, sent: float) -> float:
        """Return the seconds to transfer what each rank sends, without the latency: linear between the points."""
        ranks = self.measured.ranks
        points = [(0.0, 0.0)]
        for size, seconds in self.points:
            points.append((ring_bytes(size, ranks), max(points[-1][1], seconds - self.latency)))
        if len(points) == 1:
            return 0.0
        low, high = next((pair for pair in pairwise(points) if sent <= pair[1][0]), points[-2:])
        return low[1] + (high[1] - low[1]) * (sent - low[0]) / (high[0] - low[0])


@dataclass(frozen=True)
class SplitNetwork:
    """Collectives within a node and those between nodes, from different sources."""

    within: Network
    between: Network

    def all_reduce(self, size: float, over: Topology) -> float:
        return (self.within if over.nodes == 1 else self.between).all_reduce(size, over)
