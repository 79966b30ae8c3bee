"""Measure what progressive resizing gains on digits: the time to a validation accuracy of 98.5 %, with and without it.

    python benchmarks/digits_race.py SET [--seeds 0,1,2,3,4] [--ways without with] [--runs DIR] [--out FILE.json]

SET is the shard set of `make demo`, or of `pipeline sample digits` and `pipeline shard`. Both ways train the recipe
`digits` (FAT-B0, 64 pixels, an evaluation at 64 pixels after each epoch) with 30 epochs and a learning rate of 8e-3
until the accuracy is reached, as `pipeline race` does; one of them adds SCHEDULE. The ways alternate, in an order that
changes with every seed. The result is the ratio of the medians, in which a run that does not reach the accuracy counts
as infinitely long. Runs that are finished are not repeated, and an interrupted one is resumed (its time is then not
that of an uninterrupted run). A run takes 3 to 6 minutes on two CPU cores, which should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.machine.provenance import cpu_name, git_state, versions
from launch.race.options import parse_seeds
from launch.race.results import SeedResult, median_seconds, table
from launch.race.run import Racer
from shards.cores import cores
from shards.files.durable import durable_write

TARGET = 0.985
RECIPE = "--recipe digits --epochs 30 --lr 8e-3"
"""With its own learning rate of 1e-3, the recipe `digits` reaches 98.5 % in its sixth epoch, and smaller images save no
time: after a change of the size, training needs three to eight epochs. With 8e-3, the accuracy rises as the learning
rate falls, as in trainings on ImageNet, so that the number of epochs decides."""
SCHEDULE = "16e:32,16e:64"
WAYS: dict[str, tuple[str, ...]] = {
    "without": tuple(shlex.split(RECIPE)),
    "with": (*shlex.split(RECIPE), "--size-schedule", SCHEDULE),
}
RESULTS = Path(__file__).with_name("results") / "digits_race.json"


def race(dataset: str, ways: Sequence[str], seeds: Sequence[int], runs: Path, out: Path) -> int:
    """Run all ways with all seeds, and write the results after each run; return the exit status."""
    racers = {way: Racer(dataset, WAYS[way], target=TARGET, processes=1, own=()) for way in ways}
    results: dict[str, list[SeedResult]] = {way: [] for way in ways}
    for number, seed in enumerate(seeds):
        for way in ways if number % 2 == 0 else reversed(ways):
            found = racers[way].run(seed, runs / way / f"seed-{seed}")
            if isinstance(found, int):
                return found
            results[way].append(found)
            durable_write(out, (json.dumps(summary(results), indent=1) + "\n").encode())
    for way in ways:
        print(f"{way} the size schedule: {shlex.join(('pipeline', 'race', 'SET', *WAYS[way], '--to', str(TARGET)))}")
        print(*table(results[way], TARGET), sep="\n")
    if (ratio := summary(results)["ratio"]) is not None:
        print(f"time to {TARGET:.1%} without / with the size schedule: {ratio:.2f}")
    return 0 if all(found.reached for own in results.values() for found in own) else 1


def summary(results: Mapping[str, Sequence[SeedResult]]) -> dict[str, Any]:
    """Return the content of the JSON file; `ratio` is None until both ways have reached the target."""
    medians = {way: median_seconds(own) if own else None for way, own in results.items()}
    without, with_schedule = medians.get("without"), medians.get("with")
    return {
        "machine": {"cpu": cpu_name(), "cores": cores(), "versions": versions(), "commit": git_state()},
        "target_top1": TARGET,
        "options": {way: shlex.join(WAYS[way]) for way in results},
        "median_seconds": medians,
        "ratio": None if without is None or with_schedule is None else round(without / with_schedule, 3),
        "results": {way: list(map(asdict, own)) for way, own in results.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="shard set of the digits")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="separated by commas")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_race"), help="folder for the run folders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args()
    return race(options.set, options.ways, parse_seeds(options.seeds), options.runs, options.out)


if __name__ == "__main__":
    sys.exit(main())
