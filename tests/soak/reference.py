"""The uninterrupted run with which a round is compared: ranks and data change at the same steps, but nothing fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from pipeline.plan import Position
from tests.soak.nodes import Node, wait_for_silence
from tests.soak.ranks import GLOBAL_BATCH, start_ranks
from tests.soak.records import Batch, Records
from tests.support.launching import ROOT

START_SECONDS = 600.0


class Segment(NamedTuple):
    """Steps that a run does with the same ranks and data."""

    stop: int
    """Steps done at its end."""
    world: int
    damaged: bool


@dataclass(frozen=True)
class Plan:
    """The plan of a training."""

    ids: Mapping[int, tuple[int, ...]]
    """Sample ids by step."""
    samples: int
    steps_per_epoch: int
    steps: int


def plan_of(options: Sequence[str]) -> Plan:
    """Return the plan of a training with these options of launch/train.py."""
    with contextlib.chdir(ROOT):
        feed = Feed.of(parse(list(options)), World(0, 1, 0, 1, torch.device("cpu")))
    plan = feed.plan
    ids = {
        step: tuple(plan.ids(Position(*divmod(step, plan.steps_per_epoch)), range(GLOBAL_BATCH)).tolist())
        for step in range(feed.total_steps)
    }
    return Plan(ids, plan.samples, plan.steps_per_epoch, feed.total_steps)


def segments(records: Records, plan: Plan, damaged: Collection[int]) -> list[Segment]:
    """Divide the final timeline of a round where the number of ranks changes, and where samples were first skipped."""
    final = records.final()
    found: list[Segment] = []
    skips = False
    for step in range(plan.steps):
        if step not in final:
            break  # `invariants.exactly_once` reports it
        batch = final[step].batch(step)
        skips |= batch is not None and any(
            expected in damaged and delivered != expected
            for delivered, expected in zip(batch.ids, plan.ids[step], strict=True)
        )
        if found and found[-1][1:] == (final[step].world, skips):
            found[-1] = found[-1]._replace(stop=step + 1)
        else:
            found.append(Segment(step + 1, final[step].world, skips))
    return found


class References:
    """Uninterrupted runs, of which those on undamaged data are used again.

    Args:
        folder: folder for these runs.
    """

    def __init__(self, folder: Path, nodes: Sequence[Node]) -> None:
        self._folder, self._nodes = folder, nodes
        self._found: dict[tuple[object, ...], tuple[dict[int, Batch], Path]] = {}
        self._count = 0

    def get(
        self, parts: Sequence[Segment], options: Callable[[Path, Path], list[str]], *, clean: Path, damaged: Path
    ) -> tuple[dict[int, Batch], Path]:
        """Return the batches by step, and the run folder, of an uninterrupted run.

        Args:
            options: returns the options for a run folder and a data set.
            clean, damaged: the data set before and after the damage.
        """
        key = (*parts, *options(Path(), clean))
        found = self._found.get(key)
        if found is None:
            self._count += 1
            folder = self._folder / f"uninterrupted-{self._count}"
            found = run_reference(parts, self._nodes, folder, options, clean=clean, damaged=damaged)
            if not any(part.damaged for part in parts):
                self._found[key] = found
        return found


def run_reference(
    parts: Sequence[Segment], nodes: Sequence[Node], folder: Path, options: Callable[[Path, Path], list[str]],
    *, clean: Path, damaged: Path,
) -> tuple[dict[int, Batch], Path]:  # fmt: skip
    """Train the uninterrupted run; return its batches by step, and its run folder.

    Args:
        options: returns the options for a run folder and a data set.
        clean, damaged: the data set before and after the damage.
    """
    records, run = folder / "records", folder / "run"
    records.mkdir(parents=True)
    for number, part in enumerate(parts):
        chosen = options(run, damaged if part.damaged else clean)
        ranks = nodes[: part.world]
        pids = start_ranks(
            ranks, number=number, records=records, logs=folder, pace=0.0,
            options=[*chosen, "--stop-after", str(part.stop)],
        )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while any(node.status(pids[rank]) is None for rank, node in enumerate(ranks)):
            assert time.monotonic() < end, f"the uninterrupted run did not end: {folder}"
            time.sleep(0.05)
        statuses = [node.status(pids[rank]) for rank, node in enumerate(ranks)]
        log = (folder / f"start-{number}-rank-0.log").read_text(errors="replace")
        assert statuses == [0] * part.world, f"the uninterrupted run failed with {statuses}\n{log}"
        assert not wait_for_silence(list(nodes), 30)
    found = Records(records)
    found.update()
    return {step: batch for _, step, batch in found.executions()}, run
