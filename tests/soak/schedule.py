"""The seeded sequence of failures of a soak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Trigger = Literal["step", "saving", "start-up", "overlap"]
"""step: a number of steps after the previous failure. saving: then, as soon as a checkpoint is being written. start-up:
a number of seconds after the start that follows the previous failure. overlap: a number of seconds after the previous
failure, from which the run may not have recovered."""


@dataclass(frozen=True)
class Kind:
    """A kind of failure."""

    name: str
    text: str
    cards: int
    """How often it is in a deck, from which failures are drawn."""
    ends_start: bool = False
    """Whether the ranks must be started again."""
    early: bool = False
    """Whether it may happen before the first step, and while the run recovers from another failure. Not those that only
    the watchdog detects: before the first step it allows half an hour."""
    elastic: bool = False
    """Whether the number of ranks changes."""
    once: bool = False
    """Whether it happens at most once in a round."""
    moves_saves: bool = False
    """Whether the run, or the uninterrupted one, is saved at other steps because of it. Every save averages BatchNorm's
    statistics over the ranks, which changes their rounding; without such failures they must have the same bits."""


KINDS = (
    Kind("kill rank", "SIGKILL of a rank", 3, ends_start=True, early=True),
    Kind("kill all", "SIGKILL of all ranks", 2, ends_start=True, early=True),
    Kind("short stop", "SIGSTOP of a rank, SIGCONT before the hang timeout", 2, early=True),
    Kind("long stop", "SIGSTOP of a rank for longer than the hang timeout", 1, ends_start=True),
    Kind("short link cut", "link of a node down for some seconds", 2, early=True),
    Kind("long link cut", "link of a node down until all ranks have ended", 1, ends_start=True),
    Kind("slow link", "a node sends at 4 to 16 Mbit/s for some seconds", 2),
    Kind("slow disk", "every write to the shared storage takes up to a second", 2, early=True),
    Kind("full disk", "the shared storage is full for some seconds", 2, early=True),
    Kind("damaged checkpoint", "SIGKILL of all ranks, and damage to the newest checkpoint", 2, True, early=True),
    Kind("damaged shard", "a flipped bit in some samples; --bad-samples skip:N", 1, once=True, moves_saves=True),
    Kind("node removed", "a node loses power", 1, True, elastic=True, moves_saves=True),
    Kind("node added", "stop with RUN/PREEMPT, and start with another node", 1, True, elastic=True, moves_saves=True),
    Kind("preemption", "a signal to stop, then a requeue", 2, True, early=True, moves_saves=True),
    Kind("requeue", "SIGKILL of all ranks, loss of node-local storage, other nodes", 2, ends_start=True, early=True),
    Kind("clock step", "the clock of a node or of all nodes jumps", 2, early=True),
)
BY_NAME = {kind.name: kind for kind in KINDS}

# Number of ranks and ZeRO stage of the first start, by the number of the round. Odd rounds add and remove nodes.
WORLDS = (2, 2, 3, 3, 2, 4)
ZERO = (0, 0, 1, 0, 0, 2)
FEED_PROCESS_EVERY = 5
# These rounds have no failures that move saves, because nearly every round of all kinds has at least one.
EXACT_EVERY, FIRST_EXACT = 4, 2
GAP_STEPS = (2, 6)
EARLY_SECONDS = (0.0, 4.0)
OVERLAP_SECONDS = (0.0, 2.0)
# Fractions of the failures that are not triggered by a step.
SAVING, START_UP, OVERLAP = 0.2, 0.35, 0.15


@dataclass(frozen=True)
class PlannedFailure:
    """A failure of a round."""

    kind: Kind
    trigger: Trigger
    after: float
    """Steps or seconds, see `Trigger`."""
    seed: str
    """Seed of everything else, such as which rank is killed."""


@dataclass(frozen=True)
class RoundPlan:
    """One training of a soak, with its failures."""

    number: int
    world: int
    """Number of ranks of the first start."""
    elastic: bool
    """Whether nodes are added and removed."""
    zero: int
    feed_process: bool
    failures: tuple[PlannedFailure, ...]


class Deck:
    """Cards that are dealt in random order, so that every kind gets the number of failures of its cards."""

    def __init__(self, kinds: tuple[Kind, ...], draw: Random) -> None:
        self._cards = [kind for kind in kinds for _ in range(kind.cards)]
        self._draw = draw
        self._pile: list[Kind] = []

    def deal(self, allowed: set[str]) -> Kind:
        """Return the next card whose kind is allowed; the others stay in the pile."""
        while True:
            for number, kind in enumerate(self._pile):
                if kind.name in allowed:
                    return self._pile.pop(number)
            self._pile += self._draw.sample(self._cards, len(self._cards))


def rounds(seed: int, *, failures: int, kinds: tuple[Kind, ...] = KINDS) -> Iterator[RoundPlan]:
    """Yield the plans of all rounds of a soak, for ever.

    Args:
        failures: number of failures of each round, fewer if `kinds` has no others that are possible.
    """
    draw = Random(f"soak {seed}")
    deck = Deck(kinds, draw)
    number = 0
    while True:
        elastic = number % 2 == 1
        world = WORLDS[number % len(WORLDS)]
        possible = [kind for kind in kinds if elastic or not kind.elastic]
        exact = [kind for kind in possible if not kind.moves_saves] if number % EXACT_EVERY == FIRST_EXACT else []
        allowed = {kind.name for kind in exact or possible}
        planned: list[PlannedFailure] = []
        ranks = world
        for index in range(failures):
            usable = allowed - ({"node removed"} if ranks <= 2 else set()) - ({"node added"} if ranks >= 4 else set())
            if not usable:
                break  # of the chosen kinds, no other is possible in this round
            kind = deck.deal(usable)
            if kind.once:
                allowed = allowed - {kind.name}
            ranks += {"node removed": -1, "node added": 1}.get(kind.name, 0)
            trigger, after = _trigger(kind, planned[-1].kind if planned else None, draw)
            planned.append(PlannedFailure(kind, trigger, after, f"soak {seed} round {number} failure {index}"))
        zero, feed_process = ZERO[number % len(ZERO)], number % FEED_PROCESS_EVERY == 0
        yield RoundPlan(number, world, elastic, zero, feed_process, tuple(planned))
        number += 1


def _trigger(kind: Kind, previous: Kind | None, draw: Random) -> tuple[Trigger, float]:
    """Draw when a failure happens."""
    if kind.early and previous is not None:
        if previous.ends_start and draw.random() < START_UP:
            return "start-up", round(draw.uniform(*EARLY_SECONDS), 3)
        if draw.random() < OVERLAP:
            return "overlap", round(draw.uniform(*OVERLAP_SECONDS), 3)
    return "saving" if draw.random() < SAVING else "step", draw.randint(*GAP_STEPS)
