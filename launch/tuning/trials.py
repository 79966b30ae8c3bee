"""Choosing the fastest of several values by trying them in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shards.errors import first_line

Value = str | int | float

MARGIN = 1.02
LATE = "not tried: out of time"


@dataclass(frozen=True)
class Trial:
    """How one value did."""

    value: Any
    rates: tuple[float, ...] = ()
    """Per round: images, or updates, per second; none if it failed."""
    failure: str = ""
    """Why it failed, in a line."""


@dataclass(frozen=True)
class Choice:
    """The value to take, and how it came to be chosen."""

    value: Any
    reason: str


def decided(trials: Sequence[Trial], *, whole: bool = False) -> bool:
    """Whether there is a choice: the default and another value have had their turn, and one of them did not fail.

    Args:
        whole: all values must have had it.
    """
    had = [trial.failure != LATE for trial in trials]
    return any(trial.rates for trial in trials) and (all(had) if whole else had[0] and any(had[1:]))


def take_turns(
    values: Sequence[Any],
    rate: Callable[[Any], float],
    *,
    rounds: int,
    until: float,
    passed_on: type[Exception] | tuple[type[Exception], ...] = (),
    announce: Callable[[Any, str], None] = lambda value, turn: None,
) -> list[Trial]:
    """Measure values in rounds in which each has its turn, so that what disturbs the machine disturbs all alike.

    Args:
        rate: measures a value once.
        until: no turn begins after this time (`time.monotonic`).
        passed_on: exceptions that are no failure of a value.
        announce: is told each value and turn ("round 1 of 3") before it begins: a turn may take minutes.
    """
    rates: list[list[float]] = [[] for _ in values]
    failures = [""] * len(values)
    for turn in range(rounds):
        for number, value in enumerate(values):
            if failures[number] or time.monotonic() > until:
                continue
            announce(value, f"round {turn + 1} of {rounds}")
            try:
                rates[number].append(rate(value))
            except passed_on:
                raise
            except Exception as error:  # no memory, what a compiler or a decoder stumbles over: there are other values
                failures[number] = f"failed ({type(error).__name__}: {first_line(error)[:120]})"
    tried = [len(own) for own, failure in zip(rates, failures, strict=True) if own and not failure]
    whole = min(tried, default=0)
    return [
        Trial(value, () if failure else tuple(own[:whole]), failure or ("" if own else LATE))
        for value, own, failure in zip(values, rates, failures, strict=True)
    ]


def best_of(
    trials: Sequence[Trial], unit: str = "images/s", *, margin: float = MARGIN, shown: Callable[[Any], str] = str
) -> Choice:
    """The fastest by the median of its ratios to the default, the first of the trials.

    Args:
        margin: a ratio that is no more than this is noise, and the default stays.
        shown: a value, for people.
    """
    default = trials[0]
    measured = [trial for trial in trials if trial.rates]

    def gain(trial: Trial) -> float:
        if not default.rates:
            return statistics.median(trial.rates)
        return statistics.median(own / base for own, base in zip(trial.rates, default.rates, strict=True))

    best = max(measured, key=gain, default=default)
    if default.rates and gain(best) <= margin:
        best = default
    figures = (t.failure or f"{statistics.median(t.rates):,.4g} {unit}" for t in trials)
    return Choice(
        best.value, ", ".join(f"{shown(t.value)} {figure}" for t, figure in zip(trials, figures, strict=True))
    )
