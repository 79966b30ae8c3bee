"""Check the cost model of `pipeline capacity` with a discrete-event simulation of training steps on a cluster.

    python benchmarks/cluster_simulation.py [--out benchmarks/results/capacity_simulation.json]

The simulation has none of the model's formulas: ranks, links, readers and decoders are processes that wait for each
other. Its assumptions:

- Ranks compute the same work. The time of a rank varies from step to step: independent and normal, the same factor for
  all parts of a step.
- A step consists of parts of equal duration, one third of them forward. The host launches them one after another, and
  the device computes a part when it has been launched and the previous one has ended.
- Gradients are reduced by a ring over all ranks, message by message: in DDP's buckets, as soon as a rank has computed
  the gradients of a bucket and ended the previous one; with ZeRO at the end, followed by an all-gather.
- BatchNorm's collectives go up and down a tree: a chain of the ranks of a node, and a binary tree of the nodes.
- A link transfers one message of a ring after another; each arrives after the link's latency. Messages between nodes
  use the link of the node that sends. BatchNorm's few bytes do not wait for them, because links alternate between
  connections. Networks within and between the nodes have no congestion.
- Each node reads the images of READERS batches of its ranks at a time, decodes one after another, and holds up to
  PREFETCH batches per rank. A shared storage serves the requests of all nodes one after another.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from launch.capacity.costs.network import LinkNetwork
from launch.capacity.costs.step import Cluster, predict
from launch.capacity.options import Capacity
from launch.capacity.plan import plan

PREFETCH = 2
"""Batches per rank that are ready in advance, in addition to one in each stage."""
READERS = 4
"""Batches that a node reads at the same time."""
Process = Generator[Any, Any, None]
"""Yields seconds to wait, or a signal to wait for."""


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """Times in seconds, sizes in bytes, rates in bytes/s or images/s."""

    nodes: int
    local_ranks: int
    rank_batch: int
    compute: float
    """Mean time of forward and backward pass on the device."""
    launch: float = 0.0
    """Time in which the host launches all parts of a step."""
    jitter: float = 0.0
    parts: int = 30
    """Parts of forward and backward pass together; a multiple of 3."""
    buckets: tuple[tuple[int, float], ...] = ()
    """(bytes, fraction of the backward pass after which the gradients are there) of DDP's all-reduces."""
    zero_bytes: int = 0
    """Bytes that ZeRO reduces after the backward pass, and gathers; 0: DDP."""
    norms: int = 0
    """BatchNorm layers whose statistics are over all ranks: a collective forward and one backward."""
    network_latency: float = 0.0
    network_bandwidth: float = 1e18
    local_latency: float = 0.0
    local_bandwidth: float = 1e18
    collective_latency: float = 0.0
    """Time of a collective of BatchNorm in addition to its messages."""
    decode: float = 1e18
    """Images/s of a node."""
    image_bytes: float = 1.0
    storage: float = 1e18
    """Rate of the link between a node and the storage."""
    storage_total: float = 1e18
    """Rate of the storage."""


class Simulator:
    """A clock, and the events that are due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._number = itertools.count()

    def at(self, delay: float, call: Callable[[Any], None], argument: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._number), call, argument))

    def spawn(self, process: Process) -> None:
        self.at(0.0, self._resume, process)

    def _resume(self, process: Process) -> None:
        wanted = next(process, None)
        if isinstance(wanted, Signal):
            wanted.wake(process)
        elif wanted is not None:
            self.at(wanted, self._resume, process)

    def run(self) -> None:
        while self._events:
            self.now, _, call, argument = heapq.heappop(self._events)
            call(argument)


@dataclass
class Signal:
    """Something that happens once, and for which processes wait."""

    simulator: Simulator
    fired: bool = False
    waiting: list[Process] = field(default_factory=list)

    def wake(self, process: Process) -> None:
        if self.fired:
            self.simulator.spawn(process)
        else:
            self.waiting.append(process)

    def fire(self) -> None:
        self.fired = True
        for process in self.waiting:
            self.simulator.spawn(process)
        self.waiting.clear()


class Server:
    """Serves one request after another, at a rate."""

    def __init__(self, simulator: Simulator, rate: float) -> None:
        self._simulator, self._rate, self._free = simulator, rate, 0.0

    def serve(self, work: float) -> float:
        """Add a request; return the time until it will have been served."""
        now = self._simulator.now
        self._free = max(now, self._free) + work / self._rate
        return self._free - now


class Queue:
    """Holds a number of items; `put` and `get` return signals to wait for."""

    def __init__(self, simulator: Simulator, capacity: int) -> None:
        self._simulator, self._capacity, self._items = simulator, capacity, 0
        self._putting, self._getting = deque[Signal](), deque[Signal]()

    def put(self) -> Signal:
        self._putting.append(Signal(self._simulator))
        signal = self._putting[-1]
        self._match()
        return signal

    def get(self) -> Signal:
        self._getting.append(Signal(self._simulator))
        signal = self._getting[-1]
        self._match()
        return signal

    def _match(self) -> None:
        progress = True
        while progress:
            progress = False
            if self._putting and self._items < self._capacity:
                self._items += 1
                self._putting.popleft().fire()
                progress = True
            if self._getting and self._items:
                self._items -= 1
                self._getting.popleft().fire()
                progress = True


class Links:
    """Outgoing links of ranks and nodes."""

    def __init__(self, simulator: Simulator, cluster: SimulatedCluster) -> None:
        self._local = cluster.local_ranks
        self._cluster = cluster
        self._of_ranks = [
            Server(simulator, cluster.local_bandwidth) for _ in range(cluster.nodes * cluster.local_ranks)
        ]
        self._of_nodes = [Server(simulator, cluster.network_bandwidth) for _ in range(cluster.nodes)]

    def send(self, source: int, target: int, size: float) -> float:
        """Send a message between ranks; return the time until it arrives."""
        cluster = self._cluster
        if not size:
            same = source // self._local == target // self._local
            return cluster.local_latency if same else cluster.network_latency
        if source // self._local == target // self._local:
            return self._of_ranks[source].serve(size) + cluster.local_latency
        return self._of_nodes[source // self._local].serve(size) + cluster.network_latency


class Ring:
    """A collective over a ring: each rank sends `hops` messages, each after it has received the one before."""

    def __init__(self, simulator: Simulator, links: Links, ranks: int, size: float, hops: int) -> None:
        self._simulator, self._links, self._ranks = simulator, links, ranks
        self._size, self._hops = size / ranks, hops
        self._started, self._sent, self._received = [False] * ranks, [0] * ranks, [0] * ranks
        self.done = [Signal(simulator) for _ in range(ranks)]

    def start(self, rank: int) -> Signal:
        self._started[rank] = True
        self._advance(rank)
        return self.done[rank]

    def _advance(self, rank: int) -> None:
        target = (rank + 1) % self._ranks
        while self._started[rank] and self._sent[rank] < self._hops and self._sent[rank] <= self._received[rank]:
            self._sent[rank] += 1
            self._simulator.at(self._links.send(rank, target, self._size), self._arrive, target)
        if self._started[rank] and min(self._sent[rank], self._received[rank]) == self._hops:
            self.done[rank].fire()

    def _arrive(self, rank: int) -> None:
        self._received[rank] += 1
        self._advance(rank)


class Tree:
    """An all-reduce of a few bytes: messages to the parents, and back."""

    def __init__(self, simulator: Simulator, links: Links, cluster: SimulatedCluster) -> None:
        self._simulator, self._links, self._extra = simulator, links, cluster.collective_latency
        ranks = cluster.nodes * cluster.local_ranks
        self._children: list[list[int]] = [[] for _ in range(ranks)]
        self._parents = [self._parent(rank, cluster.local_ranks) for rank in range(ranks)]
        for rank, parent in enumerate(self._parents):
            if parent is not None:
                self._children[parent].append(rank)
        self._missing = [1 + len(children) for children in self._children]
        self.done = [Signal(simulator) for _ in range(ranks)]

    @staticmethod
    def _parent(rank: int, local: int) -> int | None:
        node, index = divmod(rank, local)
        if index:
            return rank - 1
        return (node - 1) // 2 * local if node else None

    def start(self, rank: int) -> Signal:
        self._collect(rank)
        return self.done[rank]

    def _collect(self, rank: int) -> None:
        self._missing[rank] -= 1
        if self._missing[rank]:
            return
        parent = self._parents[rank]
        if parent is None:
            self._simulator.at(self._extra, self._deliver, rank)
        else:
            self._simulator.at(self._links.send(rank, parent, 0.0), self._collect, parent)

    def _deliver(self, rank: int) -> None:
        self.done[rank].fire()
        for child in self._children[rank]:
            self._simulator.at(self._links.send(rank, child, 0.0), self._deliver, child)


class Training:
    """The processes of a training."""

    def __init__(self, cluster: SimulatedCluster, steps: int, seed: int) -> None:
        self.cluster, self.steps = cluster, steps
        self.simulator = Simulator()
        self.links = Links(self.simulator, cluster)
        self.ranks = cluster.nodes * cluster.local_ranks
        self.ends = [0.0] * steps
        """Time at which the last rank has ended each step."""
        self._random = random.Random(seed)
        self._rings: dict[tuple[int, int], Ring] = {}
        self._trees: dict[tuple[int, int], Tree] = {}
        storage = Server(self.simulator, cluster.storage_total)
        for node in range(cluster.nodes):
            queues = [Queue(self.simulator, PREFETCH) for _ in range(cluster.local_ranks)]
            read = Queue(self.simulator, 1)
            link = Server(self.simulator, cluster.storage)
            for reader in range(READERS):
                self.simulator.spawn(
                    self._read(range(reader, steps * cluster.local_ranks, READERS), storage, link, read)
                )
            self.simulator.spawn(self._decode(read, queues))
            for local, queue in enumerate(queues):
                self.simulator.spawn(self._train(node * cluster.local_ranks + local, queue))

    def _read(self, batches: range, storage: Server, link: Server, read: Queue) -> Process:
        size = self.cluster.rank_batch * self.cluster.image_bytes
        for _ in batches:
            yield storage.serve(size)
            yield link.serve(size)
            yield read.put()

    def _decode(self, read: Queue, queues: list[Queue]) -> Process:
        for _ in range(self.steps):
            for queue in queues:
                yield read.get()
                yield self.cluster.rank_batch / self.cluster.decode
                yield queue.put()

    def _train(self, rank: int, batches: Queue) -> Process:
        cluster, simulator = self.cluster, self.simulator
        forward = cluster.parts // 3
        for step in range(self.steps):
            yield batches.get()
            factor = max(0.0, self._random.gauss(1.0, cluster.jitter))
            begun, collectives, gradients = simulator.now, 0, Signal(simulator)
            reducer = self._reduce(rank, step, gradients, progress := [0.0, Signal(simulator)])
            simulator.spawn(reducer)
            for part in range(cluster.parts):
                launched = begun + cluster.launch * (part + 1) / cluster.parts
                yield max(0.0, launched - simulator.now)
                yield factor * cluster.compute / cluster.parts
                # The collectives are spread evenly over the parts of a pass.
                which, parts, index = (
                    (0, forward, part) if part < forward else (1, cluster.parts - forward, part - forward)
                )
                while collectives < cluster.norms * (which + (index + 1) / parts) - 1e-9:
                    yield self._tree(step, collectives).start(rank)
                    collectives += 1
                if which:
                    progress[0] = (index + 1) / parts
                    previous, progress[1] = progress[1], Signal(simulator)
                    previous.fire()  # type: ignore[attr-defined]
            yield gradients
            self.ends[step] = max(self.ends[step], simulator.now)

    def _reduce(self, rank: int, step: int, ended: Signal, progress: list[Any]) -> Process:
        """Reduce the gradients of a step, while the backward pass makes progress."""
        cluster = self.cluster
        if self.ranks > 1:
            for number, (size, ready) in enumerate(cluster.buckets):
                while progress[0] < ready - 1e-9:
                    yield progress[1]
                yield self._ring(step, number, size, 2 * (self.ranks - 1)).start(rank)
        while progress[0] < 1 - 1e-9:
            yield progress[1]
        if self.ranks > 1 and cluster.zero_bytes:
            for number, hops in ((-1, 2 * (self.ranks - 1)), (-2, self.ranks - 1)):
                yield self._ring(step, number, cluster.zero_bytes, hops).start(rank)
        ended.fire()

    def _ring(self, step: int, number: int, size: float, hops: int) -> Ring:
        key = (step, number)
        if key not in self._rings:
            self._rings[key] = Ring(self.simulator, self.links, self.ranks, size, hops)
        return self._rings[key]

    def _tree(self, step: int, number: int) -> Tree:
        key = (step, number)
        if key not in self._trees:
            self._trees[key] = Tree(self.simulator, self.links, self.cluster)
        return self._trees[key]


def step_seconds(cluster: SimulatedCluster, *, steps: int = 12, warm_up: int = 4, seed: int = 0) -> float:
    """Simulate `steps` steps, and return the mean time of those after the first `warm_up`."""
    training = Training(cluster, steps, seed)
    training.simulator.run()
    return (training.ends[-1] - training.ends[warm_up - 1]) / (steps - warm_up)


def simulated(cluster: Cluster, nodes: int, global_batch: int) -> SimulatedCluster:
    """Return the cluster of the cost model for the simulation, with the figures that both use."""
    network, source, workload = cluster.network, cluster.input, cluster.workload
    assert isinstance(network, LinkNetwork)
    rows = global_batch // (nodes * cluster.local_ranks)
    return SimulatedCluster(
        nodes=nodes,
        local_ranks=cluster.local_ranks,
        rank_batch=rows,
        compute=cluster.times.seconds(rows),
        launch=cluster.times.launch,
        jitter=cluster.jitter,
        parts=3 * max(10, len(workload.norm_channels)),
        buckets=() if cluster.zero else tuple((bucket.size, bucket.ready) for bucket in workload.buckets),
        zero_bytes=workload.gradient_bytes if cluster.zero else 0,
        norms=0 if cluster.sync_bn is None else len(workload.norm_channels),
        network_latency=network.latency,
        network_bandwidth=network.bandwidth,
        local_latency=network.local_latency,
        local_bandwidth=network.local_bandwidth,
        collective_latency=network.base_latency,
        decode=source.decode,
        image_bytes=source.image_bytes,
        storage=source.storage or 1e18,
        storage_total=source.storage_total or 1e18,
    )


CASES: dict[str, tuple[Capacity, int]] = {
    "B3, ZeRO 1": (Capacity(variant="b3"), 16),
    "B3, DDP": (Capacity(variant="b3", zero=0), 128),
    "B3, DDP, 25 Gbit/s": (Capacity(variant="b3", zero=0, network="25 Gbit/s"), 128),
    "B3, ZeRO 1, 10 Gbit/s": (Capacity(variant="b3", network="10 Gbit/s"), 128),
    "B3, DDP, 200 us latency": (Capacity(variant="b3", zero=0, network_latency=200), 128),
    "B3, BatchNorm per rank": (Capacity(variant="b3", zero=0, sync_bn="off"), 128),
    "B3, jitter 10 %": (Capacity(variant="b3", zero=0, sync_bn="off", jitter=0.1), 128),
    "B0, 8 cores per node": (Capacity(variant="b0", cores_per_node=8), 128),
    "B0, storage 500 MB/s per node": (Capacity(variant="b0", storage="500 MB/s"), 128),
    "B0, storage 4 GB/s in total": (Capacity(variant="b0", storage_total="4 GB/s"), 128),
}
"""Options, and images per rank, by name."""


@dataclass(frozen=True)
class Options:
    nodes: tuple[int, ...] = (1, 2, 4, 16, 64)
    """Numbers of nodes of 8 ranks."""
    out: Path | None = None
    """JSON file for the results."""


def compare(options: Capacity, rank_batch: int, nodes: int, **arguments: Any) -> dict[str, Any]:
    """Return the time of a step by the cost model and by the simulation."""
    cluster = plan(options).cluster
    batch = rank_batch * cluster.local_ranks * nodes
    predicted = predict(cluster, nodes, batch)
    seconds = step_seconds(simulated(cluster, nodes, batch), **arguments)
    return {
        "nodes": nodes,
        "ranks": predicted.ranks,
        "model_seconds": round(predicted.seconds, 5),
        "simulated_seconds": round(seconds, 5),
        "ratio": round(predicted.seconds / seconds, 3),
        "limit": predicted.limit,
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = []
    for name, (capacity, rank_batch) in CASES.items():
        for nodes in options.nodes:
            steps = 12 if nodes <= 16 else 6
            rows.append({"case": name, **compare(capacity, rank_batch, nodes, steps=steps, warm_up=steps // 3)})
            row = rows[-1]
            print(
                f"{name:32s}{row['ranks']:4d} ranks  model {1e3 * row['model_seconds']:8.2f} ms  simulated "
                f"{1e3 * row['simulated_seconds']:8.2f} ms  ratio {row['ratio']:.2f}  {row['limit']}",
                flush=True,
            )
    print(f"ratios {min(row['ratio'] for row in rows):.2f} to {max(row['ratio'] for row in rows):.2f}")
    if options.out is not None:
        options.out.write_text(json.dumps({"comparisons": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
