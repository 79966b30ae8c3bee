"""Choose the fastest of several values of an option by measuring them in turns."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shards.errors import ShardSetError, first_line

MARGIN = 1.02


@dataclass(frozen=True)
class Choice:
    """The value to use, and what was measured."""

    value: Any
    """None = left open: there was no time, or every value failed."""
    reason: str
    """The figure, or the failure, of each value."""


@dataclass(frozen=True)
class Trial:
    """The measurements of one value."""

    value: Any
    rates: tuple[Any, ...] = ()
    """One per round; empty if the value failed."""
    failure: str = ""
    """Why it failed, in a line."""


def choose(
    name: str,
    values: Sequence[Any],
    rate: Callable[[Any], float],
    *,
    rounds: int,
    until: float,
    say: Callable[[str], None],
    unit: str = "images/s",
    margin: float = MARGIN,
    shown: Callable[[Any], str] = str,
) -> Choice:
    """Measure the values of an option and return the fastest.

    Args:
        name: of the option, for messages.
        values: the first is the default.
        rate, rounds, until: see `take_turns`.
        say: receives a line before each turn, and one with the result.
        margin: see `fastest`.
        shown: a value, for messages.
    """
    trials = take_turns(
        values,
        rate,
        rounds=rounds,
        until=until,
        announce=lambda value, turn: say(f"trying {name} {shown(value)}, {turn}"),
    )
    best = fastest(trials, margin)
    figures = (t.failure or (f"{statistics.median(t.rates):,.4g} {unit}" if t.rates else "no time") for t in trials)
    reason = ", ".join(f"{shown(t.value)} {figure}" for t, figure in zip(trials, figures, strict=True))
    say(f"{name}: {shown(best.value) if best else 'left open'} ({reason})")
    return Choice(best.value if best else None, reason)


def take_turns(
    values: Sequence[Any],
    rate: Callable[[Any], Any],
    *,
    rounds: int,
    until: float = math.inf,
    passed_on: type[Exception] = ShardSetError,
    announce: Callable[[Any, str], None] = lambda value, turn: None,
) -> list[Trial]:
    """Measure every value once per round, so that disturbances of the machine affect all of them alike.

    Args:
        rate: measures a value once.
        until: no round begins after this time (`time.monotonic`).
        passed_on: exceptions that are raised; any other is a failure of the value. Damaged data fails with every value.
        announce: receives each value and turn ("round 1 of 3") before it begins: a turn may take minutes.
    """
    rates: list[list[Any]] = [[] for _ in values]
    failures = [""] * len(values)
    for turn in range(rounds):
        if time.monotonic() > until:
            break
        for number, value in enumerate(values):
            if failures[number]:
                continue
            announce(value, f"round {turn + 1} of {rounds}")
            try:
                rates[number].append(rate(value))
            except passed_on:
                raise
            except Exception as error:  # out of memory, an error of a compiler or a decoder: there are other values
                failures[number] = f"failed ({type(error).__name__}: {first_line(error)[:120]})"
    found = zip(values, rates, failures, strict=True)
    return [Trial(value, () if failure else tuple(own), failure) for value, own, failure in found]


def fastest(trials: Sequence[Trial], margin: float = MARGIN) -> Trial | None:
    """Return the fastest by the median of its ratios to the default, which is the first; None if nothing was measured.

    Args:
        margin: the default is kept if the best ratio is not above this.
    """
    default, measured = trials[0], [trial for trial in trials if trial.rates]

    def gain(trial: Trial) -> float:
        pairs = zip(trial.rates, default.rates or itertools.repeat(1.0), strict=False)
        return statistics.median(own / base for own, base in pairs)

    best = max(measured, key=gain, default=None)
    return default if best and default.rates and gain(best) <= margin else best
