"""`pipeline race`: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Interval

from launch.start.processes import ProcessCount
from shards.command import option_names
from shards.errors import UserError
from shards.option_help import default
from shards.ranges import check_ranges
from shards.redact import printable

MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Race:
    """Measure the time to accuracy: train with several seeds until a top-1 accuracy is reached.

    Each run is timed as in MLPerf Training: from before the first access to training data to the end of the evaluation
    that reaches the accuracy. An interrupted race is resumed by the same command. The exit status is 1 if a run does
    not reach the accuracy. Training options follow after `--`:
    pipeline race SET --recipe digits --to 0.985 --seeds 0,1,2 -- --epochs 12
    """

    dataset: tyro.conf.Positional[str]
    """Shard set: a folder or a URL."""
    to: Annotated[float, Interval(gt=0, le=1)]
    """Top-1 accuracy to reach, of the weights or of their EMA, as a fraction such as 0.76."""
    recipe: Annotated[str | None, default("the default options")] = None
    """Recipe of the training: a name that 'pipeline recipes' lists, or a file."""
    seeds: str = "0"
    """Seeds of the runs, separated by commas."""
    out: Path = Path("runs/race")
    """Folder for the run folders, seed-0 and so on, and for the results, race.json."""
    processes: ProcessCount = None
    """Number of training processes on this machine."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self, training: Sequence[str] = ()) -> int:
        from launch.race.results import table, write_results
        from launch.race.run import Racer

        options = (*(("--recipe", self.recipe) if self.recipe is not None else ()), *training)
        racer = Racer(self.dataset, options, target=self.to, processes=self.processes, own=option_names(Race))
        results = []
        for seed in parse_seeds(self.seeds):
            outcome = racer.run(seed, self.out / f"seed-{seed}")
            if isinstance(outcome, int):
                return outcome
            results.append(outcome)
        write_results(self.out / "race.json", racer.description(), results)
        print(*map(printable, table(results, self.to)), sep="\n")
        return 0 if all(result.reached for result in results) else 1


def parse_seeds(text: str) -> list[int]:
    """Parse seeds separated by commas, such as 0,1,2.

    Raises:
        UserError: a seed is not a number in range, or occurs twice.
    """
    seeds = []
    for part in text.split(","):
        if not (part.isascii() and part.isdigit() and len(part) <= 19 and int(part) <= MAX_SEED):
            raise UserError(f"--seeds {text}: expected numbers from 0 to below 2^63, separated by commas, as in 0,1,2")
        seeds.append(int(part))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed occurs twice; omit one of them")
    return seeds
