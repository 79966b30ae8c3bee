"""`pipeline tune`: its options, and what it writes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Interval

from shards.command import option_names
from shards.progress import Phases
from shards.ranges import check_ranges
from shards.redact import printable


@dataclass(frozen=True)
class Tune:
    """Measure which performance options of model and loader are fastest on this machine; write them as a recipe file.

    Training options (see 'launch/train.py --help') follow after `--`; the ones that are set there are not varied:
    pipeline tune SET --ranks 8 -- --variant b3. Then train with: --recipe tuned.toml
    """

    dataset: tyro.conf.Positional[str]
    """Shard set: a folder or a URL."""
    out: Path = Path("tuned.toml")
    """Recipe file to write. An existing one is replaced."""
    ranks: Annotated[int, Interval(ge=1, le=1024)] = 1
    """Number of ranks of the training on this machine. One rank is measured, with its part of the cores and of the
    global batch."""
    what: Literal["both", "model", "input"] = "both"
    """What to measure: options of the model, of its input (the loader), or of both."""
    seconds: Annotated[float, Interval(gt=0, le=1_000_000)] = 60.0
    """Approximate duration of the measurements in seconds, for model and input each. It may take longer, because every
    value is measured at least once, and compiling the model on GPUs takes minutes."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self, training: Sequence[str] = ()) -> int:
        from launch.config.command_line import parse_for_set
        from launch.engine.execution import kernels_from_environment
        from launch.tuning.command import TARGETS, tune
        from launch.tuning.recipe_fragment import check_fragment_output, write_fragment

        check_fragment_output(self.out)
        recipe = parse_for_set(self.dataset, training, own=option_names(Tune))
        targets = tuple(target for target in TARGETS if self.what in ("both", target))
        options = f"--ranks {self.ranks} --what {self.what} --seconds {self.seconds:g}"
        command = f"pipeline tune {shlex.quote(self.dataset)} {options} -- {shlex.join(training)}"
        with kernels_from_environment(), Phases("tune") as progress:
            text = tune(recipe, targets, ranks=self.ranks, seconds=self.seconds, command=command, progress=progress)
        write_fragment(self.out, text)
        print(printable(f"wrote {self.out}; train with --recipe {self.out}"), file=sys.stderr, flush=True)
        return 0
