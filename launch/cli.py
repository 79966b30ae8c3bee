"""The `pipeline` command. Each subcommand is a frozen dataclass of its options with a `run` method."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from launch.machine.standard_streams import open_missing_streams
from shards.interrupt import exit_on_interrupt, interruptible

if Path(sys.argv[0]).name == "pipeline" or __name__ == "__main__":
    open_missing_streams()  # before the pipe for signals, which would get the descriptor of a closed stream
    exit_on_interrupt()  # during imports; the installed script imports this file

import tyro
from annotated_types import Interval
from tyro.conf import subcommand

from launch.report.command import Report
from pipeline.look import Look
from shards.command import check_options, check_subcommand, main_program, option_names
from shards.commands.command_line import Index, SampleDigits, SamplePhotos, Shard
from shards.commands.inspect import Info, Verify
from shards.cores import limit_openmp
from shards.errors import UserError, open_files_error, report
from shards.files.output import check_output, is_standard_output
from shards.open_files import raise_limit
from shards.option_help import default
from shards.progress import Phases
from shards.ranges import check_ranges
from shards.redact import printable, protect_output

if TYPE_CHECKING:
    from launch.config.recipe import Recipe

CHART_FORMATS = (".png", ".pdf", ".svg")
BENCH_BATCH = {"cuda": 256, "cpu": 16}  # images per forward pass; the default batch of 1024 is meant for several GPUs


@dataclass(frozen=True)
class Sample:
    """Create a small real data set as an ImageNet-like folder."""

    what: (
        Annotated[SampleDigits, subcommand("digits", prefix_name=False)]
        | Annotated[SamplePhotos, subcommand("photos", prefix_name=False)]
    )

    def run(self) -> int:
        return self.what.run()


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
        check_output(self.chart, "--chart", CHART_FORMATS)
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

        recipe = _training_recipe(self.dataset, training)
        data = recipe.data
        pairs = data.augmentation().mixes
        shape = BatchShape(global_batch=data.global_batch, world=self.ranks, micro_batch=data.micro_batch, pairs=pairs)
        if data.micro_batch is not None or shape.micro_rows <= rows:
            return recipe
        smaller = _training_recipe(self.dataset, training, {"global_batch": rows * self.ranks})
        if smaller != recipe:
            _note(f"neither --global-batch nor --micro-batch is set: measuring {rows} images per forward pass")
        return smaller


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
        from launch.engine.execution import kernels_from_environment
        from launch.tuning.command import TARGETS, tune
        from launch.tuning.recipe_fragment import check_fragment_output, write_fragment

        check_fragment_output(self.out)
        recipe = _training_recipe(self.dataset, training)
        targets = tuple(target for target in TARGETS if self.what in ("both", target))
        options = f"--ranks {self.ranks} --what {self.what} --seconds {self.seconds:g}"
        command = f"pipeline tune {shlex.quote(self.dataset)} {options} -- {shlex.join(training)}"
        with kernels_from_environment(), Phases("tune") as progress:
            text = tune(recipe, targets, ranks=self.ranks, seconds=self.seconds, command=command, progress=progress)
        write_fragment(self.out, text)
        _note(f"wrote {self.out}; train with --recipe {self.out}")
        return 0


@dataclass(frozen=True)
class Goodput:
    """Show how much of a run's wall time was training, over all its starts, and where the rest went."""

    run_folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(name="run", metavar="RUN")]]
    """Run folder: --out of the training."""
    json: bool = False
    """Print JSON instead of tables, with the names of ml-goodput-measurement."""

    def run(self) -> int:
        import json

        from launch.monitor.goodput_table import describe, read_goodput

        found = read_goodput(self.run_folder, lambda message: print(f"warning: {printable(message)}", file=sys.stderr))
        if self.json:
            print(json.dumps(found.to_dict(), indent=1))
        else:
            print(*map(printable, describe(found).splitlines()), sep="\n")
        return 0


@dataclass(frozen=True)
class Train:
    """Train on the GPUs of this machine: start a process of launch/train.py for each.

    The options of the training follow after `--`; 'pipeline train -- --help' lists them. Example:
    pipeline train --processes 8 -- --variant b3 --data SET
    """

    processes: Annotated[
        Annotated[int, Interval(ge=1, le=1024)] | None, default("one per GPU, 1 on a machine without GPUs")
    ] = None
    """Number of processes. Use 'python -m launch.submit' for several machines."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def run(self, training: Sequence[str] = ()) -> int:
        from launch.start_processes import start_training

        return start_training(self.processes, training)


def _training_recipe(dataset: str, training: Sequence[str], data: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of training options on a shard set; a recipe file cannot select another set.

    Args:
        training: options of launch/train.py.
        data: values of [data] that replace the defaults.

    Raises:
        UserError: see `launch.config.command_line.parse`; or `training` selects another set with --data.
    """
    from launch.config.command_line import parse

    own = {"an option of the command, not of training; write it before --": option_names(Bench) | option_names(Tune)}
    arguments, prog = ["--data", dataset, *training], "-- [training options]"
    recipe = parse(arguments, defaults={"data": data or {}}, prog=prog, elsewhere=own)
    if recipe.data.data != dataset:
        raise UserError(f"--data {recipe.data.data}: differs from the set {dataset} of the command; omit --data")
    return recipe


SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "shard": Shard,
    "index": Index,
    "verify": Verify,
    "info": Info,
    "look": Look,
    "train": Train,
    "bench": Bench,
    "tune": Tune,
    "goodput": Goodput,
    "report": Report,
    "sample": Sample,
}


SAMPLES: dict[str, type] = {"digits": SampleDigits, "photos": SamplePhotos}


def _note(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


DESCRIPTION = """Create, verify, view and measure shard sets for training vision backbones, and train on them.

pipeline COMMAND --help lists the options of a command, and pipeline --version prints the versions."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit status (docs/troubleshooting.md).

    0: done, 1: failed, 2: invalid input, 130: interrupted.
    """
    return interruptible(lambda: _main(list(sys.argv[1:] if args is None else args)))


def _main(args: list[str]) -> int:
    protect_output()
    limit_openmp()
    raise_limit()
    end = args.index("--") if "--" in args else len(args)
    own, training = args[:end], args[end + 1 :]
    return main_program(lambda: _run(own, training), own)


def _run(args: Sequence[str], training: Sequence[str]) -> int:
    try:
        _check_names(args)
        command = tyro.extras.subcommand_cli_from_dict(
            SUBCOMMANDS, args=args, prog="pipeline", description=DESCRIPTION, config=(tyro.conf.OmitArgPrefixes,)
        )
        if isinstance(command, Bench | Train | Tune):
            return command.run(training)
        if training:
            raise UserError(
                f"-- {' '.join(training)}: only 'train', 'bench' and 'tune' accept training options after --; omit them"
            )
        return int(command.run())
    except UserError as error:
        return report(error)
    except Exception as error:
        if (known := open_files_error(error)) is None:
            raise
        return report(known)


def _check_names(args: Sequence[str]) -> None:
    """Raise UserError for a misspelt subcommand or option."""
    if not args or args[0].startswith("-"):
        return
    check_subcommand(args[0], SUBCOMMANDS, command="pipeline")
    command, kind = f"pipeline {args[0]}", SUBCOMMANDS[args[0]]
    if kind is Sample:
        if len(args) < 2 or args[1].startswith("-"):
            return
        check_subcommand(args[1], SAMPLES, command=command)
        command, kind = f"{command} {args[1]}", SAMPLES[args[1]]
    elsewhere = {}
    if kind in (Bench, Train, Tune):
        from launch.config.recipe import Recipe

        example = f"{command} {'' if kind is Train else 'SET '}-- --variant b3"
        advice = f"a training option; write training options after --: {example}"
        elsewhere[advice] = option_names(Recipe) | {"--recipe"}
    check_options(args, option_names(kind), command=command, elsewhere=elsewhere)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
