"""`pipeline bench`: its options, and what it writes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from annotated_types import Interval

from shards.command import option_names
from shards.files.output import check_output, is_standard_output
from shards.option_help import default
from shards.progress import Phases
from shards.ranges import check_ranges
from shards.redact import printable

if TYPE_CHECKING:
    from launch.config.recipe import Recipe

CHART_FORMATS = (".png", ".pdf", ".svg")
BENCH_BATCH = {"cuda": 256, "cpu": 16}  # images per forward pass; the default batch of 1024 is meant for several GPUs


@dataclass(frozen=True)
class Bench:
    """Measure the throughput of the loader alone, of the model alone and of both together, to find the bottleneck.

    Training options (see 'launch/train.py --help') follow after `--`: pipeline bench SET -- --variant b3
    """

    dataset: tyro.conf.Positional[str]
    """Shard set: a folder or a URL."""
    ranks: Annotated[int, Interval(ge=1, le=1_000_000)] = 1
    """Number of ranks of the training. One rank is measured, with its part of the global batch."""
    steps: Annotated[Annotated[int, Interval(ge=1, le=1_000_000)] | None, default("30 on a GPU, 6 on CPUs")] = None
    """Optimizer steps per round of each measurement. There are three rounds."""
    json: Annotated[Path | None, default("not written")] = None
    """JSON file to write, with all measurements; - writes it to standard output instead of the table."""
    chart: Path = Path("bench.png")
    """Bar chart to write: .png, .pdf or .svg."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self, training: Sequence[str] = ()) -> int:
        import torch

        from launch.bench.chart import write_chart
        from launch.bench.run import PHASES, bench, write_json
        from launch.bench.verdict import table
        from launch.engine.execution import kernels_from_environment

        if self.json is not None:
            check_output(self.json, "--json")
        check_output(self.chart, "--chart", CHART_FORMATS, default=Bench.chart)
        cuda = torch.cuda.is_available()
        recipe = self._recipe(training, BENCH_BATCH["cuda" if cuda else "cpu"])
        steps = self.steps or (30 if cuda else 6)
        with kernels_from_environment(), Phases("bench", PHASES) as progress:
            figures = bench(recipe, ranks=self.ranks, steps=steps, progress=progress)
        if self.json is not None:
            write_json(figures, self.json)
        write_chart(figures, self.chart)
        if not is_standard_output(self.json):
            print(*map(printable, table(figures).splitlines()), sep="\n")
        for path in (self.json, self.chart):
            if path is not None and not is_standard_output(path):
                _note(f"wrote {path}")
        return 0

    def _recipe(self, training: Sequence[str], rows: int) -> Recipe:
        """Return the recipe of the training options, with at most `rows` images per forward pass by default."""
        from pipeline.batch_shape import BatchShape

        recipe = self._parse(training)
        data = recipe.data
        pairs = data.augmentation().mixes
        shape = BatchShape(global_batch=data.global_batch, world=self.ranks, micro_batch=data.micro_batch, pairs=pairs)
        if data.micro_batch is not None or shape.micro_rows <= rows:
            return recipe
        smaller = self._parse(training, {"global_batch": rows * self.ranks})
        if smaller != recipe:
            _note(f"neither --global-batch nor --micro-batch is set: measuring {rows} images per forward pass")
        return smaller

    def _parse(self, training: Sequence[str], data: Mapping[str, Any] | None = None) -> Recipe:
        from launch.config.command_line import parse_for_set

        return parse_for_set(self.dataset, training, own=option_names(Bench), data=data)


def _note(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
