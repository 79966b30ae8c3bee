"""Latency and bandwidth between the ranks: all-reduce over all, and messages between pairs of hosts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from launch.doctor.measurements.channel import Channel
from launch.doctor.measurements.report import AllReduce, Pair

LATENCY_REPEATS = 20
ALL_REDUCE_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)
# The first is about the size of the statistics of a BatchNorm layer. A single value takes less time, because gloo
# divides only larger tensors among the ranks.
ALL_REDUCE_SECONDS = 0.3  # per size
MAX_REPEATS = 20
MIN_PAIR_ROUNDS = 3
"""Rounds of pairs, if there are enough hosts: with three pairs per host, one slow host cannot accuse another."""
PING_SECONDS, MIN_PINGS, MAX_PINGS = 0.2, 3, 30
# A message for the bandwidth takes about this long; a first one of the smallest size determines its size.
BULK_SECONDS, MIN_BULK, MAX_BULK, BULK_REPEATS = 0.1, 1 << 18, 1 << 26, 3

RESERVED = 4 * MAX_BULK  # bytes: more than all tensors of these measurements


def reserve_memory(device: torch.device) -> bool:
    """Let torch's allocator take the memory of these measurements from a GPU; return True.

    An error in the middle of a measurement would leave the other ranks waiting.

    Raises:
        torch.OutOfMemoryError: the GPU does not have this memory.
    """
    if device.type == "cuda":
        torch.empty(RESERVED, dtype=torch.uint8, device=device)
    return True


def all_reduce_latency(channel: Channel) -> float:
    """Return the shortest duration of an all-reduce of 8 bytes, in seconds. Collective."""
    tensor = torch.zeros(1, dtype=torch.float64, device=channel.device)
    return channel.largest(min(_seconds(channel, tensor) for _ in range(LATENCY_REPEATS + 1)))


def measure_all_reduce(channel: Channel, *, largest: int, seconds: float) -> tuple[AllReduce, ...]:
    """Measure all-reduces of increasing size, up to `largest` bytes. Collective.

    Args:
        seconds: a size that would exceed this duration in total is omitted, and all larger ones.
    """
    started, found = time.perf_counter(), []
    ranks = channel.world.size
    expected = 0.0
    for size in (size for size in ALL_REDUCE_BYTES if size <= largest):
        if channel.largest(time.perf_counter() - started) + 2 * expected > seconds:
            break
        tensor = torch.zeros(size // 4, device=channel.device)
        first = channel.largest(_seconds(channel, tensor))
        repeats = max(1, min(MAX_REPEATS, int(ALL_REDUCE_SECONDS / first)))
        best = channel.largest(min(_seconds(channel, tensor) for _ in range(repeats)))
        found.append(AllReduce(bytes=size, seconds=best, bus_bandwidth=2 * (ranks - 1) / ranks * size / best))
        expected = channel.largest(16 * best)  # the next size is at most 16 times as large
    return tuple(found)


def _seconds(channel: Channel, tensor: torch.Tensor) -> float:
    begun = time.perf_counter()
    channel.all_reduce(tensor)
    return time.perf_counter() - begun


def measure_pairs(channel: Channel, first_ranks: Sequence[int], hosts: Sequence[str], *, seconds: float) -> list[Pair]:
    """Measure pairs of hosts, disjoint ones at the same time. Collective; returns all pairs on every rank.

    Args:
        first_ranks: the rank that measures, for each host.
        hosts: name of each host.
        seconds: no further round begins after this duration.
    """
    started, own = time.perf_counter(), list[Pair]()
    for number, pairs in enumerate(pair_rounds(len(hosts))):
        elapsed = channel.largest(time.perf_counter() - started)  # also begins the round on all hosts at once
        if number and elapsed > seconds:
            break
        for a, b in pairs:
            if channel.world.rank == first_ranks[a]:
                latency, bandwidth = _initiate(channel, first_ranks[b])
                own.append(Pair(hosts=(hosts[a], hosts[b]), latency=latency, bandwidth=bandwidth))
            elif channel.world.rank == first_ranks[b]:
                _answer(channel, first_ranks[a])
    return [pair for pairs in channel.gather(own) for pair in pairs]


def pair_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs of `count` hosts, by the circle method of round-robin tournaments.

    All pairs, if there are few hosts; otherwise about log2(count) rounds.
    """
    places: list[int | None] = [*range(count), *([None] * (count % 2))]
    rounds = []
    for _ in range(min(len(places) - 1, max(MIN_PAIR_ROUNDS, math.ceil(math.log2(max(count, 2)))))):
        half = len(places) // 2
        facing = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _initiate(channel: Channel, other: int) -> tuple[float, float]:
    """Measure the connection to a rank that calls `_answer`; return latency (s) and bandwidth (bytes/s)."""
    ping = lambda: _exchange(channel, other, 1, 1)  # noqa: E731
    ping()  # connects the ranks
    first = ping()
    count = max(MIN_PINGS, min(MAX_PINGS, int(PING_SECONDS / max(first, 1e-9))))
    latency = min(first, *(ping() for _ in range(count))) / 2
    size, rates = MIN_BULK, [0.0, 0.0]
    for attempt in range(BULK_REPEATS + 1):
        for direction, sizes in enumerate(((size, 1), (1, size))):
            spent = _exchange(channel, other, *sizes)
            # The round trip includes one message of the other direction. It cannot take less than a tenth of the time.
            rate = size / max(spent - latency, spent / 10, 1e-9)
            rates[direction] = rate if attempt <= 1 else max(rates[direction], rate)
        slower = min(rates)
        if attempt == 0:
            if MIN_BULK / slower > BULK_SECONDS:
                break  # larger messages would take too long
            size = max(MIN_BULK, min(MAX_BULK, int(slower * BULK_SECONDS)))
    _control(channel, other, 0, 0)
    return latency, min(rates)


def _exchange(channel: Channel, other: int, sent: int, received: int) -> float:
    """Send a message of `sent` bytes, receive one of `received` bytes; return the duration in seconds."""
    out = torch.zeros(sent, dtype=torch.uint8, device=channel.device)
    back = torch.empty(received, dtype=torch.uint8, device=channel.device)
    _control(channel, other, sent, received)
    begun = time.perf_counter()
    channel.send(out, other)
    channel.receive(back, other)
    return time.perf_counter() - begun


def _control(channel: Channel, other: int, sent: int, received: int) -> None:
    """Announce the sizes of the next exchange, and wait until the other rank is ready; 0 ends the measurement."""
    channel.send(torch.tensor([sent, received], dtype=torch.int64, device=channel.device), other)
    if sent:
        channel.receive(torch.empty(1, dtype=torch.uint8, device=channel.device), other)


def _answer(channel: Channel, other: int) -> None:
    """Answer the messages of a rank that calls `_initiate`."""
    while True:
        sizes = torch.empty(2, dtype=torch.int64, device=channel.device)
        channel.receive(sizes, other)
        incoming, outgoing = sizes.tolist()
        if not incoming:
            return
        buffer = torch.empty(incoming, dtype=torch.uint8, device=channel.device)
        answer = torch.zeros(outgoing, dtype=torch.uint8, device=channel.device)
        channel.send(answer[:1], other)
        channel.receive(buffer, other)
        channel.send(answer, other)
