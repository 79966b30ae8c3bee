"""The result of a soak: the table, and benchmarks/results/soak.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any

from tests.soak.accounting import Failure
from tests.soak.round import RoundResult
from tests.soak.schedule import KINDS
from tests.support.launching import ROOT

GOODPUT = (
    "Seconds of the steps that are in the final weights, without waiting for data (as in `pipeline goodput`), divided "
    "by the seconds from the first start of each round to its end. A step counts with its whole duration, also if a "
    "rank was stopped, or a link was cut or slow, during it. Uninterrupted runs are not included."
)
LOST_TIME = (
    "Mean time to recover plus the lost steps at the mean duration of a step. Failures overlap, so that the sum of all "
    "is more than the time lost. The projection is 1 - lost time / interval. It is computed, and only for the times of "
    "this soak: ranks forked from processes that have imported their modules, short timeouts, no check of the nodes. "
    "The start of a large model takes longer."
)
STATISTICS = (
    "Rounds in which BatchNorm's statistics have the same bits as in the uninterrupted run, of those in which they "
    "must: neither of the two runs was saved at steps at which the other was not. An inequality is a violation."
)
NOTE = (
    "All nodes are network namespaces of one machine that other programs use too, ranks are forked from processes that "
    "have imported their modules, and steps are extended to a minimum duration, so times are not those of a cluster."
)
INTERVALS = {"1 h": 3600.0, "6 h": 6 * 3600.0, "24 h": 24 * 3600.0}


class Soak:
    """Collects the results of rounds."""

    def __init__(self, seed: int, minutes: float) -> None:
        self._seed, self._minutes, self._began = seed, minutes, time.monotonic()
        self._started = time.strftime("%FT%TZ", time.gmtime())
        self._rounds: list[RoundResult] = []
        self._commit = _commit()  # at the start: files may be edited meanwhile
        self._load = [os.getloadavg()[0]]
        self.violations: list[str] = []

    def add(self, result: RoundResult) -> None:
        self._rounds.append(result)
        self._load.append(os.getloadavg()[0])
        self.violations += [f"round {result.number}: {violation}" for violation in result.violations]

    def progress(self) -> str:
        """Return a line about the last round and all rounds."""
        last, failures = self._rounds[-1], self._failures()
        return (
            f"{len(last.failures)} failures in {last.wall:.0f} s, {last.executed - last.steps} of {last.executed} "
            f"steps repeated; uninterrupted run {last.reference_seconds:.0f} s; in all {len(failures)} failures in "
            f"{(time.monotonic() - self._began) / 60:.1f} min, goodput {self._goodput():.1%}, "
            f"{len(self.violations)} violations"
        )

    def _failures(self) -> list[Failure]:
        return [failure for result in self._rounds for failure in result.failures]

    def _goodput(self) -> float:
        return sum(r.training for r in self._rounds) / max(1e-9, sum(r.wall for r in self._rounds))

    def _lost_seconds(self) -> float:
        """Return the mean time that a failure costs."""
        failures = self._failures()
        step = mean(result.step_seconds for result in self._rounds)
        return mean((f.seconds_to_recover or 0.0) + f.lost_steps * step for f in failures) if failures else 0.0

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """Return the figures of every kind of failure, and of all together."""
        failures = self._failures()
        groups = {kind.name: [f for f in failures if f.kind == kind.name] for kind in KINDS}
        return {name: _figures(group) for name, group in (*groups.items(), ("all", failures)) if group}

    def table(self) -> str:
        """Return the table of failures by kind, and the goodput."""
        lines = [
            f"{'failure':20} {'count':>5} {'lost steps':>10} {'seconds to recover: median':>27} {'worst':>7} "
            f"{'in start-up':>11} {'saving':>7}"
        ]
        for name, row in self.by_kind().items():
            early, saving = (row["phases"].get(phase, 0) for phase in ("start-up", "saving"))
            lines.append(
                f"{name:20} {row['count']:5d} {row['lost_steps']:10d} {row['median_seconds']:27.1f} "
                f"{row['worst_seconds']:7.1f} {early:11d} {saving:7d}"
            )
        checked, (equal, required) = self._checked(), self._statistics()
        lines += ["", f"goodput {self._goodput():.1%}", *(f"{count:,} {what}" for what, count in checked.items())]
        lines.append(f"{equal} of {required} rounds with equal BatchNorm statistics, of those that require it")
        lines.append(f"{len(self.violations)} violations in {len(self._rounds)} rounds")
        return "\n".join(lines)

    def _checked(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for result in self._rounds:
            total.update(result.checked)  # unlike `+`, keeps zeros
        return dict(total)

    def _statistics(self) -> tuple[int, int]:
        """Return in how many rounds BatchNorm's statistics are equal, and in how many they must be."""
        return sum(r.statistics_equal for r in self._rounds), sum(r.statistics_required for r in self._rounds)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of soak.json."""
        lost, (equal, required) = self._lost_seconds(), self._statistics()
        return {
            "started": self._started,
            "seed": self._seed,
            "minutes": round((time.monotonic() - self._began) / 60, 1),
            "requested_minutes": self._minutes,
            "commit": self._commit,
            "machine": {
                "cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release(),
                "load_average": {"median": median(self._load), "highest": max(self._load)}, "note": NOTE,
            },
            "failures": len(self._failures()),
            "violations": self.violations,
            "checked": self._checked(),
            "rounds_with_equal_batchnorm_statistics": {
                "equal": equal, "required": required, "definition": STATISTICS,
            },
            "by_kind": self.by_kind(),
            "goodput": {
                "value": round(self._goodput(), 4), "definition": GOODPUT,
                "lost_seconds_per_failure": round(lost, 2), "lost_seconds_definition": LOST_TIME,
                "projected_at_one_failure_every": {
                    name: round(1 - lost / seconds, 5) for name, seconds in INTERVALS.items()
                },
            },
            "rounds": [result.to_dict() for result in self._rounds],
            "each_failure": [
                {
                    "round": result.number, "kind": f.kind, "detail": f.detail, "phase": f.phase,
                    "time": round(f.time - self._began, 1), "step": f.step, "lost_steps": f.lost_steps,
                    "seconds_to_recover": round(f.seconds_to_recover or 0.0, 2),
                    "seconds_to_catch_up": round(f.seconds_to_catch_up or 0.0, 2),
                }
                for result in self._rounds for f in result.failures
            ],
        }  # fmt: skip

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")


def _figures(group: list[Failure]) -> dict[str, Any]:
    seconds = [failure.seconds_to_recover or 0.0 for failure in group]
    return {
        "count": len(group),
        "lost_steps": sum(failure.lost_steps for failure in group),
        "median_seconds": round(median(seconds), 2),
        "worst_seconds": round(max(seconds), 2),
        "phases": dict(Counter(failure.phase for failure in group)),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
