"""Choice of the fastest value of several options by measuring the values in alternating rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.errors import ShardSetError, first_line
from shards.progress import Phases

Values = Mapping[str, Any]
"""Option values by name: for one option, or for several options that are measured together."""


@dataclass(frozen=True)
class Choice:
    """Chosen value of an option, and the measurements."""

    value: Any
    """Value to use; None: the option is not set, because every value failed."""
    reason: str
    """Throughput or failure of each value."""


def tune(
    stages: Sequence[Sequence[Values]],
    rate: Callable[[Values], float],
    *,
    rounds: int,
    margin: float,
    seconds: float,
    progress: Phases,
) -> dict[str, Choice]:
    """Choose the values of one stage after another, each measured with the best values of the previous stages.

    Args:
        stages: values to try, the default first; each stage is one option or group of options.
        rate: measures images per second with the given values. An exception counts as a failure of these values, except
            ShardSetError.
        rounds: measurements per value. A round measures every value once, so that disturbances of the machine affect
            all values equally.
        margin: another value is chosen only if it is more than this many times as fast as the default.
        seconds: time limit, after which only the first round of a stage is still run.
        progress: shows each measurement, and the result of each stage.

    Raises:
        ShardSetError: the set is damaged, so every value would fail.
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
                    progress.begin(f"trying {name} {trial.shown}, round {turn + 1} of {rounds}")
                    trial.measure(lambda values: rate(best | values))
        chosen, reason = fastest(trials, margin), ", ".join(map(str, trials))
        progress.note(f"{name}: {chosen.shown if chosen else 'not set'} ({reason})")
        best.update(chosen.values if chosen else {})
        found |= {option: Choice(best.get(option), reason) for option in stage[0]}
    return found


@dataclass
class Trial:
    """Measurements of one candidate among the values of a stage."""

    values: Values
    rates: list[float] = field(default_factory=list)
    """Images per second, one per round."""
    failure: str = ""
    """Reason why the values cannot be used, in one line; empty if they can."""

    @property
    def shown(self) -> str:
        return " x ".join(map(str, self.values.values()))

    def __str__(self) -> str:
        return f"{self.shown} {self.failure or f'{statistics.median(self.rates):,.4g} images/s'}"

    def measure(self, rate: Callable[[dict[str, Any]], float]) -> None:
        """Add one measurement, or record the failure."""
        try:
            self.rates.append(rate(dict(self.values)))
        except ShardSetError:
            raise
        except Exception as error:  # out of memory, or an error of a compiler or decoder: continue with other values
            self.failure = f"failed ({type(error).__name__}: {first_line(error)[:120]})"


def fastest(trials: Sequence[Trial], margin: float) -> Trial | None:
    """Return the fastest trial by its median ratio to the default, the first trial; None if all failed.

    Args:
        margin: the default is kept if the best ratio is at most this number.
    """
    default, measured = trials[0], [trial for trial in trials if not trial.failure]

    def gain(trial: Trial) -> float:
        bases = [1.0] * len(trial.rates) if default.failure else default.rates
        return statistics.median(own / base for own, base in zip(trial.rates, bases, strict=True))

    best = max(measured, key=gain, default=None)
    return default if best and not default.failure and gain(best) <= margin else best
