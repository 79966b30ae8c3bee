"""The slowest rank, its cause, and warnings from the times of all ranks (launch/stragglers/detection.py, causes.py)."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

from launch.stragglers.detection import NAMES, RankInterval, Slowest, StragglerDetector, from_numbers

HOSTS = ("node-1", "node-1", "node-2", "node-2")
FAST = RankInterval(seconds=10.0, data=0.1, communication=4.0)
SLOW = replace(FAST, communication=0.0, stopped=0.3)  # 10 s of own work, where others have 6


def intervals(*slow: int, changed: RankInterval = SLOW, seconds: float = 10.0) -> list[RankInterval]:
    """Return an interval of all ranks, of which some are slow."""
    scale = seconds / 10
    ranks = [changed if rank in slow else FAST for rank in range(len(HOSTS))]
    return [
        replace(
            rank, seconds=scale * rank.seconds, data=scale * rank.data, communication=scale * rank.communication,
            idle=scale * rank.idle,
        )
        for rank in ranks
    ]  # fmt: skip


def slowest(ranks: list[RankInterval], *, incomplete: bool = False) -> Slowest:
    """Return the slowest rank of ten equal intervals."""
    detector = StragglerDetector(HOSTS[: len(ranks)], incomplete=incomplete)
    for _ in range(10):
        detector.add(ranks)
    assert detector.slowest is not None
    return detector.slowest


def cause_of(found: Slowest) -> tuple[str, str]:
    assert found.cause is not None
    return found.cause.name, found.cause.fact


@pytest.mark.parametrize("seconds", [0.4, 7.0, 10.0, 35.0, 90.0], ids=lambda seconds: f"intervals of {seconds:g} s")
def test_a_rank_that_stays_slow_is_reported_once_after_a_minute_and_its_recovery_once(seconds: float) -> None:
    detector, messages = StragglerDetector(HOSTS), []
    time = 0.0
    while time < 600:
        new = detector.add(intervals(2, seconds=seconds))
        time += seconds
        messages += [(time, message) for message in new]
    ((when, warning),) = messages
    assert 60 <= when <= max(75, 2 * seconds)
    assert warning.startswith("warning: rank 2 on node-2 holds the other ranks back: its own work takes 67% longer ")
    assert "so steps take 67% longer; cause: stopped: " in warning
    assert "30% of the time (other ranks: 0%)" in warning
    assert "measure the hosts with 'pipeline doctor', or exclude this one (SLURM: --exclude=node-2)" in warning
    assert detector.stragglers == {2}
    while time < 1200:
        messages += [(time, message) for message in detector.add(intervals(seconds=seconds))]
        time += seconds
    (_, (_, recovery)) = messages
    assert recovery == "rank 2 on node-2: no longer behind the other ranks"
    assert not detector.stragglers


@pytest.mark.parametrize("seconds", [5.0, 10.0, 40.0, 90.0])
def test_single_slow_intervals_are_no_reason_to_warn(seconds: float) -> None:
    """Such as those in which rank 0 writes a picture, or in which a rank opens the next shard."""
    detector = StragglerDetector(HOSTS)
    every = max(2, int(60 / seconds))
    very_slow = [FAST] * 4
    for number in range(200):
        ranks = intervals(seconds=seconds)
        if number % every == 0:
            ranks = [replace(rank, communication=0.9 * rank.seconds) for rank in ranks]
            ranks[0] = replace(very_slow[0], seconds=seconds, communication=0.0)
        assert detector.add(ranks) == []


def test_noise_is_no_reason_to_warn() -> None:
    """The own work of a rank varies by 15 % from interval to interval, and by 2 % over minutes."""
    draw = np.random.default_rng(0)
    detector = StragglerDetector(HOSTS)
    for number in range(3000):
        if number % 30 == 0:
            steady = draw.normal(1, 0.02, len(HOSTS))
        own = np.clip(steady * draw.normal(0.6, 0.09, len(HOSTS)), 0.05, 1)
        ranks = [RankInterval(seconds=4.0, data=0.0, communication=4.0 * (1 - value)) for value in own]
        assert detector.add(ranks) == []


def test_a_delay_that_costs_little_is_no_reason_to_warn() -> None:
    """Own work of 4 % instead of 2 % of the time: twice as much, but steps consist of communication."""
    detector = StragglerDetector(HOSTS)
    ranks = [RankInterval(seconds=10.0, data=0.0, communication=9.8)] * 3
    for _ in range(30):
        assert detector.add([*ranks, RankInterval(seconds=10.0, data=0.0, communication=9.6)]) == []
    assert detector.slowest is not None
    assert (detector.slowest.rank, detector.slowest.cause) == (3, None)
    assert detector.slowest.behind == pytest.approx(1.0)


def test_several_slow_ranks_are_named_in_one_warning() -> None:
    hosts = [f"node-{rank // 8}" for rank in range(32)]
    detector, messages = StragglerDetector(hosts), []
    for _ in range(20):
        ranks = [SLOW if rank // 8 == 1 else FAST for rank in range(32)]
        ranks[9] = replace(SLOW, communication=-0.1)
        messages += detector.add(ranks)
    (warning,) = messages
    assert warning.startswith("warning: rank 9 on node-1 holds")
    assert "also behind: rank 8 on node-1, rank 10 on node-1" in warning
    assert detector.stragglers == set(range(8, 16))


def test_all_ranks_of_one_of_two_hosts_may_be_slow() -> None:
    detector, messages = StragglerDetector(["node-1"] * 8 + ["node-2"] * 8), []
    slow = replace(SLOW, communication=1.6)  # 40 % more own work
    for _ in range(10):
        messages += detector.add([FAST] * 8 + [slow] * 8)
    (warning,) = messages
    assert "its own work takes 40% longer than theirs" in warning
    assert detector.stragglers == set(range(8, 16))
    assert detector.slowest is not None
    assert cause_of(detector.slowest)[0] == "stopped"


def test_two_ranks_are_compared_with_each_other() -> None:
    found = slowest([FAST, replace(FAST, communication=1.0)])
    assert (found.rank, round(found.behind, 2)) == (1, 0.5)


@pytest.mark.parametrize(
    ("changes", "name", "fact"),
    [
        ({"data": 4.0}, "data", "it waited for data 40% of the time (other ranks: 1%)"),
        ({"stopped": 0.35}, "stopped", "35% of the time (other ranks: 0%)"),
        ({"waiting_for_core": 0.5}, "busy cores", "50% of the time (other ranks: 0%)"),
        ({"throttled": 0.3, "stopped": 0.4, "waiting_for_core": 0.2}, "CPU quota", "30% of the time"),
        ({"data": 4.0, "waiting_for_core": 0.38}, "busy cores", "38% of the time"),  # which delay its loader
        ({"data": 4.0, "stopped": 0.05}, "data", "40% of the time"),  # too short to explain the delay
        ({"page_faults": 500.0}, "page faults", "500 pages per second"),
        ({}, "compute", "not visible on its host"),
    ],
)
def test_the_cause_is_what_differs_from_the_other_ranks(changes: dict[str, float], name: str, fact: str) -> None:
    found = cause_of(slowest(intervals(2, changed=replace(SLOW, **{"stopped": 0.0} | changes))))
    assert found[0] == name
    assert fact in found[1]


@pytest.mark.parametrize(("milliseconds", "cause"), [(0.15, "slow GPU"), (0.112, "compute")])
def test_a_slow_gpu_is_the_cause_only_if_it_explains_the_delay(milliseconds: float, cause: str) -> None:
    """The rank computes for 10 s, and the others for 6 s."""
    slow = replace(SLOW, stopped=0.0, gpu_milliseconds=milliseconds)
    ranks = [replace(rank, gpu_milliseconds=0.1) for rank in intervals(2)]
    assert cause_of(slowest([ranks[0], slow, *ranks[2:]]))[0] == cause


def test_what_all_ranks_have_in_common_is_not_the_cause() -> None:
    assert cause_of(slowest([replace(rank, waiting_for_core=0.5) for rank in intervals(2)]))[0] == "stopped"


# All ranks seem to compute all the time, because waits in CUDA graphs cannot be measured.
ALIKE = RankInterval(seconds=10.0, data=0.0, communication=0.5, gpu_milliseconds=0.1)


@pytest.mark.parametrize(
    ("changes", "behind", "cause"),
    [
        ({"data": 3.5, "idle": 3.5}, 0.58, ("data", "it waited for data 35% of the time (other ranks: 0%)")),
        ({"idle": 3.5, "waiting_for_core": 0.4}, 0.58, ("busy cores", "")),  # the host launches kernels too late
        (
            {"gpu_milliseconds": 0.15, "clock": 1200.0, "max_clock": 1980.0},
            0.5,
            ("slow GPU", "its GPU takes 50% longer for the same work, its clock is 1,200 of 1,980 MHz"),
        ),
    ],
)
def test_ranks_are_found_although_some_collectives_cannot_be_measured(
    changes: dict[str, float], behind: float, cause: tuple[str, str]
) -> None:
    found = slowest([ALIKE, ALIKE, replace(ALIKE, **changes), ALIKE], incomplete=True)
    assert (found.rank, round(found.behind, 2)) == (2, behind)  # it computes for 6 s, and so do the others
    name, fact = cause_of(found)
    assert name == cause[0]
    assert cause[1] in fact


def test_equal_ranks_are_equal_although_some_collectives_cannot_be_measured() -> None:
    found = slowest([ALIKE] * 4, incomplete=True)
    assert (found.behind, found.cause) == (0.0, None)


def test_numbers_are_exchanged_in_the_order_of_the_fields() -> None:
    ranks = [RankInterval(**{name: 20.0 * rank + number for number, name in enumerate(NAMES)}) for rank in range(3)]
    assert len({number for rank in ranks for number in astuple(rank)}) == 3 * 11  # no two are equal
    assert from_numbers([number for rank in ranks for number in astuple(rank)]) == ranks
