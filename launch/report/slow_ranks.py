"""The periods in which a rank held the others back, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.monitor.panels import Lines
from shards.progress import duration


@dataclass(frozen=True)
class SlowPeriod:
    """Consecutive intervals in which the same rank held the others back. Texts, as in the table."""

    rank: str
    host: str
    steps: str
    wall: str
    behind: str
    cause: str


def slow_periods(lines: Lines) -> list[SlowPeriod]:
    """Return the periods from the "train" lines of a run, as it finally went."""
    periods: list[tuple[int, str, list[dict[str, Any]]]] = []
    current: tuple[int, str] | None = None
    for line in lines:
        if line["kind"] == "start":
            current = None
        elif line["kind"] == "train":
            found = (line.get("slowest_rank", 0), line.get("slowest_host", "")) if line.get("cause") else None
            if found is not None and found != current:
                periods.append((*found, []))
            if found is not None:
                periods[-1][-1].append(line)
            current = found
    return [_period(*period) for period in periods]


def _period(rank: int, host: str, lines: Lines) -> SlowPeriod:
    first, last = lines[0], lines[-1]
    causes = dict.fromkeys(line["cause"] for line in lines)
    return SlowPeriod(
        rank=f"{rank:,}",
        host=host,
        steps=f"{first['step'] - first['steps']:,} to {last['step']:,}",
        wall=duration(sum(line["seconds"] for line in lines)),
        behind=f"{max(line.get('behind', 0.0) for line in lines):.0%}",
        cause=", then ".join(causes),
    )
