"""Name the cause for which a rank is slower than the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CauseName = Literal["CPU quota", "stopped", "busy cores", "data", "slow GPU", "page faults", "compute"]

EXPLAINED = 0.4  # fraction of a delay that a cause must explain
SLOW_GPU = 1.1  # ratio of the times of the same work on two GPUs
FAULTS_PER_SECOND = 100.0

_REMEDIES: dict[CauseName, str] = {
    "CPU quota": "raise the CPU limit of the job or the container",
    "stopped": "look for a debugger, or a container or virtual machine that is suspended now and then",
    "busy cores": "look for other processes on its cores (top), or give each rank more cores",
    "data": "compare its storage, network and CPU load with other hosts",
    "slow GPU": "look for other processes, throttling and errors on this GPU (nvidia-smi -q)",
    "page faults": "use less memory on the host",
    "compute": "compare the clocks, temperatures and processes of its host with others",
}


@dataclass(frozen=True)
class Cause:
    """Why a rank is slower than the others."""

    name: CauseName
    fact: str
    """What was measured."""

    @property
    def remedy(self) -> str:
        return _REMEDIES[self.name]


class _Comparison:
    """Means of a rank and of the others: for each name of `RankInterval`, as fractions of the time."""

    def __init__(self, means: Mapping[str, NDArray[np.float64]], rank: int, delay: float) -> None:
        self._means, self._rank, self._delay = means, rank, delay

    def own(self, name: str) -> float:
        return float(self._means[name][self._rank])

    def others(self, name: str) -> float:
        return float(np.median(np.delete(self._means[name], self._rank)))

    def excess(self, name: str) -> float:
        return self.own(name) - self.others(name)

    def explains(self, name: str) -> bool:
        return self.is_enough(self.excess(name))

    def is_enough(self, excess: float) -> bool:
        """Return whether an additional time, as a fraction of the time, explains the delay."""
        return excess >= EXPLAINED * self._delay

    def describe(self, name: str) -> str:
        return f"{self.own(name):.0%} of the time (other ranks: {self.others(name):.0%})"


def find_cause(means: Mapping[str, NDArray[np.float64]], rank: int, delay: float) -> Cause:
    """Return the cause of a rank's delay: a property of its host in which it differs from the median of the others.

    Causes on the host come first, because they also delay the loader of the rank.

    Args:
        means: for each name of `RankInterval`, the values of all ranks, as fractions of the time.
        delay: additional time of the rank's own work, as a fraction of the time.
    """
    ranks = _Comparison(means, rank, delay)
    unknown = Cause("compute", "it computes longer, for a reason that is not visible on its host")
    return _cores(ranks) or _data(ranks) or _gpu(ranks) or _memory(ranks) or unknown


def _cores(ranks: _Comparison) -> Cause | None:
    if ranks.explains("throttled"):  # an exhausted quota also looks like a stopped process
        fact = f"its control group is throttled by its CPU quota {ranks.describe('throttled')}"
        return Cause("CPU quota", fact)
    name = max(("stopped", "waiting_for_core"), key=ranks.excess)
    if not ranks.explains(name):
        return None
    if name == "stopped":
        return Cause("stopped", f"its process was stopped, or its interpreter blocked, {ranks.describe(name)}")
    return Cause("busy cores", f"its threads were ready to run, but their cores busy, {ranks.describe(name)}")


def _data(ranks: _Comparison) -> Cause | None:
    return Cause("data", f"it waited for data {ranks.describe('data')}") if ranks.explains("data") else None


def _gpu(ranks: _Comparison) -> Cause | None:
    own, others = ranks.own("gpu_milliseconds"), ranks.others("gpu_milliseconds")
    computing = 1 - ranks.own("data") - ranks.own("communication")
    if not others or own < SLOW_GPU * others or not ranks.is_enough(computing * (1 - others / own)):
        return None
    clock, highest = ranks.own("clock"), ranks.own("max_clock")
    fact = f", its clock is {clock:,.0f} of {highest:,.0f} MHz" if clock else ""
    return Cause("slow GPU", f"its GPU takes {own / others - 1:.0%} longer for the same work{fact}")


def _memory(ranks: _Comparison) -> Cause | None:
    if ranks.excess("page_faults") < FAULTS_PER_SECOND:
        return None
    return Cause("page faults", f"{ranks.own('page_faults'):,.0f} pages per second were read back from disk")
