"""What each failure cost: lost steps and the time until the run had recovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.soak.records import DoneStep


@dataclass
class Failure:
    """A failure that has happened. Times are of time.monotonic()."""

    index: int
    kind: str
    ends_start: bool
    detail: str
    phase: str
    """start-up, saving or training."""
    start: int
    """Number of the start during which it happened."""
    time: float
    ended: float | None = None
    """When it had ended or was undone; None: not yet."""
    step: int = 0
    """Steps done when it happened."""
    lost_steps: int = 0
    """Steps that were repeated because of it."""
    seconds_to_recover: float | None = None
    """Longest time without a completed step, from the failure until the first step that began after it and was
    completed after its end; None: not recovered."""
    seconds_to_catch_up: float | None = None
    """Until the steps that were done before the failure had been repeated."""

    @property
    def settled(self) -> bool:
        return self.seconds_to_recover is not None


def settle(failure: Failure, steps: Sequence[DoneStep]) -> None:
    """Set the time to recover, if the run has recovered from a failure.

    Args:
        steps: all steps that have been done, in order of time.
    """
    if failure.ended is None or failure.settled:
        return
    last = failure.time
    longest = 0.0
    for done in steps:
        if done.time <= failure.time:
            continue
        longest, last = max(longest, done.time - last), done.time
        began_after = done.time - done.seconds >= failure.time
        restarted = done.start > failure.start or not failure.ends_start
        if began_after and restarted and done.time >= failure.ended:
            failure.seconds_to_recover = longest
            return


def caught_up(failure: Failure, reached: int, steps: Sequence[DoneStep]) -> None:
    """Set the time to catch up, if the run has again as many steps as were done before the failure.

    Args:
        reached: steps done before the failure.
    """
    if failure.seconds_to_catch_up is None and failure.settled and failure.ended is not None:
        for done in steps:
            later = done.start > failure.start or not failure.ends_start
            if done.time >= failure.ended and later and done.step + 1 >= reached:
                failure.seconds_to_catch_up = max(done.time - failure.time, failure.seconds_to_recover or 0.0)
                return


def attribute_loss(lost: int, unsettled: Sequence[Failure]) -> bool:
    """Add the steps that a new start repeats to the failure that ended the previous start; return whether there is one.

    The first unsettled failure that ends starts has ended it, else the first one.
    """
    candidates = [failure for failure in unsettled if failure.ends_start] or list(unsettled)
    if candidates:
        candidates[0].lost_steps += lost
    return bool(candidates)


def had_saved(status: str | None, *, trained: bool) -> bool:
    """Return whether a start has saved all of its steps before it ended.

    Args:
        status: RUN/status after its end. It is "preempted" also for a start that was stopped before training.
        trained: whether it has done a step.
    """
    return trained and status == "preempted"
