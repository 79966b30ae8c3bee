"""Choose the fastest value of each of several options by measuring their values in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.errors import ShardSetError, first_line

Values = Mapping[str, Any]
"""Of one option, or of several that go together."""


@dataclass(frozen=True)
class Choice:
    """The value to use, and what was measured."""

    value: Any
    """None = left open, as every value failed."""
    reason: str
    """The figure, or the failure, of each value."""


def tune(
    stages: Sequence[Sequence[Values]],
    rate: Callable[[Values], float],
    *,
    rounds: int,
    margin: float,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Choice]:
    """Choose the values of one stage after the other, each measured with the best of those before it.

    Args:
        stages: the values to try, the default first.
        rate: images per second with some values. Any exception but that of a damaged set is a failure of the values.
        rounds: turns of each value; within a round, disturbances of the machine affect all of them alike.
        margin: the default is kept unless another value is so many times as fast.
        seconds: after so many, no round but the first of a stage begins.
        say: receives a line before each turn, and one with each result.

    Raises:
        ShardSetError: the set is damaged, which fails with every value.
    """
    until, best, found = time.monotonic() + seconds, dict[str, Any](), dict[str, Choice]()
    for stage in stages:
        name = ", ".join(option.replace("_", "-") for option in stage[0])
        trials = [Trial(values) for values in stage]
        for turn in range(rounds):
            if turn and time.monotonic() > until:
                break
            for trial in trials:
                if not trial.failure:
                    say(f"trying {name} {trial.shown}, round {turn + 1} of {rounds}")
                    trial.measure(lambda values: rate(best | values))
        chosen, reason = fastest(trials, margin), ", ".join(map(str, trials))
        say(f"{name}: {chosen.shown if chosen else 'left open'} ({reason})")
        best.update(chosen.values if chosen else {})
        found |= {option: Choice(best.get(option), reason) for option in stage[0]}
    return found


@dataclass
class Trial:
    """The measurements of some values."""

    values: Values
    rates: list[float] = field(default_factory=list)
    """Images per second, one per round."""
    failure: str = ""
    """Why the values cannot be used, in a line."""

    @property
    def shown(self) -> str:
        return " x ".join(map(str, self.values.values()))

    def __str__(self) -> str:
        return f"{self.shown} {self.failure or f'{statistics.median(self.rates):,.4g} images/s'}"

    def measure(self, rate: Callable[[dict[str, Any]], float]) -> None:
        """Measure once more."""
        try:
            self.rates.append(rate(dict(self.values)))
        except ShardSetError:
            raise
        except Exception as error:  # out of memory, an error of a compiler or a decoder: there are other values
            self.failure = f"failed ({type(error).__name__}: {first_line(error)[:120]})"


def fastest(trials: Sequence[Trial], margin: float) -> Trial | None:
    """Return the fastest by the median of its ratios to the default, which is the first; None if all have failed.

    Args:
        margin: the default is kept if the best ratio is not above this.
    """
    default, measured = trials[0], [trial for trial in trials if not trial.failure]

    def gain(trial: Trial) -> float:
        bases = [1.0] * len(trial.rates) if default.failure else default.rates
        return statistics.median(own / base for own, base in zip(trial.rates, bases, strict=True))

    best = max(measured, key=gain, default=None)
    return default if best and not default.failure and gain(best) <= margin else best
